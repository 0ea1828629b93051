"""Questions about tool use: turns of held-out conversations in which the assistant decides whether and what to call.

A turn is asked if it contains calls or answers the user. A turn that puts tool results into words is not asked, because
many wordings are correct.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from dist_lm.chat.messages import ChatError, Conversation, Message
from dist_lm.chat.parse import parse
from dist_lm.chat.schema import check_tool
from dist_lm.chat.template import answer_tokens, prompt
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.tokenizer.tokenizer import Tokenizer

# Conversations of these kinds give one question; all others give one for every decision.
FIRST = ("single", "parallel", "hub")  # the first decision: no earlier call shows how to use the tool
LAST = ("recovery", "answer")  # the last one, which the kind is about (the call after an error, the answer without one)
OWN = "tools_"  # the prefix of the corpus's language names; the rest of a name is the kind


@dataclass(frozen=True)
class Question:
    """A turn that the assistant has to write."""

    kind: str  # of the conversation: single, parallel, ...
    asked: Conversation  # the messages before the turn
    expected: Message


@dataclass(frozen=True)
class Asked:
    """A question as token ids."""

    question: Question
    prompt: list[int]
    expected: list[int]  # the expected turn, with the mark that ends it
    document: int = 0  # of the corpus

    @property
    def place(self) -> int:
        """The turn's number in its conversation."""
        return len(self.question.asked.messages)


def questions_of(conversation: Conversation, kind: str) -> list[Question]:
    """The questions of one conversation; none if it has no tools or its calls cannot be checked."""
    if not conversation.tools or not _can_be_checked(conversation):
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


def choose(
    corpus: TokenCorpus, tokenizer: Tokenizer, per_kind: int, context: int, written: Tokenizer | None = None
) -> list[Asked]:
    """The first `per_kind` questions of each kind in a corpus, sorted by kind; every call returns the same ones.

    Args:
        tokenizer: of the model that is asked.
        context: the model's maximum sequence length; a question is skipped if prompt and expected turn exceed it.
        written: the tokenizer that the corpus was written with; None: the model's.
    """
    chosen: dict[str, list[Asked]] = {}
    kinds = [name.removeprefix(OWN) for name in corpus.languages]
    for document, code in enumerate(corpus.language_codes.tolist()):
        kept = chosen.setdefault(kinds[code], [])
        if len(kept) < per_kind:
            tokens = corpus.tokens(document, 0, int(corpus.lengths[document]))
            found = questions_of(parse(tokens.tolist(), written or tokenizer), kinds[code])
            kept += [one for one in asked(found, tokenizer, document) if len(one.prompt) + len(one.expected) <= context]
    return [one for _, kept in sorted(chosen.items()) for one in kept[:per_kind]]


def asked(questions: Iterable[Question], tokenizer: Tokenizer, document: int = 0) -> list[Asked]:
    """Tokenize questions of a document."""
    return [
        Asked(
            question,
            prompt(question.asked, tokenizer),
            answer_tokens(question.expected, tokenizer, question.asked),
            document,
        )
        for question in questions
    ]


def _can_be_checked(conversation: Conversation) -> bool:
    try:
        for tool in conversation.tools:
            check_tool(tool)
    except ChatError:
        return False
    return True
