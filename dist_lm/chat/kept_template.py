"""The layout of conversations by the chat template of an imported model, where it differs from ours (`chat.template`).

The template is Jinja in a sandbox, with the functions that transformers gives it. Special tokens are those that the
template itself writes. A text of the conversation that spells one is split by a private character before it is
rendered, and joined again after the special tokens are found, so no text becomes a mark. The text between two special
tokens is encoded as one segment, as transformers does.

Answers are found by rendering beginnings: the conversation up to a turn of the assistant, with the opening of that
turn, must be the beginning of the whole text. A template that rewrites earlier turns is refused.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from dist_lm.chat.jinja_text import PROBE, PROBE_CALL, WAY_OUT, check_probes, messages_of, rendered, tools_of
from dist_lm.chat.messages import ChatError, Conversation, Message, check_conversation, turn_name
from dist_lm.errors import UserError
from dist_lm.tokenizer.tokenizer import KeptTemplate, Tokenizer

FIRST_PRIVATE, LAST_PRIVATE = 0xE000, 0xF8FF  # of Unicode's private use area
NONCHARACTER = "\ufdd0"  # of Unicode: never in texts that programs exchange
QUESTION = Conversation((Message("user", "probe"),))


@dataclass(frozen=True)
class Laid:
    """A conversation in tokens, and where the assistant writes."""

    tokens: np.ndarray  # (n,) of the tokenizer's dtype
    loss_mask: np.ndarray  # (n,) uint8: 1 from the beginning of an answer to the special token that ends it


@dataclass(frozen=True)
class _Piece:
    """A special token, or the text between two of them."""

    text: str
    begin: int  # in the rendered text
    token: int | None  # of a special token

    @property
    def end(self) -> int:
        return self.begin + len(self.text)


def render(conversation: Conversation, tokenizer: Tokenizer) -> Laid:
    """The tokens of `conversation`, with every turn closed.

    Raises:
        ChatError: it is not well formed, the template refuses it, leaves a text of it out, or rewrites earlier turns;
            the message names the turn.
    """
    page = _Page(conversation, tokenizer)
    whole = page.text(conversation.messages)
    page.check_shown(whole)
    pieces = page.pieces(whole)
    tokens, begins = list[int](), list[int]()  # begins: index of the first token of each piece
    for piece in pieces:
        begins.append(len(tokens))
        tokens += page.encoded([piece])
    mask = np.zeros(len(tokens), np.uint8)
    for number, message in enumerate(conversation.messages):
        if message.role == "assistant":
            start = len(page.beginning(whole, number))
            if start == len(whole):
                raise _not_shown(number, message)
            first, last = _answer_tokens(page, pieces, begins, start)
            mask[first:last] = 1
    return Laid(np.array(tokens, tokenizer.dtype), mask)


def prompt(conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
    """The tokens that a model continues. The caller makes sure that the assistant is next."""
    page = _Page(conversation, tokenizer)
    opened = page.text(conversation.messages, opening=True)
    page.check_shown(opened)
    return page.encoded(page.pieces(opened))


def answer_tokens(asked: Conversation, message: Message, tokenizer: Tokenizer) -> list[int]:
    """What the assistant writes after `prompt(asked)`, up to and including the special token that ends the turn."""
    answered = replace(asked, messages=(*asked.messages, message))
    page = _Page(answered, tokenizer)
    whole = page.text(answered.messages)
    start = len(page.beginning(whole, len(asked.messages)))
    pieces = page.pieces(whole[start:])
    ends = stop_tokens(tokenizer)
    last = next((place for place, piece in enumerate(pieces) if piece.token in ends), len(pieces) - 1)
    return page.encoded(pieces[: last + 1])


@lru_cache(maxsize=8)
def _ends(kept: KeptTemplate, names: tuple[tuple[str, int], ...]) -> tuple[int, ...]:
    """The special tokens that end a turn of the assistant: those behind two answers of a probe."""
    answers = ("probe_first", "probe_last")
    turns = [Message(role, text) for text in answers for role in ("user", "assistant")]
    whole = rendered(kept, messages_of(turns), None, False)
    found = []
    for text in answers:
        at = whole.rfind(text)
        pieces = _split(whole[at + len(text) :], names) if at >= 0 else []
        found += [piece.token for piece in pieces if piece.token is not None][:1]
    return tuple(dict.fromkeys(found))


def turn_ends(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The special tokens that end a turn of the assistant; none if the template cannot say."""
    try:
        return _ends(_kept(tokenizer), _names(tokenizer))
    except ChatError:
        return ()  # it renders no plain conversation: every use of it says why


