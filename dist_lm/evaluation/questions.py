"""What a model is asked about conversations: the turns in which it decides whether to call, and what.

A turn is one in which the assistant decides when it calls, or when it answers a person. Turns that put a result in
words are not asked: there is no one right answer.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dist_lm.chat.errors import ChatError
from dist_lm.chat.messages import Conversation, Message
from dist_lm.chat.schema import check_tool
from dist_lm.chat.template import parse, prompt, render
from dist_lm.data.mapped import MappedCorpus
from dist_lm.tokenizer.tokenizer import Tokenizer

# of those kinds one turn only: the first, before which no call of the tool can be seen; or the last, which the kind is
# about (the call after an error, the answer that needs no call). Of all others every turn.
FIRST = ("single", "parallel", "hub")
LAST = ("recovery", "answer")
NONE = ("choosing",)  # no call there has arguments


@dataclass(frozen=True)
class Question:
    """A turn of the assistant."""

    kind: str  # of the conversation: single, parallel, ...
    asked: Conversation  # all that was said before
    expected: Message


@dataclass(frozen=True)
class Asked:
    """A question in tokens."""

    question: Question
    prompt: list[int]
    expected: list[int]  # the turn, with the mark that ends it


def questions_of(conversation: Conversation, kind: str) -> list[Question]:
    """The turns of a conversation that are asked: none without tools, of drills, or where calls cannot be checked."""
    if not conversation.tools or kind in NONE or not _can_be_checked(conversation):
        return []
    messages = conversation.messages
    places = [
        number
        for number, message in enumerate(messages)
        if message.role == "assistant" and (message.calls or messages[number - 1].role == "user")
    ]
    if kind in FIRST:
        places = places[:1]
    elif kind in LAST:
        places = places[-1:]
    return [
        Question(kind, Conversation(messages[:place], conversation.tools), messages[place])
        for place in places
        if all(call.name in {tool.name for tool in conversation.tools} for call in messages[place].calls)
    ]


def choose(corpus: MappedCorpus, tokenizer: Tokenizer, per_kind: int, context: int, own: str = "tools_") -> list[Asked]:
    """The questions about a corpus, the same at every call: of each kind the first `per_kind`, by kind.

    Args:
        context: tokens that a model takes; a question that leaves no room for its answer is passed over.
        own: what the languages of the corpus begin with; the rest is the kind.
    """
    chosen: dict[str, list[Asked]] = {}
    kinds = [name.removeprefix(own) for name in corpus.languages]
    for document, code in enumerate(corpus.language_codes.tolist()):
        kept = chosen.setdefault(kinds[code], [])
        if len(kept) < per_kind:
            tokens = corpus.tokens(document, 0, int(corpus.lengths[document]))
            found = questions_of(parse(tokens.tolist(), tokenizer), kinds[code])
            kept += [one for one in asked(found, tokenizer) if len(one.prompt) + len(one.expected) <= context]
    return [one for _, kept in sorted(chosen.items()) for one in kept[:per_kind]]


def asked(questions: Iterable[Question], tokenizer: Tokenizer) -> list[Asked]:
    """Questions as a model gets them."""
    found = []
    for question in questions:
        begin = prompt(question.asked, tokenizer)
        whole = Conversation((*question.asked.messages, question.expected), question.asked.tools)
        found.append(Asked(question, begin, render(whole, tokenizer).tokens[len(begin) :].tolist()))
    return found


def shown(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """Tokens as people read them, marks by their names."""
    special = {number: name for name, number in tokenizer.special_ids.items()}
    parts, text = [], list[int]()
    for token in tokens:
        if token in special:
            parts += [tokenizer.decode(text), special[token]]
            text = []
        else:
            text.append(token)
    return "".join([*parts, tokenizer.decode(text)])


def _can_be_checked(conversation: Conversation) -> bool:
    try:
        for tool in conversation.tools:
            check_tool(tool)
    except ChatError:
        return False
    return True
