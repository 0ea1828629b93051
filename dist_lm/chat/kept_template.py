"""Lays conversations out by the chat template of an imported model, where it differs from ours (`chat.template`).

The template is Jinja in a process with limits, with the functions that transformers gives it. Special tokens are those
that the template itself writes. A text of the conversation that spells one is split by a private character before it is
rendered, and joined again after the special tokens are found, so no text becomes a mark. The text between two special
tokens is encoded as one segment, as transformers does.

Answers are found by rendering beginnings: the conversation up to a turn of the assistant, with the opening of that
turn, must be the beginning of the whole text. A template that rewrites earlier turns is refused. One that drops the
thinking of earlier answers gets a sample for each answer (`chat.documents.samples`).
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from dist_lm.chat.jinja_text import (
    WAY_OUT,
    TemplateLimitError,
    check_probes,
    messages_of,
    rendered,
    rendered_page,
    shown_thinking,
    tools_of,
    with_thinking_in_text,
)
from dist_lm.chat.messages import (
    END_THINKING,
    ChatError,
    Conversation,
    Message,
    check_conversation,
    later_system_turn,
    turn_name,
)
from dist_lm.tokenizer.tokenizer import KeptTemplate, Tokenizer

FIRST_PRIVATE, LAST_PRIVATE = 0xE000, 0xF8FF  # Unicode's private use area
NONCHARACTER = "\ufdd0"  # a noncharacter of Unicode: never in texts that programs exchange
CLOSING = re.compile(rf"\s*{re.escape(END_THINKING)}\s*")
PROBE = Conversation((Message("user", "probe"),))


@dataclass(frozen=True)
class _Part:
    """A special token, or the text between two of them."""

    text: str
    begin: int  # character in the rendered text
    token: int | None  # id of a special token; None: text

    @property
    def end(self) -> int:
        return self.begin + len(self.text)


def render(conversation: Conversation, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Returns (tokens, loss mask) of `conversation`, with every turn closed.

    Tokens are (n,) of the tokenizer's dtype. The loss mask, (n,) uint8, is 1 from the beginning of a learned answer to
    the special token that ends it, that token included; 0 in thinking that is not learned. The turns before each answer
    are rendered again, so the time grows with the square of their number.

    Args:
        tokenizer: one with a `kept_template`.

    Raises:
        ChatError: the conversation is not well formed, or the template refuses it, leaves out a text, tools or calls,
            rewrites earlier turns, or ends turns without a special token; the message names the turn or the reason.
    """
    page = _Page(conversation, tokenizer)
    messages = conversation.messages
    answers = [number for number, message in enumerate(messages) if message.role == "assistant" and message.learn]
    with _later_system_named(conversation, tokenizer):
        text, starts = page.text_and_starts(answers)
        page.check_shows_texts(text)

    # Parts are encoded one by one, so that the first token of each is known.
    parts = page.splitter.parts(text)
    tokens: list[int] = []
    begins: list[int] = []  # index of the first token of each part
    for part in parts:
        begins.append(len(tokens))
        tokens += page.splitter.encoded([part])

    loss_mask = np.zeros(len(tokens), np.uint8)
    for number, start in zip(answers, starts, strict=True):
        if start == len(text):
            raise _not_shown(number, messages[number])
        last_part = _last_part(page, parts, start)
        first, end = _first_token(page, parts, begins, start), begins[last_part] + 1
        # An answer without its thinking would teach the model to answer at once.
        if messages[number].thinking:
            end_of_thinking = page.end_of_thinking(text, number, start, parts[last_part].end)
            if not messages[number].learn_thinking:
                first = min(end, _first_token(page, parts, begins, end_of_thinking))
        loss_mask[first:end] = 1
    return np.array(tokens, tokenizer.dtype), loss_mask