def stop_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The special tokens that end a turn of the assistant.

    Raises:
        ChatError: the template ends no turn with one.
    """
    kept = _kept(tokenizer)
    if not (found := _ends(kept, _names(tokenizer))):
        raise ChatError(f"the chat template of the model ends turns without a special token: {WAY_OUT}")
    return found


def writes_hermes_calls(tokenizer: Tokenizer) -> bool:
    """Whether calls of the template are those of Hermes, `<tool_call>` with JSON, which `chat.parse` reads."""
    from dist_lm.chat.parse import parse_turn

    asked = Conversation((Message("user", "probe"),), (PROBE,))
    try:
        written = answer_tokens(asked, Message("assistant", calls=(PROBE_CALL,)), tokenizer)
        return parse_turn(written, tokenizer).calls == (PROBE_CALL,)
    except ChatError:
        return False


def require_hermes_calls(tokenizer: Tokenizer) -> None:
    """Refuse a template whose calls cannot be read.

    Raises:
        UserError: names the way out.
    """
    if not writes_hermes_calls(tokenizer):
        raise UserError(
            f"--tools: the chat template of the model shows no calls in the form <tool_call>JSON</tool_call>, so they "
            f"cannot be read: {WAY_OUT}, and stage=tools teaches calls"
        )


class Splitter:
    """Reads special tokens in rendered texts, and guards texts of turns that spell one."""

    def __init__(self, tokenizer: Tokenizer, private: str = NONCHARACTER) -> None:
        """`private`: a character that no text holds."""
        self._tokenizer, self._private = tokenizer, private
        self._names = _names(tokenizer)
        self._spelled = re.compile("|".join(re.escape(name) for name, _ in self._names) or "(?!)")

    def guarded(self, text: str) -> str:
        """`text` with every name of a special token split by the private character."""
        private = self._private
        text = self._spelled.sub(lambda found: found[0][0] + private + found[0][1:], text)
        names = [name for name, _ in self._names]
        if any(text.startswith(name[cut:]) for name in names for cut in range(1, len(name))):
            text = private + text  # its beginning could be the end of a name
        if any(text.endswith(name[:cut]) for name in names for cut in range(1, len(name))):
            text += private
        return text

    def pieces(self, text: str) -> list[_Piece]:
        """The special tokens of a rendered text, and the texts between them."""
        return _split(text, self._names)

    def tokens(self, text: str) -> list[int]:
        """The tokens of a rendered text."""
        return self.encoded(self.pieces(text))

    def encoded(self, pieces: Sequence[_Piece]) -> list[int]:
        """The tokens of pieces."""
        tokens = list[int]()
        for piece in pieces:
            tokens += [piece.token] if piece.token is not None else self.encoded_text(piece.text)
        return tokens

    def encoded_text(self, text: str) -> list[int]:
        """The tokens of a text without special tokens."""
        return self._tokenizer.encode(text.replace(self._private, ""))


class _Page:
    """Renders one conversation and its beginnings, with its texts guarded."""

    def __init__(self, conversation: Conversation, tokenizer: Tokenizer) -> None:
        """Raises ChatError: the conversation is not well formed, or the template leaves out what it holds."""
        check_conversation(conversation)
        self._kept = _kept(tokenizer)
        self._tokenizer = tokenizer
        self._conversation = conversation
        check_probes(self._kept, conversation)
        everything = json.dumps([messages_of(conversation.messages), tools_of(conversation.tools)], ensure_ascii=False)
        characters = {*everything, *self._kept.text}
        private = next(chr(n) for n in range(FIRST_PRIVATE, LAST_PRIVATE) if chr(n) not in characters)
        self._texts = Splitter(tokenizer, private)

    def text(self, messages: Sequence[Message], opening: bool = False) -> str:
        """The rendered text of the first turns, with guarded texts. `opening`: begin the assistant's turn."""
        tools = self._guarded(tools_of(self._conversation.tools))
        return rendered(self._kept, self._guarded(messages_of(messages)), tools, opening)

    def beginning(self, whole: str, number: int) -> str:
        """The text before answer `number`, up to where a model goes on.

        Raises:
            ChatError: `whole` begins otherwise.
        """
        messages = self._conversation.messages
        before = self.text(messages[:number], opening=True)
        if not whole.startswith(before):
            raise ChatError(
                f"{turn_name(number, messages[number])}: the chat template of the model writes the turns before it "
                f"otherwise when others follow, so its loss cannot be told apart: {WAY_OUT}"
            )
        return before

    def check_shown(self, whole: str) -> None:
        """Refuse a template that leaves out the text of a turn of the system or the user."""
        for number, message in enumerate(self._conversation.messages):
            guarded = self._guarded(message.content)
            if message.role in ("system", "user") and guarded.strip() not in whole:
                raise _not_shown(number, message)

    def pieces(self, text: str) -> list[_Piece]:
        """The special tokens of a rendered text, and the texts between them."""
        return self._texts.pieces(text)

    def encoded(self, pieces: Sequence[_Piece]) -> list[int]:
        """The tokens of pieces."""
        return self._texts.encoded(pieces)

    def encoded_text(self, text: str) -> list[int]:
        """The tokens of a text without special tokens."""
        return self._texts.encoded_text(text)

    def _guarded(self, value: Any) -> Any:
        """`value` with every name of a special token in its texts split by the private character."""
        if isinstance(value, str):
            return self._texts.guarded(value)
        if isinstance(value, dict):
            fixed = ("role", "type", "id", "tool_call_id")
            return {
                key if key in fixed else self._guarded(key): part if key in fixed else self._guarded(part)
                for key, part in value.items()
            }
        return [self._guarded(part) for part in value] if isinstance(value, list) else value


