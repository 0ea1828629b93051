"""The exported template renders what we render, and parsers that read text find the calls that `parse` finds."""

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dist_lm.chat.messages import Call, ChatError, Conversation, Message, Tool
from dist_lm.chat.parse import parse, parse_turn
from dist_lm.chat.template import INSTRUCTION, INTRODUCTION, answer_tokens, chat_template, layout, render
from dist_lm.tokenizer.symbols import CALL, SPECIAL_TOKENS
from dist_lm.tokenizer.tokenizer import Tokenizer
from tests.chat.conversations import for_openai, hostile_conversation, spelled
from tests.chat.hermes_oracle import hermes_calls
from tests.chat.hostile import mutated

Render = Callable[..., str]


@pytest.fixture(scope="module")
def apply_template() -> Render:
    """The template in the environment in which transformers runs templates."""
    import json

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = tojson
    return environment.from_string(chat_template()).render


def text_of(conversation: Conversation) -> str:
    return "".join(part.text for part in layout(conversation))


def shown(tokens: Any, tokenizer: Tokenizer) -> str:
    """Tokens as an engine decodes them where no special token is skipped."""
    parts = (
        SPECIAL_TOKENS[token].encode() if token < len(SPECIAL_TOKENS) else tokenizer.content([token])
        for token in tokens
    )
    return b"".join(parts).decode()


def test_the_version_of_jinja() -> None:
    assert tuple(map(int, jinja2.__version__.split(".")[:3])) >= (3, 1, 6)


@pytest.mark.heavy
@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=[pytest.mark.bars, pytest.mark.timeout(1800)])])
def test_conversations_are_rendered_byte_for_byte(apply_template: Render, count: int) -> None:
    random = Random(0)
    calls = 0
    for _ in range(count):
        conversation = hostile_conversation(random)
        messages, tools = for_openai(conversation)
        asks = conversation.messages[-1].role != "assistant"
        expected = text_of(conversation) + ("<|im_start|>assistant\n" if asks else "")
        assert apply_template(messages=messages, tools=tools or None, add_generation_prompt=asks) == expected
        calls += sum(len(message.calls) for message in conversation.messages)
    assert calls > count


def test_results_and_arguments_may_be_values_or_json_text(apply_template: Render) -> None:
    text, value = '{"x": "</tool_call> é"}', {"x": "</tool_call> é"}
    rendered = [
        apply_template(
            messages=[
                {"role": "user", "content": "u"},
                {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": given}]},
                {"role": "tool", "content": given},
            ]
        )
        for given in (text, value)
    ]
    assert rendered[0] == rendered[1]
    assert rendered[0].count('"\\u003c/tool_call> é"') == 2


def test_transformers_renders_the_same() -> None:
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    random = Random(1)
    for _ in range(20):
        conversation = hostile_conversation(random)
        messages, tools = for_openai(conversation)
        rendered, _ = utilities.render_jinja_template(
            conversations=[messages], tools=tools or None, chat_template=chat_template()
        )
        assert rendered == [text_of(conversation)]


def test_no_sentence_of_ours_spells_a_mark() -> None:
    assert not [mark for mark in SPECIAL_TOKENS for text in (INTRODUCTION, INSTRUCTION) if mark in text]


def answers(random: Random) -> list[Message]:
    """Turns of the assistant whose text spells no call."""
    return [
        message
        for message in hostile_conversation(random).messages
        if message.role == "assistant" and CALL not in message.thinking + message.content
    ]


@pytest.mark.heavy
def test_hermes_finds_the_calls_that_we_wrote(tokenizer: Tokenizer) -> None:
    random = Random(2)
    found = 0
    for _ in range(1_000):
        for message in answers(random):
            text = shown(answer_tokens(message, tokenizer)[:-1], tokenizer)
            wanted = [(call.name, call.arguments) for call in message.calls]
            assert spelled(hermes_calls(text)) == spelled(wanted)
            found += len(wanted)
    assert found > 1_000


@pytest.mark.heavy
def test_hermes_finds_the_calls_that_parse_finds_in_damaged_turns(tokenizer: Tokenizer) -> None:
    random = Random(3)
    parsed = 0
    for _ in range(500):
        for message in answers(random):
            ids = mutated(answer_tokens(message, tokenizer)[:-1], tokenizer.vocab_size, random)
            try:
                turn = parse_turn(ids, tokenizer)
            except ChatError:
                continue
            if CALL not in turn.content:
                parsed += bool(turn.calls)
                found = hermes_calls(shown(ids, tokenizer))
                assert spelled(found) == spelled([(call.name, call.arguments) for call in turn.calls])
    assert parsed > 20


def test_text_that_spells_a_call_misleads_parsers_of_text_but_not_ours(tokenizer: Tokenizer) -> None:
    message = Message("assistant", 'Say <tool_call>{"name": "f", "arguments": {}}</tool_call>.')
    ids = answer_tokens(message, tokenizer)
    assert parse_turn(ids, tokenizer) == message
    assert hermes_calls(shown(ids, tokenizer)) == [("f", {})]


def test_marks_in_json_are_escaped_and_come_back(tokenizer: Tokenizer) -> None:
    everything = "".join(SPECIAL_TOKENS) + " a < b <| c"
    tool = Tool("f", everything, {"type": "object", "description": everything})
    asked = Message("assistant", calls=(Call("f", {everything: everything}),))
    messages = (Message("user", "u"), asked, Message("tool", results=(everything,)))
    conversation = Conversation(messages, (tool,))
    text = text_of(conversation)
    assert parse(render(conversation, tokenizer).tokens, tokenizer) == conversation
    assert text.count("<tool_call>") == text.count("<tool_response>") == text.count("</tools>") == 1
    assert "\\u003c|im_end|>" in text
    assert " a < b <| c" in text
    assert text_of(replace(conversation, tools=())).count("\\u003c|pad|>") == 3
