"""A conversation as tokens, and tokens as a conversation: the only place that knows the layout (docs/chat.md).

    <|endoftext|>
    <|system|> text <|tools|> JSON <|/tools|> <|end|>                 text or tools, or both; else left out
    <|user|> text <|end|>
    <|assistant|> text (<|tool_call|> JSON <|/tool_call|>)* <|end|>
    <|tool|> (<|tool_result|> JSON <|/tool_result|>)+ <|end|>

Marks are put in by their ids. Everything that a person, a tool or a schema says goes through `Tokenizer.encode`, which
has no special id to give: whatever a text spells, it stays text. `parse(render(x).tokens)` is x.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dist_lm.chat import json_text
from dist_lm.chat.errors import ChatError
from dist_lm.chat.messages import Call, Conversation, Json, Message, Tool
from dist_lm.chat.nulls import with_nulls, without_nulls
from dist_lm.chat.reader import Reader
from dist_lm.chat.rules import check_conversation, check_message, turn_name
from dist_lm.chat.user_text import spaced, unspaced
from dist_lm.errors import UserError
from dist_lm.tokenizer.symbols import END_OF_TEXT
from dist_lm.tokenizer.tokenizer import Tokenizer

LAYOUT = 4  # one more with every change: corpora of another layout are refused
SYSTEM, USER, ASSISTANT, TOOL, END = "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"
TOOLS, END_TOOLS = "<|tools|>", "<|/tools|>"
CALL, END_CALL = "<|tool_call|>", "<|/tool_call|>"
RESULT, END_RESULT = "<|tool_result|>", "<|/tool_result|>"
VALUE_END = re.compile(r'(?:(?<=")|(?<=\d ))(?=[,}\]])(?!, " arguments": \{)')  # what follows a value is apart from it


@dataclass(frozen=True)
class Rendered:
    """A conversation in tokens."""

    tokens: np.ndarray  # (n,) uint16
    loss_mask: np.ndarray  # (n,) uint8: 1 where the assistant writes, from behind <|assistant|> to <|end|>


def render(conversation: Conversation, tokenizer: Tokenizer) -> Rendered:
    """The tokens of `conversation`, every turn closed.

    Raises:
        ChatError: it is not well formed, or holds what would not come back; the message names the turn.
    """
    check_conversation(conversation)
    special = tokenizer.special_ids
    tokens = [special[END_OF_TEXT]]
    mask = [0]
    messages = conversation.messages
    if conversation.tools and messages[0].role != "system":
        tokens += [special[SYSTEM], *_tool_list(conversation.tools, tokenizer), special[END]]
        mask += [0] * (len(tokens) - len(mask))
    for number, message in enumerate(messages):
        where = turn_name(number, message)
        body = _body(message, conversation.tools, where, tokenizer)
        if message.role == "system" and conversation.tools:
            body += _tool_list(conversation.tools, tokenizer)
        tokens += [special[f"<|{message.role}|>"], *body, special[END]]
        mask += [0, *[int(message.role == "assistant")] * (len(body) + 1)]
    return Rendered(np.array(tokens, np.uint16), np.array(mask, np.uint8))


def prompt(conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
    """What a model is asked to continue: `conversation`, then the mark that opens the assistant's turn.

    Raises:
        ChatError: as `render`, or it is not the assistant's turn.
    """
    tokens = render(conversation, tokenizer).tokens
    last = conversation.messages[-1]
    if last.role not in ("user", "tool"):
        where = turn_name(len(conversation.messages) - 1, last)
        raise ChatError(f"{where}: the last one; expected user or tool, for the assistant to go on")
    return [*tokens.tolist(), tokenizer.special_ids[ASSISTANT]]


def parse(ids: Iterable[int], tokenizer: Tokenizer) -> Conversation:
    """The conversation that renders to `ids` (or to the same text in other tokens).

    Raises:
        ChatError: there is none; the message says what was expected, and at which token (from 0) or turn.
    """
    reader = Reader(ids, tokenizer)
    messages: list[Message] = []
    tools: tuple[Tool, ...] = ()
    reader.expect(END_OF_TEXT)
    if reader.take(SYSTEM):
        text = reader.text()
        if reader.take(TOOLS):
            tools = _read_tools(reader)
        if text or not tools:
            messages.append(Message("system", text))
        reader.expect(END)
    while not reader.at_end():
        role = reader.expect(USER, ASSISTANT, TOOL)
        if role == USER:
            messages.append(Message("user", unspaced(reader.text())))
        elif role == ASSISTANT:
            messages.append(_read_answer(reader, tools))
        else:
            messages.append(_read_results(reader))
        reader.expect(END)
    conversation = Conversation(tuple(messages), tools)
    check_conversation(conversation)
    return conversation


def parse_turn(ids: Iterable[int], tokenizer: Tokenizer, tools: Sequence[Tool]) -> Message:
    """What a model wrote behind `<|assistant|>`, with the final `<|end|>` or without.

    Args:
        tools: those of the conversation; their schemas say which null is none.

    Raises:
        ChatError: it is no turn; the message says what was expected, and at which token (from 0).
    """
    reader = Reader(ids, tokenizer)
    message = _read_answer(reader, tools)
    if not reader.at_end():
        reader.expect(END)
    reader.expect_end()
    check_message(message, "the assistant's turn")
    return message


def _body(message: Message, tools: Sequence[Tool], where: str, tokenizer: Tokenizer) -> list[int]:
    """What stands between the marks of a turn."""
    encode = _written if message.role == "assistant" else _text
    content = spaced(message.content) if message.role == "user" else message.content
    tokens = encode(content, where, tokenizer)
    for number, call in enumerate(message.calls):
        place = f"{where}, call {number}"
        value = {"name": call.name, "arguments": with_nulls(call.arguments, _schema_of(call.name, tools), place)}
        tokens += _json(CALL, value, END_CALL, place, tokenizer, encode)
    for number, result in enumerate(message.results):
        tokens += _json(RESULT, result, END_RESULT, f"{where}, result {number}", tokenizer)
    return tokens


def _tool_list(tools: tuple[Tool, ...], tokenizer: Tokenizer) -> list[int]:
    # what a tool does first: where its name begins, a reader knows whether it is the one
    value = [{"description": tool.description, "name": tool.name, "parameters": tool.parameters} for tool in tools]
    return _json(TOOLS, value, END_TOOLS, "tools", tokenizer)


def _text(text: str, where: str, tokenizer: Tokenizer) -> list[int]:
    try:
        return tokenizer.encode(text)
    except UserError as error:
        raise ChatError(f"{where}: {error}") from None


def _written(text: str, where: str, tokenizer: Tokenizer) -> list[int]:
    """What the assistant writes: whether a value ends and what follows it are two tokens."""
    return [token for part in VALUE_END.split(text) for token in _text(part, where, tokenizer)]


def _json(
    opening: str,
    value: Json,
    closing: str,
    where: str,
    tokenizer: Tokenizer,
    encode: Callable[[str, str, Tokenizer], list[int]] = _text,
) -> list[int]:
    special = tokenizer.special_ids
    return [special[opening], *encode(json_text.write(value, where), where, tokenizer), special[closing]]


def _read_tools(reader: Reader) -> tuple[Tool, ...]:
    at = reader.place
    values = reader.json(END_TOOLS)
    if type(values) is not list or not values:
        raise ChatError(f"{at}: expected a list of tools")
    for value in values:
        if type(value) is not dict or value.keys() != {"description", "name", "parameters"}:
            raise ChatError(f"{at}: expected tools of description, name and parameters, nothing else")
    return tuple(Tool(value["name"], value["description"], value["parameters"]) for value in values)


def _read_answer(reader: Reader, tools: Sequence[Tool]) -> Message:
    text = reader.text()
    calls = []
    while reader.take(CALL):
        at = reader.place
        value = reader.json(END_CALL)
        if type(value) is not dict or value.keys() != {"name", "arguments"}:
            raise ChatError(f"{at}: expected an object of name and arguments, nothing else")
        arguments = without_nulls(value["arguments"], _schema_of(value["name"], tools))
        calls.append(Call(value["name"], arguments))
    return Message("assistant", text, tuple(calls))


def _schema_of(name: Json, tools: Sequence[Tool]) -> Json:
    """What the arguments of a call are; None of an unknown tool."""
    return next((tool.parameters for tool in tools if tool.name == name), None)


def _read_results(reader: Reader) -> Message:
    results = []
    while reader.take(RESULT):
        results.append(reader.json(END_RESULT))
    return Message("tool", results=tuple(results))
