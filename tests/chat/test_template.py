"""Rendering and parsing are each other's inverse, the mask is the assistant's, and what is malformed is refused."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from dist_lm.chat import json_text
from dist_lm.chat.errors import ChatError
from dist_lm.chat.messages import Call, Conversation, Message, Tool
from dist_lm.chat.template import ASSISTANT, END, SYSTEM, parse, parse_turn, prompt, render
from dist_lm.tokenizer.symbols import ARGUMENT_FRAMES, CALL_FRAMES, JSON_TYPES, SPECIAL_TOKENS, TOOL_FRAMES
from dist_lm.tokenizer.tokenizer import Tokenizer
from tests.chat.conversations import conversations, spelled

WEATHER = Tool("weather", "Weather of a day.", {"type": "object", "properties": {"city": {"type": "string"}}})
USER = Message("user", "Oslo?")
ASKS = Message("assistant", "Let me see.", (Call("weather", {"city": "Oslo"}), Call("weather", {"city": "Bergen"})))
RESULTS = Message("tool", results=({"sky": "clear"}, {"error": "no such city"}))
ANSWER = Message("assistant", "Clear.")
FULL = Conversation((Message("system", "Be brief."), USER, ASKS, RESULTS, ANSWER), (WEATHER,))

many = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


@many
@given(conversation=conversations())
def test_what_is_rendered_parses_to_itself(tokenizer: Tokenizer, conversation: Conversation) -> None:
    rendered = render(conversation, tokenizer)
    assert spelled(parse(rendered.tokens, tokenizer)) == spelled(conversation)
    assert rendered.tokens.dtype == np.uint16
    assert rendered.loss_mask.dtype == np.uint8


@many
@given(conversation=conversations())
def test_a_turn_of_the_assistant_is_what_the_mask_shows_and_parses_alone(
    tokenizer: Tokenizer, conversation: Conversation
) -> None:
    rendered = render(conversation, tokenizer)
    edges = np.flatnonzero(np.diff(rendered.loss_mask, prepend=0, append=0))
    turns = [message for message in conversation.messages if message.role == "assistant"]
    assert len(edges) == 2 * len(turns)
    for message, begin, end in zip(turns, edges[::2], edges[1::2], strict=True):
        ids = rendered.tokens[begin:end]
        assert rendered.tokens[begin - 1] == tokenizer.special_ids[ASSISTANT]
        assert ids[-1] == tokenizer.special_ids[END]
        assert spelled(parse_turn(ids, tokenizer, conversation.tools)) == spelled(message)
        assert spelled(parse_turn(ids[:-1].tolist(), tokenizer, conversation.tools)) == spelled(message)


@many
@given(conversation=conversations())
def test_a_prompt_and_the_turn_that_follows_are_the_conversation(
    tokenizer: Tokenizer, conversation: Conversation
) -> None:
    whole = render(conversation, tokenizer).tokens.tolist()
    for number, message in enumerate(conversation.messages):
        if message.role == "assistant":
            asked = prompt(replace(conversation, messages=conversation.messages[:number]), tokenizer)
            assert whole[: len(asked)] == asked


def test_the_layout(tokenizer: Tokenizer) -> None:
    rendered = render(FULL, tokenizer)
    text = "".join(
        SPECIAL_TOKENS[number] if number < len(SPECIAL_TOKENS) else tokenizer.content([number]).decode()
        for number in rendered.tokens
    )
    schema = '{" type": " object", " properties": {" city": {" type": " string"}}}'
    assert text == (
        "<|endoftext|><|system|>Be brief.<|tools|>"
        f'[{{" description": " Weather of a day.", " name": " weather", " parameters": {schema}}}]<|/tools|><|end|>'
        "<|user|>Oslo?<|end|><|assistant|>Let me see."
        '<|tool_call|>{" name": " weather", " arguments": {" city": " Oslo"}}<|/tool_call|>'
        '<|tool_call|>{" name": " weather", " arguments": {" city": " Bergen"}}<|/tool_call|><|end|>'
        '<|tool|><|tool_result|>{" sky": " clear"}<|/tool_result|>'
        '<|tool_result|>{" error": " no such city"}<|/tool_result|><|end|><|assistant|>Clear.<|end|>'
    )


def test_tools_without_a_text_of_the_system_open_its_turn(tokenizer: Tokenizer) -> None:
    conversation = Conversation((USER,), (WEATHER,))
    rendered = render(conversation, tokenizer)
    assert rendered.tokens[1] == tokenizer.special_ids[SYSTEM]
    assert parse(rendered.tokens, tokenizer) == conversation


CYCLE: list[Any] = []
CYCLE.append(CYCLE)
NO_VALUE = (float("nan"), float("inf"), (1, 2), {1: 2}, {None: 1}, {"a": b""}, "\ud800", {"\udfff": 1}, 10**700, CYCLE)


def turns(*messages: Any) -> Conversation:
    return Conversation(messages)


@pytest.mark.parametrize(
    ("conversation", "named"),
    [
        (turns(), "turn 0"),
        (turns(Message("system", "x")), "turn 1"),
        (turns(Message("system", ""), USER), r"turn 0 \(system\): is empty"),
        (turns(USER, USER), r"turn 1 \(user\): expected assistant"),
        (turns(ANSWER), r"turn 0 \(assistant\)"),
        (turns(USER, Message("system", "x")), r"turn 1 \(system\)"),
        (turns(USER, ASKS, ANSWER), r"turn 2 \(assistant\): expected tool"),
        (turns(USER, ANSWER, RESULTS), r"turn 2 \(tool\): expected user"),
        (turns(USER, ASKS, Message("tool", results=(1,))), "1 results of 2 calls"),
        (turns(USER, ASKS, Message("tool", "x", results=(1, 2))), "has text"),
        (turns(USER, Message("assistant")), r"turn 1 \(assistant\): is empty"),
        (turns(Message("user", "x", calls=ASKS.calls)), "only the assistant"),
        (turns(Message("user", "x", results=(1,))), "only the role tool"),
        (turns(Message("nobody", "x")), "turn 0"),  # type: ignore[arg-type]
        (turns(Message("user", b"x")), "bytes"),  # type: ignore[arg-type]
        (turns("hello"), "turn 0"),
        (turns(USER, Message("assistant", "", (Call(""),))), "call 0: no name"),
        (turns(USER, Message("assistant", "", (Call("f", [1]),))), "call 0: arguments is a list"),  # type: ignore[arg-type]
        (turns(USER, Message("assistant", "", [Call("f")])), "calls is a list"),  # type: ignore[arg-type]
        (Conversation([USER]), "messages: a list"),  # type: ignore[arg-type]
        (Conversation((USER,), (WEATHER, WEATHER)), "tool 1: another"),
        (Conversation((USER,), (replace(WEATHER, name=""),)), "tool 0: no name"),
        (Conversation((USER,), (replace(WEATHER, parameters=None),)), "tool 0: parameters"),  # type: ignore[arg-type]
        (Conversation((USER,), (replace(WEATHER, description="\ud800"),)), "surrogate"),
        (turns(Message("user", "a\udc80b")), r"turn 0 \(user\).*surrogate"),
        *((turns(USER, Message("assistant", "", (Call("f", {"x": x}),))), "turn 1.*call 0") for x in NO_VALUE),
    ],
)
def test_a_malformed_conversation_is_refused_by_its_turn(
    tokenizer: Tokenizer, conversation: Conversation, named: str
) -> None:
    with pytest.raises(ChatError, match=named):
        render(conversation, tokenizer)


def test_only_where_the_assistant_goes_on_there_is_a_prompt(tokenizer: Tokenizer) -> None:
    with pytest.raises(ChatError, match=r"turn 4 \(assistant\): the last one"):
        prompt(FULL, tokenizer)


def ids_of(text: str, tokenizer: Tokenizer) -> list[int]:
    """Tokens of a layout as people write it: here marks are spelled."""
    for number, name in enumerate(SPECIAL_TOKENS):
        text = text.replace(name, f"\0{number}\0")
    parts = text.split("\0")
    return [i for n, part in enumerate(parts) for i in ([int(part)] if n % 2 else tokenizer.encode(part))]


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("", "token 0: expected <|endoftext|>, found the end"),
        ("hello", "token 0: expected <|endoftext|>, found text"),
        ("<|endoftext|>hello", "token 1: expected <|user|> or"),
        ("<|endoftext|><|user|>", "token 2: expected <|end|>, found the end"),
        ("<|endoftext|><|user|><|end|>", "turn 0 (user): is empty"),
        ("<|endoftext|><|system|><|end|><|user|>1<|end|>", "turn 0 (system): is empty"),
        ("<|endoftext|><|system|><|tools|>[]<|/tools|><|end|>", "token 3: expected a list of tools"),
        ("<|endoftext|><|system|><|tools|>[1]<|/tools|><|end|>", "token 3: expected tools of description"),
        ("<|endoftext|><|user|><|tool_call|>", "token 2: expected <|end|>, found <|tool_call|>"),
        ("<|endoftext|><|user|><|pad|><|end|>", "found <|pad|>"),
        ("<|endoftext|><|user|><|reserved_3|><|end|>", "found <|reserved_3|>"),
        ("<|endoftext|><|user|><|unknown|><|end|>", "found <|unknown|>"),
        ("<|endoftext|><|user|>1<|end|><|tool|><|end|>", "turn 1 (tool)"),
        ("<|endoftext|><|user|>1<|end|><|endoftext|>", "found <|endoftext|>"),
    ],
)
def test_tokens_that_are_no_conversation_are_refused_by_their_place(
    tokenizer: Tokenizer, layout: str, said: str
) -> None:
    with pytest.raises(ChatError) as refused:
        parse(ids_of(layout, tokenizer), tokenizer)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("", "is empty"),
        ("<|end|>", "is empty"),
        ("x<|end|>y", "expected nothing more, found text"),
        ("<|tool_call|>{", "expected <|/tool_call|>, found the end"),
        ("<|tool_call|>{<|/tool_call|>", "token 1: no JSON"),
        ("<|tool_call|>[]<|/tool_call|>", "token 1: expected an object of name and arguments"),
        ('<|tool_call|>{"name": "f"}<|/tool_call|>', "expected an object of name and arguments"),
        ('<|tool_call|>{"name": 1, "arguments": {}}<|/tool_call|>', "call 0: no name"),
        ('<|tool_call|>{"name": "f", "arguments": [1]}<|/tool_call|>', "call 0: arguments is a list"),
        ('<|tool_call|>{"name": "f", "arguments": {}}<|/tool_call|> x', "expected <|end|>, found text"),
        ("<|tool_result|>1<|/tool_result|>", "found <|tool_result|>"),
    ],
)
def test_a_turn_that_no_assistant_may_write_is_refused(tokenizer: Tokenizer, layout: str, said: str) -> None:
    with pytest.raises(ChatError) as refused:
        parse_turn(ids_of(layout, tokenizer), tokenizer, ())
    assert said in str(refused.value)


@pytest.mark.parametrize("bad", [-1, 560, 2**70, 1.5, "7", None])
def test_what_is_no_id_is_refused(tokenizer: Tokenizer, bad: Any) -> None:
    with pytest.raises(ChatError, match="token 0"):
        parse_turn([bad], tokenizer, ())


def test_bytes_that_are_no_text_are_refused(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("\U0010fffe")[:-1]
    assert len(half) == 3
    with pytest.raises(ChatError, match="tokens 0 to 2: expected text"):
        parse_turn(half, tokenizer, ())


def test_json_may_be_spaced_in_any_way(tokenizer: Tokenizer) -> None:
    ids = ids_of('<|tool_call|>\n{"arguments":{"a":[1,2.0]},\t"name":"f"} <|/tool_call|>', tokenizer)
    assert spelled(parse_turn(ids, tokenizer, ()).calls) == spelled((Call("f", {"a": [1, 2.0]}),))


def test_names_and_values_are_framed_by_one_token_each(tokenizer: Tokenizer) -> None:
    properties = {"city": {"type": "string"}, "days": {"type": "integer"}}
    parameters = {"type": "object", "properties": properties, "required": ["city"]}
    asked = Message("assistant", calls=(Call("w", {"city": "x"}),))
    results = Message("tool", results=(1,))
    conversation = Conversation((USER, asked, results), (Tool("w", "v", parameters),))
    pieces = [piece.replace("<0x22>", '"') for piece in tokenizer.pieces(render(conversation, tokenizer).tokens)]
    frames = [piece for piece in pieces if '"' in piece]
    of_tool = ['[{" description": "', '", " name": "', '", " parameters": {" type": " object", " properties": {"']
    of_arguments = ['": {" type": " string"}, "', '": {" type": " integer"}}, " required": ["', '"]}}]']
    of_call = ['{" name": "', '", " arguments": {"', '": "', '"', ', "', '": null']
    assert frames == of_tool + of_arguments + of_call


def test_what_follows_a_value_of_a_call_is_a_token_of_its_own(tokenizer: Tokenizer) -> None:
    values = {"a": "x", "b": 12, "c": ["y", 1.5, "z"], "d": {"e": "w", "f": -3}, "g": True, "h": None, "i": 'a", "b'}
    calls = (Call("f", values), Call("g", {}))
    rendered = render(Conversation((USER, Message("assistant", 'A "word", 5 , or 6.', calls))), tokenizer)
    pieces = [tokenizer.content([token]).decode(errors="replace") for token in rendered.tokens.tolist()]
    assert '", " arguments": {"' in pieces
    assert [piece for piece in pieces if re.search(r'["\d ][,}\]]', piece) and "arguments" not in piece] == []
    text = tokenizer.content(rendered.tokens.tolist()).decode()
    assert (
        json_text.write({"name": "f", "arguments": values}, "") + json_text.write({"name": "g", "arguments": {}}, "")
        in text
    )


def test_symbols_for_tools_are_spelled_as_tools_are() -> None:
    """Otherwise nothing would ever be encoded to them."""
    plain = [{"a": {"type": name}, "b": {"type": name}} for name in JSON_TYPES]
    more = {"description": "d", "format": "e", "minimum": 0, "maximum": 1, "enum": ["a"], "default": "a"}
    deep = {"type": "object", "properties": plain[0], "required": ["a"]}
    lists = {"type": "array", "items": {"type": "string"}}
    rich = {"a": deep, "b": {"type": "string", **more}, "c": {"type": "string", "default": "b"}}
    properties = [*plain, rich, {"b": {"type": "string", "enum": ["a"]}}, {"c": lists}, {"d": deep}]
    schemas: list[dict[str, Any]] = [
        *({"type": "object", "properties": some, "required": ["a"]} for some in properties),
        *({"type": "object", "properties": some} for some in ({}, *properties)),
    ]
    tools = json_text.write([{"description": "d", "name": "n", "parameters": schema} for schema in schemas], "")
    calls = [json_text.write({"name": "n", "arguments": given}, "") for given in ({}, {"a": 1})]
    one = json_text.write([{"description": "d", "name": "n", "parameters": schemas[0]}], "")
    written = "\n".join([tools, one, *calls])
    missing = [frame for frame in (*CALL_FRAMES, *TOOL_FRAMES, *ARGUMENT_FRAMES) if frame not in written]
    assert missing == []
