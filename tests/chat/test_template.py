"""Rendering and parsing are each other's inverse, the mask is the assistant's, and what is malformed is refused."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from dist_lm.chat.messages import Call, ChatError, Conversation, Message, Tool
from dist_lm.chat.parse import parse, parse_turn
from dist_lm.chat.template import INSTRUCTION, INTRODUCTION, answer_tokens, prompt, render, thinking_block
from dist_lm.tokenizer.symbols import END, SPECIAL_TOKENS, START
from dist_lm.tokenizer.tokenizer import Tokenizer
from tests.chat.conversations import conversations, spelled

WEATHER = Tool("weather", "Weather of a day.", {"type": "object", "properties": {"city": {"type": "string"}}})
USER = Message("user", "Oslo?")
ASKS = Message("assistant", "Let me see.", (Call("weather", {"city": "Oslo"}), Call("weather", {"city": "Bergen"})))
RESULTS = Message("tool", results=({"sky": "clear"}, {"error": "no such city"}))
ANSWER = Message("assistant", "Clear.")
FULL = Conversation((Message("system", "Be brief."), USER, ASKS, RESULTS, ANSWER), (WEATHER,))

many = settings(max_examples=100, suppress_health_check=list(HealthCheck))


@pytest.mark.heavy
@many
@given(conversation=conversations())
def test_what_is_rendered_parses_to_itself(tokenizer: Tokenizer, conversation: Conversation) -> None:
    rendered = render(conversation, tokenizer)
    assert spelled(parse(rendered.tokens, tokenizer)) == spelled(conversation)
    assert rendered.tokens.dtype == np.uint16
    assert rendered.loss_mask.dtype == np.uint8


@pytest.mark.heavy
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
        opening = [tokenizer.special_ids[START], *tokenizer.encode("assistant\n")]
        assert rendered.tokens[begin - len(opening) : begin].tolist() == opening
        assert ids[-1] == tokenizer.special_ids[END]
        assert ids.tolist() == answer_tokens(message, tokenizer)
        alone = parse_turn(ids, tokenizer)
        assert spelled(parse_turn(ids[:-1].tolist(), tokenizer)) == spelled(alone)
        # A turn alone keeps its thinking in the text, as the model wrote it.
        assert spelled(with_thinking_in_text(message)) == spelled(alone)
        assert answer_tokens(alone, tokenizer) == ids.tolist()


def with_thinking_in_text(message: Message) -> Message:
    """The turn with its thinking as text; without other text, the last line break is the one before a call."""
    text = thinking_block(message) + message.content
    if message.thinking and message.calls and not message.content:
        text = text.removesuffix("\n")
    return replace(message, content=text, thinking="")


@pytest.mark.heavy
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
    schema = '{"type": "object", "properties": {"city": {"type": "string"}}}'
    function = f'{{"name": "weather", "description": "Weather of a day.", "parameters": {schema}}}'
    assert shown(render(FULL, tokenizer).tokens, tokenizer) == (
        f"<|endoftext|><|im_start|>system\nBe brief.\n\n{INTRODUCTION}"
        f'<tools>\n{{"type": "function", "function": {function}}}\n</tools>{INSTRUCTION}<|im_end|>\n'
        "<|im_start|>user\nOslo?<|im_end|>\n<|im_start|>assistant\nLet me see.\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Bergen"}}\n</tool_call><|im_end|>\n'
        '<|im_start|>user\n<tool_response>\n{"sky": "clear"}\n</tool_response>\n'
        '<tool_response>\n{"error": "no such city"}\n</tool_response><|im_end|>\n'
        "<|im_start|>assistant\nClear.<|im_end|>\n"
    )


def test_a_turn_without_text_begins_with_its_call(tokenizer: Tokenizer) -> None:
    message = Message("assistant", calls=(Call("f"),))
    found = shown(answer_tokens(message, tokenizer), tokenizer)
    assert found == '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>'


def test_tools_without_a_text_of_the_system_open_its_turn(tokenizer: Tokenizer) -> None:
    conversation = Conversation((USER,), (WEATHER,))
    rendered = render(conversation, tokenizer)
    assert shown(rendered.tokens, tokenizer).startswith(f"<|endoftext|><|im_start|>system\n{INTRODUCTION}<tools>")
    assert parse(rendered.tokens, tokenizer) == conversation


@pytest.mark.parametrize("text", [INTRODUCTION, f"x\n\n{INTRODUCTION}", "\n\n", "x\n", INSTRUCTION])
def test_a_system_text_that_looks_like_the_introduction_comes_back(tokenizer: Tokenizer, text: str) -> None:
    for offered in ((), (WEATHER,)):
        conversation = Conversation((Message("system", text), USER), offered)
        assert parse(render(conversation, tokenizer).tokens, tokenizer) == conversation


CYCLE: list[Any] = []
CYCLE.append(CYCLE)
NO_VALUE = (float("nan"), float("inf"), (1, 2), {1: 2}, {None: 1}, {"a": b""}, "\ud800", {"\udfff": 1}, 10**700, CYCLE)


def shown(tokens: Any, tokenizer: Tokenizer) -> str:
    """Tokens with marks by their names."""
    return "".join(
        tokenizer.pieces([n]).pop() if n < len(SPECIAL_TOKENS) else tokenizer.content([n]).decode() for n in tokens
    )


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
        (turns(USER, ANSWER, Message("system", "x")), "turn 3: missing"),
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
    with pytest.raises(ChatError, match=r"turn 4 \(assistant\): is last"):
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
        ("<|endoftext|>hello", "token 1: expected <|im_start|>, found text"),
        ("<|endoftext|><|im_start|>", "token 2: expected system, user or assistant"),
        ("<|endoftext|><|im_start|>user<|im_end|>", "token 2: expected system, user or assistant, and a line break"),
        ("<|endoftext|><|im_start|>tool\nx<|im_end|>", "token 2: expected system, user or assistant"),
        ("<|endoftext|><|im_start|>user\n", "expected <|im_end|>, found the end"),
        ("<|endoftext|><|im_start|>user\nx<|im_end|>", "expected a line break"),
        ("<|endoftext|><|im_start|>user\nx<|im_end|>\n\n", "expected a line break"),
        ("<|endoftext|><|im_start|>user\n<|im_end|>\n", "turn 0 (user): is empty"),
        ("<|endoftext|><|im_start|>system\n<|im_end|>\n", "turn 0 (system): is empty"),
        ("<|endoftext|><|im_start|>system\nx<tools>\n1\n</tools>", "expected the introduction of the tools"),
        (f"<|endoftext|><|im_start|>system\n{INTRODUCTION}<tools></tools>", "expected tools, each on a line"),
        (f"<|endoftext|><|im_start|>system\n{INTRODUCTION}<tools>\n\n</tools>", "expected tools, each on a line"),
        (f"<|endoftext|><|im_start|>system\n{INTRODUCTION}<tools>\n1\n</tools>", "expected a function of name"),
        (f"<|endoftext|><|im_start|>system\n\n\n{INTRODUCTION}<tools>\n1\n</tools>", "expected the introduction"),
        ("<|endoftext|><|im_start|>user\n<tool_call>", "expected <|im_end|>, found <tool_call>"),
        ("<|endoftext|><|im_start|>user\nx<tool_response>\n1\n</tool_response>", "expected a text or results"),
        ("<|endoftext|><|im_start|>user\n<tool_response>\n1\n</tool_response>x", "or <|im_end|>, found text"),
        ("<|endoftext|><|im_start|>user\n<|pad|><|im_end|>\n", "found <|pad|>"),
        ("<|endoftext|><|im_start|>user\n<|reserved_3|><|im_end|>\n", "found <|reserved_3|>"),
        ("<|endoftext|><|im_start|>user\n<|fim_prefix|><|im_end|>\n", "found <|fim_prefix|>"),
        (
            f"<|endoftext|><|im_start|>user\n1<|im_end|>\n<|im_start|>system\n{INTRODUCTION}<tools>\n1\n</tools>",
            "expected no tools; the system turn with the tools comes first",
        ),
        ("<|endoftext|><|im_start|>user\n1<|im_end|>\n<|endoftext|>", "found <|endoftext|>"),
        (
            "<|endoftext|><|im_start|>user\n1<|im_end|>\n<|im_start|>user\n<tool_response>\n1\n</tool_response><|im_end|>\n",
            "turn 1 (tool)",
        ),
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
        ("<|im_end|>", "is empty"),
        ("x<|im_end|>y", "expected nothing more, found text"),
        ("<tool_call>{", "expected </tool_call>, found the end"),
        ("<tool_call>{</tool_call>", "token 1: not JSON"),
        ("<tool_call>[]</tool_call>", "token 1: expected an object of name and arguments"),
        ('<tool_call>{"name": "f"}</tool_call>', "expected an object of name and arguments"),
        ('<tool_call>{"name": 1, "arguments": {}}</tool_call>', "call 0: no name"),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "call 0: arguments is a list"),
        ('<tool_call>{"name": "f", "arguments": {}}</tool_call> x', "expected <tool_call> or <|im_end|>, found text"),
        ("<tool_response>1</tool_response>", "found <tool_response>"),
    ],
)
def test_a_turn_that_no_assistant_may_write_is_refused(tokenizer: Tokenizer, layout: str, said: str) -> None:
    with pytest.raises(ChatError) as refused:
        parse_turn(ids_of(layout, tokenizer), tokenizer)
    assert said in str(refused.value)


@pytest.mark.parametrize("bad", [-1, 560, 2**70, 1.5, "7", None])
def test_what_is_no_id_is_refused(tokenizer: Tokenizer, bad: Any) -> None:
    with pytest.raises(ChatError, match="token 0"):
        parse_turn([bad], tokenizer)


def test_bytes_that_are_no_text_are_refused(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("\U0010fffe")[:-1]
    assert len(half) == 3
    with pytest.raises(ChatError, match="tokens 0 to 2: expected text"):
        parse_turn(half, tokenizer)


def test_json_may_be_spaced_in_any_way(tokenizer: Tokenizer) -> None:
    ids = ids_of('<tool_call>{"arguments":{"a":[1,2.0]},\t"name":"f"} \n</tool_call>\n', tokenizer)
    assert spelled(parse_turn(ids, tokenizer).calls) == spelled((Call("f", {"a": [1, 2.0]}),))