def prompt(conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
    """Returns the token ids that a model continues. The caller makes sure that the assistant is next.

    Raises:
        ChatError: the conversation is not well formed, or the template refuses it or leaves out a text, tools or calls.
    """
    page = _Page(conversation, tokenizer)
    with _later_system_named(conversation, tokenizer):
        text = page.text_with_opening()
        page.check_shows_texts(text)
    return page.splitter.tokens(text)


def answer_tokens(conversation: Conversation, message: Message, tokenizer: Tokenizer) -> list[int]:
    """Returns the ids that the assistant writes after `prompt`, with the special token that ends the turn.

    Args:
        conversation: the conversation before the answer; the assistant is next.
        message: the answer.

    Raises:
        ChatError: the conversation is not well formed, or the template refuses it, leaves out tools or calls, rewrites
            earlier turns, or ends turns without a special token.
    """
    answered = replace(conversation, messages=(*conversation.messages, message))
    page = _Page(answered, tokenizer)
    text, (start,) = page.text_and_starts([len(conversation.messages)])

    # Behind the special token that ends the turn, a template may write more, such as a line break.
    parts = page.splitter.parts(text[start:])
    ends = stop_tokens(tokenizer)
    last = next((index for index, part in enumerate(parts) if part.token in ends), len(parts) - 1)
    return page.splitter.encoded(parts[: last + 1])


def following(answered: Conversation, conversation: Conversation, tokenizer: Tokenizer) -> list[int] | None:
    """Returns the end of the `prompt` of `conversation`: the ids behind the special token that ends the last turn of
    `answered`, with which it begins.

    None where the template writes the turns of `answered` otherwise now, such as without their thinking: ids of these
    turns are then no beginning of the prompt.

    Raises:
        ChatError: as `prompt`.
    """
    page = _Page(conversation, tokenizer)
    with _later_system_named(conversation, tokenizer):
        text = page.text_with_opening()
        page.check_shows_texts(text)
        n_turns = len(answered.messages)
        text_before = page.text_of_first(n_turns)
        prompt_before = page.text_of_first(n_turns - 1, opening=True)

    # The answer ends at its special token; what stands behind that may change when a turn follows.
    ends = stop_tokens(tokenizer)
    parts = page.splitter.parts(text_before)
    end = next((part.end for part in parts if part.end > len(prompt_before) and part.token in ends), None)
    if end is None or not text_before.startswith(prompt_before) or not text.startswith(text_before[:end]):
        return None
    return page.splitter.tokens(text[end:])


@lru_cache(maxsize=8)
def _ends(template: KeptTemplate, names: tuple[tuple[str, int], ...]) -> tuple[int, ...]:
    """Returns the ids of the special tokens that end a turn of the assistant: those behind two answers of a probe.

    It is empty if no special token stands there; without doubles otherwise. Cached.

    Args:
        names: (name, id) of the special tokens.

    Raises:
        ChatError: the template refuses the probe.
    """
    # Some templates end the last turn otherwise than earlier ones.
    answers = ("probe_first", "probe_last")
    turns = [Message(role, text) for text in answers for role in ("user", "assistant")]
    text = rendered(template, messages_of(turns), None, False)

    ends = []
    for answer in answers:
        _, is_shown, after = text.rpartition(answer)
        if is_shown:
            ends += [part.token for part in _split(after, names) if part.token is not None][:1]
    return tuple(dict.fromkeys(ends))


def keeps_thinking(tokenizer: Tokenizer) -> bool:
    """Returns whether the template shows the thinking of earlier answers when others follow; the tokenizer has one.

    Raises:
        ChatError: the template exceeds a limit.
    """
    return shown_thinking(_kept(tokenizer))[2]


def turn_ends(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the special tokens that end a turn of the assistant; none if the template cannot say."""
    try:
        return _ends(_kept(tokenizer), _names(tokenizer))
    except ChatError:
        return ()  # the template renders no plain conversation: every use of it says why


def stop_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the special tokens that end a turn of the assistant.

    Raises:
        ChatError: the template ends turns without a special token, or refuses a plain conversation; names the way out.
    """
    ends = _ends(_kept(tokenizer), _names(tokenizer))
    if not ends:
        raise ChatError(f"the chat template of the model ends turns without a special token: {WAY_OUT}")
    return ends


class Splitter:
    """Reads special tokens in rendered texts, and guards texts of turns that spell one."""

    def __init__(self, tokenizer: Tokenizer, private: str = NONCHARACTER) -> None:
        """`private` is a character that no text holds."""
        self._tokenizer = tokenizer
        self._private = private
        self._names = _names(tokenizer)
        self._spelled_name = re.compile("|".join(re.escape(name) for name, _ in self._names) or "(?!)")

    def guarded(self, text: str) -> str:
        """Returns `text` with every name of a special token split by the private character, which `encoded_text` takes
        out.

        At a beginning or end that could complete a name with the text beside it, the character is added too. A text
        without names stays as it is.
        """
        private = self._private
        text = self._spelled_name.sub(lambda match: match[0][0] + private + match[0][1:], text)

        # The text of the template before or behind this text could complete a name.
        names = [name for name, _ in self._names]
        if any(text.startswith(name[cut:]) for name in names for cut in range(1, len(name))):
            text = private + text
        if any(text.endswith(name[:cut]) for name in names for cut in range(1, len(name))):
            text += private
        return text

    def parts(self, text: str) -> list[_Part]:
        """Returns the special tokens of a rendered text, and the texts between them."""
        return _split(text, self._names)

    def tokens(self, text: str) -> list[int]:
        """Returns the token ids of a rendered text."""
        return self.encoded(self.parts(text))

    def encoded(self, parts: Sequence[_Part]) -> list[int]:
        """Returns the token ids of parts."""
        tokens: list[int] = []
        for part in parts:
            if part.token is None:
                tokens += self.encoded_text(part.text)
            else:
                tokens.append(part.token)
        return tokens

    def encoded_text(self, text: str) -> list[int]:
        """Returns the token ids of a text without special tokens."""
        return self._tokenizer.encode(text.replace(self._private, ""))


class _Page:
    """Renders one conversation and its beginnings, with its texts guarded."""

    def __init__(self, conversation: Conversation, tokenizer: Tokenizer) -> None:
        """Raises ChatError if the conversation is not well formed, or if the template leaves out tools or calls."""
        check_conversation(conversation)
        self._kept = _kept(tokenizer)
        self._tokenizer = tokenizer
        self._conversation = conversation
        check_probes(self._kept, conversation)
        has_thinking = any(message.thinking for message in conversation.messages)
        self._thinks_in_text = has_thinking and shown_thinking(self._kept)[1]

        # The private character is removed again before encoding, so no text may hold it.
        all_texts = json.dumps([messages_of(conversation.messages), tools_of(conversation.tools)], ensure_ascii=False)
        characters = {*all_texts, *self._kept.text}
        private = next(chr(code) for code in range(FIRST_PRIVATE, LAST_PRIVATE) if chr(code) not in characters)
        self.splitter = Splitter(tokenizer, private)

    def text_with_opening(self) -> str:
        """Returns the rendered text of all turns, with guarded texts, and the opening that a model continues."""
        return rendered(self._kept, self._guarded_messages(), self._guarded(tools_of(self._conversation.tools)), True)

    def text_of_first(self, n_turns: int, opening: bool = False) -> str:
        """Returns the rendered text of the first turns alone, with guarded texts.

        Args:
            opening: whether the opening that a model continues follows.

        Raises:
            ChatError: the template refuses the conversation or fails.
        """
        # A turn of results becomes several messages.
        count = len(messages_of(self._conversation.messages[:n_turns]))
        messages = self._guarded_messages()[:count]
        return rendered(self._kept, messages, self._guarded(tools_of(self._conversation.tools)), opening)

    def text_and_starts(self, answers: Sequence[int]) -> tuple[str, list[int]]:
        """Returns the rendered text of all turns, with guarded texts, and the character at which each answer starts:
        behind the text of the turns before, with the opening that a model continues.

        Args:
            answers: indices of turns of the assistant.

        Raises:
            ChatError: the text does not begin with that of the turns before an answer, or the template refuses them.
        """
        turns = self._conversation.messages
        # A turn of results becomes several messages.
        counts = [len(messages_of(turns[:number])) for number in answers]
        text, starts = rendered_page(
            *(self._kept, self._guarded_messages(), self._guarded(tools_of(self._conversation.tools))),
            *(False, counts),
        )
        for number, start in zip(answers, starts, strict=True):
            if start is None:
                raise ChatError(
                    f"{turn_name(number, turns[number])}: the chat template of the model writes the turns before it "
                    f"otherwise when others follow, so its loss cannot be told apart: {WAY_OUT}"
                )
        return text, [start for start in starts if start is not None]

    def check_shows_texts(self, text: str) -> None:
        """Refuses a template that leaves out the text of a turn of the system or the user.

        Raises:
            ChatError: names the first such turn.
        """
        for number, message in enumerate(self._conversation.messages):
            guarded = self._guarded(message.content)
            if message.role in ("system", "user") and guarded.strip() not in text:
                raise _not_shown(number, message)

    def end_of_thinking(self, text: str, number: int, start: int, stop: int) -> int:
        """Returns the character behind the thinking of an answer and its closing mark.

        Args:
            text: the rendered text of all turns.
            number: the index of the answer, which has thinking.
            start, stop: the first character of the answer, and that behind its end.

        Raises:
            ChatError: the template does not show the thinking there.
        """
        message = self._conversation.messages[number]
        thinking = self._guarded(message.thinking).strip()
        begin = text.find(thinking, start, stop)
        if begin < 0:
            raise ChatError(
                f"{turn_name(number, message)}: the chat template of the model does not show its thinking: "
                f"`thinking: drop` in the source reads it without, or {WAY_OUT}"
            )
        end = begin + len(thinking)
        closing = CLOSING.match(text, end)
        return closing.end() if closing else end

    def _guarded_messages(self) -> Any:
        """Returns the turns as the template takes them, with guarded texts."""
        messages = self._guarded(messages_of(self._conversation.messages))
        # The marks of thinking are the template's here, not those of a text, so they are added behind the guard.
        if self._thinks_in_text:
            return with_thinking_in_text(messages)
        return messages

    def _guarded(self, value: Any) -> Any:
        """Returns a copy of a JSON value with every name of a special token in its texts split by the private
        character.

        Keys of objects are split too. The values of role, type and ids stay. Values that are no text stay as they are.
        """
        if isinstance(value, str):
            return self.splitter.guarded(value)
        if isinstance(value, list):
            return [self._guarded(part) for part in value]
        if not isinstance(value, dict):
            return value

        # Templates compare these keys and values, which are ours and spell no special token.
        guarded = {}
        for key, part in value.items():
            if key in ("role", "type", "id", "tool_call_id"):
                guarded[key] = part
            else:
                guarded[self._guarded(key)] = self._guarded(part)
        return guarded


@contextmanager
def _later_system_named(conversation: Conversation, tokenizer: Tokenizer) -> Iterator[None]:
    """Names, in the error of a template, the turn of the system behind the first turn that the template refuses.

    Raises:
        ChatError: one that was raised inside; with the turn and the keys that help, if the template takes the
            conversation without such turns.
    """
    try:
        yield
    except TemplateLimitError:
        raise
    except ChatError as error:
        later = later_system_turn(conversation)
        if later is None:
            raise
        turns = [turn for number, turn in enumerate(conversation.messages) if not number or turn.role != "system"]
        try:
            rendered(_kept(tokenizer), messages_of(turns), tools_of(conversation.tools), False)
        except ChatError:
            raise error from None  # the template refuses the other turns, too

        raise ChatError(
            f"{error}. Without {turn_name(later, conversation.messages[later])}, which is not the first turn, it takes "
            "the conversation: in a source of reader messages, `later_system: user` writes the text of such turns into "
            "the next turn of the user, and `later_system: drop_row` leaves such rows out"
        ) from error


def _not_shown(number: int, message: Message) -> ChatError:
    where = turn_name(number, message)
    return ChatError(f"{where}: the chat template of the model does not show its text: {WAY_OUT}")


def _last_part(page: _Page, parts: Sequence[_Part], start: int) -> int:
    """Returns the index of the special token that ends the answer at character `start`; that of the last part if none
    follows that ends turns.

    Args:
        parts: those of the whole text.

    Raises:
        ChatError: the template ends turns without a special token.
    """
    ends = stop_tokens(page._tokenizer)
    rest = (index for index, part in enumerate(parts) if part.end > start)
    return next((index for index in rest if parts[index].token in ends), len(parts) - 1)


def _first_token(page: _Page, parts: Sequence[_Part], begins: Sequence[int], start: int) -> int:
    """Returns the index of the first token of what begins at character `start`, which is before the end of the text.

    A token that reaches over `start` belongs to it: the tokens before it are those that the text before has alone.

    Args:
        parts: those of the whole text.
        begins: index of the first token of each part.
    """
    index = next(index for index, part in enumerate(parts) if part.end > start)
    part, first = parts[index], begins[index]

    # The opening may end inside a text, as `assistant\n` does; the answer begins where the tokens differ from its own.
    if part.begin < start:
        part_ids = page.splitter.encoded_text(part.text)
        opening_ids = page.splitter.encoded_text(part.text[: start - part.begin])
        pairs = zip(part_ids, opening_ids, strict=False)
        first += next((index for index, (a, b) in enumerate(pairs) if a != b), len(opening_ids))
    return first


def _names(tokenizer: Tokenizer) -> tuple[tuple[str, int], ...]:
    """Returns the special tokens with the names that they have in the tokenizer's file, the longest name first."""
    return tuple(sorted(tokenizer.special_ids_in_file.items(), key=lambda named: (-len(named[0]), named)))


def _kept(tokenizer: Tokenizer) -> KeptTemplate:
    assert tokenizer.kept_template is not None
    return tokenizer.kept_template


def _split(text: str, names: tuple[tuple[str, int], ...]) -> list[_Part]:
    """Returns the special tokens of `text` as parts, and the texts between them, in their order; no part is empty.

    Args:
        names: (name, id) of the special tokens, the longest name first.
    """
    # A regular expression takes the first alternative that fits, so longer names must come first.
    ids = dict(names)
    parts: list[_Part] = []
    begin = 0
    for match in re.finditer("|".join(re.escape(name) for name, _ in names) or "(?!)", text):
        if match.start() > begin:
            parts.append(_Part(text[begin : match.start()], begin, None))
        parts.append(_Part(match[0], match.start(), ids[match[0]]))
        begin = match.end()
    if begin < len(text):
        parts.append(_Part(text[begin:], begin, None))
    return parts
