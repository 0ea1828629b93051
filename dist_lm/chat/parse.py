"""Tokens back to a conversation: `parse(render(x).tokens)` is x. The layout is that of `dist_lm.chat.template`.

White space around the JSON of calls and results, and between calls, is free; everything else must be as rendered.
A space that the tokenizer puts before every text (`Tokenizer.adds_space`) is no part of the conversation.
"""

import operator
import re
from collections.abc import Iterable
from typing import Any

from dist_lm.chat import json_text
from dist_lm.chat.messages import Call, ChatError, Conversation, Json, Message, Tool, check_conversation, check_message
from dist_lm.chat.template import INSTRUCTION, INTRODUCTION
from dist_lm.tokenizer.symbols import (
    CALL,
    END,
    END_CALL,
    END_OF_TEXT,
    END_RESPONSE,
    END_TOOLS,
    RESPONSE,
    START,
    TOOLS,
)
from dist_lm.tokenizer.tokenizer import Tokenizer


def parse(ids: Iterable[int], tokenizer: Tokenizer) -> Conversation:
    """The conversation that renders to `ids`, or to the same text in other tokens.

    Raises:
        ChatError: `ids` are not a conversation; the message names the token (from 0) or the turn, and what it expects.
    """
    if tokenizer.kept_template:
        raise ChatError("conversations in the chat template of an imported model cannot be read back from tokens")
    reader = _Reader(ids, tokenizer)
    messages: list[Message] = []
    tools: tuple[Tool, ...] = ()
    reader.expect(END_OF_TEXT)
    while not reader.at_end():
        reader.expect(START)
        at = reader.place
        role, line_end, text = reader.text().partition("\n")
        if not line_end or role not in ("system", "user", "assistant"):
            raise ChatError(f"{at}: expected system, user or assistant, and a line break")
        if role == "system":
            if messages or tools:
                raise ChatError(f"{at}: expected user or assistant; the system turn comes first")
            if reader.take(TOOLS):
                text, tools = _read_tools(reader, text, at)
            if text or not tools:
                messages.append(Message("system", text))
        elif role == "assistant":
            messages.append(_read_answer(reader, _given(text, tokenizer)))  # a text of its own behind the line break
        elif reader.next_is(RESPONSE):
            if text:
                raise ChatError(f"{at}: expected a text or results, found both")
            messages.append(_read_results(reader))
        else:
            messages.append(Message("user", text))
        reader.expect(END)
        reader.expect_text("\n", "a line break")
    conversation = Conversation(tuple(messages), tools)
    check_conversation(conversation)
    return conversation


def parse_turn(ids: Iterable[int], tokenizer: Tokenizer) -> Message:
    r"""What a model wrote after `<|im_start|>assistant\n`, with or without the final `<|im_end|>`.

    Raises:
        ChatError: it is not a turn; the message names the token (from 0) and what was expected.
    """
    if tokenizer.kept_template:  # its calls are read if they have our form; other forms are text
        from dist_lm.chat.kept_template import without_end

        ids = without_end(ids, tokenizer)
    reader = _Reader(ids, tokenizer)
    message = _read_answer(reader, reader.text())
    if not (reader.at_end() or tokenizer.kept_template):
        reader.expect(END)
    reader.expect_end()
    check_message(message, "the assistant's turn")
    return message


