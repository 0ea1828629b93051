"""Turns of the assistant as clients see them: the text and the calls of an answer, whole or while it grows."""

from dataclasses import dataclass

from dist_lm.chat.messages import Call, ChatError, Message
from dist_lm.chat.parse import parse_turn
from dist_lm.chat.template import stop_tokens
from dist_lm.generation.request import Answer
from dist_lm.server.job import Job
from dist_lm.tokenizer.symbols import CALL
from dist_lm.tokenizer.tokenizer import Tokenizer

FINISHES = {"eot": "stop", "stop": "stop", "length": "length", "context": "length", "cancelled": "stop"}


@dataclass
class Turn:
    """One answer for a client: its text, or its calls."""

    content: str
    calls: tuple[Call, ...] = ()
    finish: str = "stop"


def turn_of(answer: Answer, job: Job) -> Turn:
    """Returns the text and the calls of an answer; of a turn that was cut off inside a call, the text before calls.

    Raises:
        UserError: the tokenizer lacks the mark that ends a turn, see `stop_tokens`.
    """
    tokenizer = job.served.tokenizer
    finish = FINISHES[answer.finish]
    if not job.reads_calls:
        return Turn(answer.text, finish=finish)

    tokens = list(answer.tokens)
    if answer.finish in ("eot", "stop") and tokens[-1] in (tokenizer.eot_id, *stop_tokens(tokenizer)):
        tokens.pop()
    try:
        message = parse_turn(tokens, tokenizer)
    except ChatError:  # cut off inside a call, or by a stop text
        return Turn(_text_before_calls(answer, tokenizer), finish=finish)
    if message.calls and finish == "stop":
        finish = "tool_calls"
    return Turn(message.content, message.calls, finish)


def remember(answer: Answer, job: Job) -> None:
    """Remembers the ids of an answer to a chat, so that the conversation can go on with them.

    Not those of an answer whose text is not all that the model wrote: one that a stop text cut, or a broken call.

    Raises:
        UserError: the tokenizer lacks the mark that ends a turn, see `stop_tokens`.
    """
    if not job.conversation:
        return
    tokenizer, tokens = job.served.tokenizer, list(answer.tokens)
    ends = (tokenizer.eot_id, *stop_tokens(tokenizer))
    if answer.finish not in ("length", "context") and tokens[-1] not in ends:
        return

    turn = turn_of(answer, job)
    message = Message("assistant", turn.content, turn.calls)
    written = tokens[:-1] if tokens[-1] in ends else tokens
    try:
        is_whole = parse_turn(written, tokenizer) == message
    except ChatError:
        return
    if is_whole:
        (request,) = job.requests
        ids = [*request.prompt, *tokens]
        job.served.conversations.remember(job.conversation, message, ids, job.client)


def _text_before_calls(answer: Answer, tokenizer: Tokenizer) -> str:
    """Returns the text of a turn up to its first call, without the line break before that; the whole text if there is
    no call. Broken UTF-8 before a call is replaced.
    """
    call_id = tokenizer.special_ids.get(CALL)
    if call_id is None:
        before, mark, _ = answer.text.partition(CALL)
        return before.removesuffix("\n") if mark else before
    if call_id not in answer.tokens:
        return answer.text
    content = tokenizer.content(answer.tokens[: answer.tokens.index(call_id)])
    return content.decode(errors="replace").removesuffix("\n")


class VisibleText:
    """The text of a turn that a client sees while it grows: nothing from the first call on, nor the line break before
    that."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._call_id = tokenizer.special_ids.get(CALL)
        self._held = ""
        self._has_called = False

    def add(self, token: int, text: str) -> str:
        """Returns what can be shown after one more token, with which `text` became final."""
        if self._has_called:
            return ""
        self._held += text
        if self._call_id is None:
            self._has_called = CALL in self._held
            before = self._held.partition(CALL)[0]
        else:
            # The mark has no text, so what became final with it stands before it.
            self._has_called = token == self._call_id
            before = self._held
        if self._has_called:
            self._held = ""
            return before.removesuffix("\n")

        # The end of the text may turn out to belong to a call, so it waits for the next token.
        end = len(self._held) - self._n_kept()
        shown, self._held = self._held[:end], self._held[end:]
        return shown

    def end(self) -> str:
        """Returns the rest of the text; the turn is complete."""
        rest, self._held = self._held, ""
        return rest

    def _n_kept(self) -> int:
        """Returns the number of characters at the end that may belong to a call."""
        # A special token has no text, so only the line break before it may belong to the call.
        mark = "\n" if self._call_id is not None else f"\n{CALL}"
        beginnings = [mark[begin:end] for begin in (0, 1) for end in range(begin + 1, len(mark) + 1)]
        return max((len(beginning) for beginning in beginnings if self._held.endswith(beginning)), default=0)
