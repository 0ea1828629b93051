"""Selects questions about tool use: turns of held-out conversations in which the assistant decides what to call.

A turn is asked if it contains calls or answers the user. A turn that puts tool results into words is not asked, because
many wordings are correct.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass

from dist_lm.chat.messages import ChatError, Conversation, Message
from dist_lm.chat.parse import parse
from dist_lm.chat.schema import check_tool
from dist_lm.chat.template import answer_tokens, prompt
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tracking.readable import counted

# Conversations of these kinds give one question; all others give one for every decision.
FIRST = ("single", "parallel", "hub")  # first decision: no earlier call shows how to use the tool
LAST = ("recovery", "answer")  # last decision, which the kind is about: the call after an error, the answer without one
OWN = "tools_"  # prefix of the corpus's language names; the rest of a name is the kind


@dataclass(frozen=True)
class Question:
    """A turn that the assistant has to write."""

    kind: str  # kind of the conversation: single, parallel, ...
    asked: Conversation  # the messages before the turn
    expected: Message


@dataclass(frozen=True)
class Asked:
    """A question as token ids."""

    question: Question
    prompt: list[int]
    expected: list[int]  # the expected turn, with the mark that ends it
    document: int = 0  # index in the corpus

    @property
    def place(self) -> int:
        """Index of the turn in its conversation."""
        return len(self.question.asked.messages)


def questions_of(conversation: Conversation, kind: str) -> list[Question]:
    """Returns the questions of one conversation; none if it has no tools or its calls cannot be checked.

    Which decisions are asked depends on `kind`, see FIRST and LAST.
    """
    if not conversation.tools or not _can_be_checked(conversation):
        return []

    messages = conversation.messages
    decisions = [
        index
        for index, message in enumerate(messages)
        if message.role == "assistant" and (message.calls or messages[index - 1].role == "user")
    ]
    if kind in FIRST:
        decisions = decisions[:1]
    elif kind in LAST:
        decisions = decisions[-1:]

    # A call of a tool that is not offered cannot be expected.
    names = {tool.name for tool in conversation.tools}
    return [
        Question(kind, Conversation(messages[:index], conversation.tools), messages[index])
        for index in decisions
        if all(call.name in names for call in messages[index].calls)
    ]


def choose(
    corpus: TokenCorpus, tokenizer: Tokenizer, per_kind: int, context: int, written: Tokenizer | None = None
) -> list[Asked]:
    """Returns the first `per_kind` questions of each kind in a corpus, sorted by kind; every call returns the same.

    Args:
        tokenizer: tokenizer of the model that is asked.
        context: the model's maximum sequence length; a question is skipped if prompt and expected turn exceed it.
        written: the tokenizer that the corpus was written with; None: the model's.

    Raises:
        ChatError: a document cannot be read back as a conversation, or the model's template refuses one.
        UserError: the tokenizer lacks the marks of a conversation.
        ArtefactError: a tar of the corpus is damaged.
    """
    questions_by_kind: dict[str, list[Asked]] = {}
    kinds = [name.removeprefix(OWN) for name in corpus.languages]
    for document, code in enumerate(corpus.language_codes.tolist()):
        questions = questions_by_kind.setdefault(kinds[code], [])
        if len(questions) >= per_kind:
            continue

        # The shards hold no conversations but their tokens.
        tokens = corpus.tokens(document, 0, int(corpus.lengths[document]))
        conversation = parse(tokens.tolist(), written or tokenizer)
        for question in asked(questions_of(conversation, kinds[code]), tokenizer, document):
            if len(question.prompt) + len(question.expected) <= context:
                questions.append(question)
    return [question for _, questions in sorted(questions_by_kind.items()) for question in questions[:per_kind]]


def no_questions(corpus: TokenCorpus, tokenizer: Tokenizer, context: int, written: Tokenizer | None = None) -> str:
    """Returns why `choose` finds no question in a corpus, with the way out; the arguments and errors are its own.

    Reads the whole split.
    """
    size = counted(corpus.n_documents, "conversation")
    if choose(corpus, tokenizer, per_kind=1, context=sys.maxsize, written=written):
        return (
            f"{corpus.directory}: {corpus.split} has no question that fits the model's context of {context} tokens "
            f"({size}): raise model.max_seq_len, or give shorter conversations"
        )
    return (
        f"{corpus.directory}: {corpus.split} has no question ({size}, none with tools): raise corpus.val_fraction, or "
        "give conversations with tools"
    )


def asked(questions: Iterable[Question], tokenizer: Tokenizer, document: int = 0) -> list[Asked]:
    """Returns questions of a document with this index as token ids: prompt and expected turn, in the model's template.

    Raises:
        ChatError: the template refuses a conversation.
        UserError: the tokenizer lacks its marks.
    """
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