def _not_shown(number: int, message: Message) -> ChatError:
    where = turn_name(number, message)
    return ChatError(f"{where}: the chat template of the model does not show its text: {WAY_OUT}")


def _answer_tokens(page: _Page, pieces: Sequence[_Piece], begins: Sequence[int], start: int) -> tuple[int, int]:
    """(first, last + 1) of the tokens of the answer at character `start`, with the special token that ends it.

    A token that reaches over `start` belongs to the answer: the tokens before it are those that the opening has alone.
    """
    ends = stop_tokens(page._tokenizer)
    at = next(place for place, piece in enumerate(pieces) if piece.end > start)
    first = begins[at]
    if pieces[at].begin < start:
        whole = page.encoded_text(pieces[at].text)
        opening = page.encoded_text(pieces[at].text[: start - pieces[at].begin])
        first += next((n for n, (a, b) in enumerate(zip(whole, opening, strict=False)) if a != b), len(opening))
    last = next((place for place in range(at, len(pieces)) if pieces[place].token in ends), len(pieces) - 1)
    return first, begins[last] + 1


def _names(tokenizer: Tokenizer) -> tuple[tuple[str, int], ...]:
    """The special tokens by the names they have in the tokenizer's file, the longest first."""
    return tuple(sorted(tokenizer.file_names.items(), key=lambda entry: (-len(entry[0]), entry)))


def _kept(tokenizer: Tokenizer) -> KeptTemplate:
    assert tokenizer.kept_template is not None
    return tokenizer.kept_template


def _split(text: str, names: tuple[tuple[str, int], ...]) -> list[_Piece]:
    ids, pieces, begin = dict(names), list[_Piece](), 0
    for found in re.finditer("|".join(re.escape(name) for name, _ in names) or "(?!)", text):
        if found.start() > begin:
            pieces.append(_Piece(text[begin : found.start()], begin, None))
        pieces.append(_Piece(found[0], found.start(), ids[found[0]]))
        begin = found.end()
    return [*pieces, _Piece(text[begin:], begin, None)] if begin < len(text) else pieces


def without_end(ids: Iterable[int], tokenizer: Tokenizer) -> list[int]:
    """The tokens of an answer without the special token that ends it."""
    found, ends = list(ids), stop_tokens(tokenizer)
    return found[:-1] if found and found[-1] in ends else found