class _Reader:
    """A place in a list of marks and texts."""

    def __init__(self, ids: Iterable[Any], tokenizer: Tokenizer) -> None:
        """Raises ChatError: an id is not one of `tokenizer`, or tokens between marks are not UTF-8."""
        numbers = [_checked(number, at, tokenizer.vocab_size) for at, number in enumerate(ids)]
        self._parts: list[tuple[int, str, bool]] = []  # (first token, mark or text, whether it is a mark)
        marks = {number: name for name, number in tokenizer.special_ids.items()}
        spelled = re.compile("|".join(map(re.escape, tokenizer.lacking())) or "(?!)")  # these are plain text
        begin = 0
        for at, number in enumerate([*numbers, None]):
            if number is None or number in marks:
                text = _text(numbers, begin, at, tokenizer)
                found = 0
                for mark in spelled.finditer(text):
                    before = text[found : mark.start()]
                    before = before.removesuffix(" ") if tokenizer.adds_space else before  # that of the mark
                    self._add(begin, _given(before, tokenizer), mark.group())
                    found = mark.end()
                self._add(begin, _given(text[found:], tokenizer))
                if number is not None:
                    self._add(at, "", marks[number])
                begin = at + 1
        self._length = len(numbers)
        self._at = 0

    def _add(self, at: int, text: str, mark: str = "") -> None:
        """Append a text and the mark behind it, each unless it is empty."""
        self._parts += [(at, part, is_mark) for part, is_mark in ((text, False), (mark, True)) if part]

    @property
    def place(self) -> str:
        """The name of the next token in error messages."""
        return f"token {self._length if self.at_end() else self._parts[self._at][0]}"

    def at_end(self) -> bool:
        """Whether nothing is left."""
        return self._at == len(self._parts)

    def next_is(self, mark: str) -> bool:
        """Whether `mark` comes next."""
        return not self.at_end() and self._parts[self._at][1:] == (mark, True)

    def take(self, mark: str) -> bool:
        """Step over `mark` if it comes next."""
        found = self.next_is(mark)
        self._at += found
        return found

    def expect(self, mark: str) -> None:
        """Step over `mark`, which comes next."""
        if not self.take(mark):
            raise self._unexpected(mark)

    def expect_text(self, text: str, name: str) -> None:
        """Step over `text`, which comes next and reaches to a mark or the end."""
        at = self.place
        if self.text() != text:
            raise ChatError(f"{at}: expected {name}")

    def expect_end(self) -> None:
        """Refuse tokens that are left."""
        if not self.at_end():
            raise self._unexpected("nothing more")

    def text(self) -> str:
        """The text up to the next mark or the end; may be empty."""
        if self.at_end() or self._parts[self._at][2]:
            return ""
        self._at += 1
        return self._parts[self._at - 1][1]

    def skip_space(self, expected: str) -> None:
        """Step over white space; refuse other text before the next mark."""
        at = self.place
        if self.text().strip():
            raise ChatError(f"{at}: expected {expected}, found text")

    def json(self, closing: str) -> Json:
        """The JSON up to the mark `closing`, which is stepped over."""
        at = self.place
        text = self.text()
        self.expect(closing)
        return json_text.read(text, at)

    def _unexpected(self, expected: str) -> ChatError:
        _, text, is_mark = (0, "the end", True) if self.at_end() else self._parts[self._at]
        return ChatError(f"{self.place}: expected {expected}, found {text if is_mark else 'text'}")


def _read_tools(reader: _Reader, text: str, at: str) -> tuple[str, tuple[Tool, ...]]:
    """(text of the system, tools), from behind <tools> on; `text`: what stands before it."""
    before = text.removesuffix(INTRODUCTION)
    if before == text or (before and not before.endswith("\n\n")) or before == "\n\n":
        raise ChatError(f"{at}: expected the introduction of the tools before {TOOLS}")
    at = reader.place
    lines = reader.text()
    reader.expect(END_TOOLS)
    if len(lines) < 3 or lines[0] != "\n" or lines[-1] != "\n":
        raise ChatError(f"{at}: expected tools, each on a line of its own")
    tools = tuple(_tool_of(json_text.read(line, at), at) for line in lines[1:-1].split("\n"))
    reader.expect_text(INSTRUCTION, "the instruction how to call tools")
    return before.removesuffix("\n\n"), tools


def _tool_of(value: Json, at: str) -> Tool:
    if type(value) is dict and value.keys() == {"type", "function"} and value["type"] == "function":
        function = value["function"]
        if type(function) is dict and function.keys() == {"name", "description", "parameters"}:
            return Tool(**function)
    raise ChatError(f"{at}: expected a function of name, description and parameters, and nothing else")


def _read_answer(reader: _Reader, text: str) -> Message:
    """The assistant's turn; `text`: what stands before the first mark."""
    calls = list[Call]()
    while reader.take(CALL):
        at = reader.place
        value = reader.json(END_CALL)
        if type(value) is not dict or value.keys() != {"name", "arguments"}:
            raise ChatError(f"{at}: expected an object of name and arguments, and nothing else")
        calls.append(Call(value["name"], value["arguments"]))
        reader.skip_space(f"{CALL} or {END}")
    return Message("assistant", text.removesuffix("\n") if calls else text, tuple(calls))


def _read_results(reader: _Reader) -> Message:
    results = list[Json]()
    while reader.take(RESPONSE):
        results.append(reader.json(END_RESPONSE))
        reader.skip_space(f"{RESPONSE} or {END}")
    return Message("tool", results=tuple(results))


def _text(numbers: list[int], begin: int, end: int, tokenizer: Tokenizer) -> str:
    try:
        return tokenizer.content(numbers[begin:end]).decode()
    except UnicodeDecodeError:
        raise ChatError(f"tokens {begin} to {end - 1}: expected text, found bytes that are not UTF-8") from None


def _given(text: str, tokenizer: Tokenizer) -> str:
    """`text` without the space that the tokenizer put before it."""
    return text.removeprefix(" ") if tokenizer.adds_space else text


def _checked(number: Any, at: int, vocab_size: int) -> int:
    try:
        found = operator.index(number)
    except TypeError:
        raise ChatError(f"token {at}: a {type(number).__name__}; expected an id") from None
    if not 0 <= found < vocab_size:
        raise ChatError(f"token {at}: expected an id from 0 to {vocab_size - 1}, found another number")
    return found
