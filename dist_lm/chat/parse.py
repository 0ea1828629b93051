"""Reads a conversation back from tokens: `parse(render(x).tokens)` is x. `dist_lm.chat.template` describes the layout.

Loss switches are in no token, so every turn that is read back is learned. A text that begins with a whole block of
thinking comes back as thinking; `parse_turn` leaves it in the text, as the model wrote it.

White space around the JSON of calls and results, and between calls, is free; everything else must be as rendered.
A space that the tokenizer puts before every text (`Tokenizer.adds_space`) is no part of the conversation.
"""

import operator
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from dist_lm.chat import json_text
from dist_lm.chat.messages import (
    BEGIN_THINKING,
    END_THINKING,
    Call,
    ChatError,
    Conversation,
    Json,
    Message,
    Tool,
    check_conversation,
    check_message,
)
from dist_lm.chat.template import INSTRUCTION, INTRODUCTION, answer_tokens, stop_tokens
from dist_lm.errors import UserError
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

THINKING = re.compile(
    f"{re.escape(BEGIN_THINKING)}\n((?:(?!{re.escape(END_THINKING)}).)+)\n{re.escape(END_THINKING)}\n\n", re.DOTALL
)


def parse(ids: Iterable[int], tokenizer: Tokenizer) -> Conversation:
    """Returns the conversation that renders to `ids`, or to the same text in other tokens.

    Raises:
        ChatError: `ids` are not a conversation, or the tokenizer has a kept template; the message names the token (from
            0) or the turn, and what it expects.
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

        # A system turn of tools alone is the template's: the conversation has no such turn.
        if role == "system":
            has_tools = reader.next_is(TOOLS)
            if has_tools and (messages or tools):
                raise ChatError(f"{at}: expected no tools; the system turn with the tools comes first")
            if has_tools:
                reader.expect(TOOLS)
                text, tools = _read_tools(reader, text, at)
            if text or not has_tools:
                messages.append(Message("system", text))
        elif role == "assistant":
            # The text behind the line break is encoded on its own, so it may have a space of its own.
            messages.append(with_thinking(_read_answer(reader, _without_added_space(text, tokenizer))))
        elif reader.next_is(RESPONSE):
            # Results have the role of the user in this layout, as in Qwen2.5.
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
    r"""Returns the turn that a model wrote after `<|im_start|>assistant\n`, with or without the final `<|im_end|>`.

    In the layout of a kept template, calls are read if they have our form; other forms are text.

    Raises:
        ChatError: `ids` are not a turn (the message names the token, from 0, and what was expected), the turn is empty,
            or the kept template ends turns without a special token.
        UserError: the tokenizer lacks the mark that ends a turn, see `stop_tokens`.
    """
    # The marks that end a turn are the template's own, which the reader below does not know.
    if tokenizer.kept_template:
        ids, ends = list(ids), stop_tokens(tokenizer)
        if ids and ids[-1] in ends:
            ids = ids[:-1]

    reader = _Reader(ids, tokenizer)
    message = _read_answer(reader, reader.text())
    if not (reader.at_end() or tokenizer.kept_template):
        reader.expect(END)
    reader.expect_end()
    check_message(message, "the assistant's turn")
    return message


def writes_hermes_calls(tokenizer: Tokenizer) -> bool:
    """Returns whether a kept template writes calls as Hermes does, `<tool_call>` with JSON, which `parse_turn` reads.

    It renders a probe and reads it back; a template that refuses the probe gives False. Our own layout gives True.

    Raises:
        UserError: the tokenizer lacks the mark that ends a turn, see `stop_tokens`.
    """
    from dist_lm.chat.jinja_text import PROBE, PROBE_CALL  # jinja2 is for imported models only

    request = Conversation((Message("user", "probe"),), (PROBE,))
    try:
        written = answer_tokens(Message("assistant", calls=(PROBE_CALL,)), tokenizer, request)
        return parse_turn(written, tokenizer).calls == (PROBE_CALL,)
    except ChatError:
        return False


def require_hermes_calls(tokenizer: Tokenizer) -> None:
    """Refuses a kept template whose calls cannot be read; returns nothing.

    Raises:
        UserError: names the way out.
    """
    from dist_lm.chat.jinja_text import WAY_OUT  # jinja2 is for imported models only

    if not writes_hermes_calls(tokenizer):
        raise UserError(
            f"--tools: the chat template of the model shows no calls in the form <tool_call>JSON</tool_call>, so they "
            f"cannot be read: {WAY_OUT}, and stage=tools teaches calls"
        )


class _Reader:
    """A position in a list of marks and of the texts between them."""

    def __init__(self, ids: Iterable[Any], tokenizer: Tokenizer) -> None:
        """Splits `ids` at the marks.

        Raises:
            ChatError: an id is not one of `tokenizer`, or tokens between marks are not UTF-8.
        """
        token_ids = [_checked(token_id, index, tokenizer.vocab_size) for index, token_id in enumerate(ids)]
        self._length = len(token_ids)
        self._parts: list[tuple[int, str, bool]] = []  # (index of the first token, mark or text, whether it is a mark)
        self._next = 0  # index in `_parts`

        marks = {token_id: name for name, token_id in tokenizer.special_ids.items()}
        # Marks that the tokenizer lacks were encoded as plain text, so they are looked for in the text.
        spelled_mark = re.compile("|".join(map(re.escape, tokenizer.lacking())) or "(?!)")
        begin = 0
        for index, token_id in enumerate([*token_ids, None]):
            if token_id is not None and token_id not in marks:
                continue

            text = _text(token_ids, begin, index, tokenizer)
            text_begin = 0
            for match in spelled_mark.finditer(text):
                before = text[text_begin : match.start()]
                if tokenizer.adds_space:
                    before = before.removesuffix(" ")  # the space was put before the mark
                self._add(begin, _without_added_space(before, tokenizer), match.group())
                text_begin = match.end()
            self._add(begin, _without_added_space(text[text_begin:], tokenizer))

            if token_id is not None:
                self._add(index, "", marks[token_id])
            begin = index + 1

    def _add(self, index: int, text: str, mark: str = "") -> None:
        """Appends a text and the mark behind it, each unless it is empty."""
        self._parts += [(index, part, is_mark) for part, is_mark in ((text, False), (mark, True)) if part]

    @property
    def place(self) -> str:
        """Name of the next token in error messages."""
        if self.at_end():
            return f"token {self._length}"
        return f"token {self._parts[self._next][0]}"

    def at_end(self) -> bool:
        """Returns whether nothing is left."""
        return self._next == len(self._parts)

    def next_is(self, mark: str) -> bool:
        """Returns whether `mark` comes next."""
        return not self.at_end() and self._parts[self._next][1:] == (mark, True)

    def take(self, mark: str) -> bool:
        """Steps over `mark` if it comes next, and returns whether it did."""
        is_next = self.next_is(mark)
        self._next += is_next
        return is_next

    def expect(self, mark: str) -> None:
        """Steps over `mark`; raises ChatError for anything else."""
        if not self.take(mark):
            raise self._unexpected(mark)

    def expect_text(self, text: str, name: str) -> None:
        """Steps over `text`, which must reach to a mark or the end; raises ChatError, which calls it `name`, for
        anything else.
        """
        at = self.place
        if self.text() != text:
            raise ChatError(f"{at}: expected {name}")

    def expect_end(self) -> None:
        """Raises ChatError if tokens are left."""
        if not self.at_end():
            raise self._unexpected("nothing more")

    def text(self) -> str:
        """Steps over the text up to the next mark or the end and returns it; it may be empty."""
        if self.at_end() or self._parts[self._next][2]:
            return ""
        self._next += 1
        return self._parts[self._next - 1][1]

    def skip_space(self, expected: str) -> None:
        """Steps over white space; raises ChatError for other text before the next mark."""
        at = self.place
        if self.text().strip():
            raise ChatError(f"{at}: expected {expected}, found text")

    def json(self, closing: str) -> Json:
        """Steps over JSON and the mark `closing` behind it, and returns the value of the JSON.

        Raises:
            ChatError: the text is no JSON, or another mark follows.
        """
        at = self.place
        text = self.text()
        self.expect(closing)
        return json_text.read(text, at)

    def _unexpected(self, expected: str) -> ChatError:
        if self.at_end():
            return ChatError(f"{self.place}: expected {expected}, found the end")
        _, text, is_mark = self._parts[self._next]
        return ChatError(f"{self.place}: expected {expected}, found {text if is_mark else 'text'}")


def _read_tools(reader: _Reader, text: str, at: str) -> tuple[str, tuple[Tool, ...]]:
    """Reads from behind <tools> to the end of the system turn. Returns (text of the system, tools).

    Args:
        reader: steps over what is read.
        text: stands before <tools>: the text of the system and the introduction of the tools.
        at: place of `text` in messages.

    Raises:
        ChatError: the tokens are not laid out so; the message names the place.
    """
    # Two line breaks part the text of the system from the introduction; without a text there are none.
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
    """Returns the tool of the JSON value of a line; raises ChatError, which begins with `at`, for any other value."""
    if type(value) is dict and value.keys() == {"type", "function"} and value["type"] == "function":
        function = value["function"]
        if type(function) is dict and function.keys() == {"name", "description", "parameters"}:
            return Tool(**function)
    raise ChatError(f"{at}: expected a function of name, description and parameters, and nothing else")


def _read_answer(reader: _Reader, text: str) -> Message:
    """Reads the calls of an assistant's turn up to its end, and returns the turn. `text` stands before the first mark.

    Raises:
        ChatError: a call is no JSON object of name and arguments, or other text stands between calls.
    """
    calls: list[Call] = []
    while reader.take(CALL):
        at = reader.place
        value = reader.json(END_CALL)
        if type(value) is not dict or value.keys() != {"name", "arguments"}:
            raise ChatError(f"{at}: expected an object of name and arguments, and nothing else")
        calls.append(Call(value["name"], value["arguments"]))
        reader.skip_space(f"{CALL} or {END}")

    # The layout puts a line break between the text and the first call.
    if calls:
        text = text.removesuffix("\n")
    return Message("assistant", text, tuple(calls))


def with_thinking(message: Message) -> Message:
    """Returns a turn of the assistant with the block of thinking taken out of the beginning of its text."""
    # The second line break of a block before calls was taken for the one before a call.
    text = message.content
    if message.calls and text.endswith(f"{END_THINKING}\n"):
        text += "\n"
    match = THINKING.match(text)
    if not match:
        return message
    return replace(message, thinking=match[1], content=text[match.end() :])


def _read_results(reader: _Reader) -> Message:
    results: list[Json] = []
    while reader.take(RESPONSE):
        results.append(reader.json(END_RESPONSE))
        reader.skip_space(f"{RESPONSE} or {END}")
    return Message("tool", results=tuple(results))


def _text(token_ids: list[int], begin: int, end: int, tokenizer: Tokenizer) -> str:
    """Returns the text of tokens [begin, end); raises ChatError if their bytes are not UTF-8."""
    try:
        return tokenizer.content(token_ids[begin:end]).decode()
    except UnicodeDecodeError:
        raise ChatError(f"tokens {begin} to {end - 1}: expected text, found bytes that are not UTF-8") from None


def _without_added_space(text: str, tokenizer: Tokenizer) -> str:
    """Returns `text` without the space that the tokenizer put before it."""
    if tokenizer.adds_space:
        return text.removeprefix(" ")
    return text


def _checked(token_id: Any, index: int, vocab_size: int) -> int:
    """Returns `token_id`, an int or a number of numpy or torch, as an int.

    Raises:
        ChatError: it is no id of the vocabulary; the message names `index`, its place.
    """
    try:
        checked_id = operator.index(token_id)
    except TypeError:
        raise ChatError(f"token {index}: a {type(token_id).__name__}; expected an id") from None
    if not 0 <= checked_id < vocab_size:
        raise ChatError(f"token {index}: expected an id from 0 to {vocab_size - 1}, found another number")
    return checked_id
