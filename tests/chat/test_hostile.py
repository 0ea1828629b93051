"""No text forges a special token, and whatever tokens come, the parser says what they are or raises its own error."""

from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from dist_lm.chat.messages import Call, ChatError, Conversation, Message, Tool
from dist_lm.chat.parse import parse, parse_turn
from dist_lm.chat.template import render
from dist_lm.tokenizer.symbols import SPECIAL_TOKENS
from dist_lm.tokenizer.tokenizer import Tokenizer
from tests.chat.conversations import spelled
from tests.chat.hostile import hostile_text, mutated

the_bar = pytest.param(10_000, marks=[pytest.mark.bars, pytest.mark.timeout(1800)])
counts = pytest.mark.parametrize("count", [200, the_bar])
START, END = "<|im_start|>", "<|im_end|>"
CALL, RESPONSE = ("<tool_call>", "</tool_call>"), ("<tool_response>", "</tool_response>")
MARKS = ["<|endoftext|>", START, "<tools>", "</tools>", END, START, END]  # system, user
MARKS += [START, *CALL, END, START, *RESPONSE, END, START, END]  # assistant, tool, assistant


def conversation_of(text: str) -> Conversation:
    """`text` wherever a person, a tool, a schema or a model can put one."""
    schema = {"type": "object", "properties": {text: {"enum": [text], "description": text}}, "required": [text]}
    return Conversation(
        (
            Message("system", text),
            Message("user", text),
            Message("assistant", text, (Call(text, {text: [text, {text: text}]}),)),
            Message("tool", results=({text: text},)),
            Message("assistant", text),
        ),
        (Tool(text, text, schema),),
    )


@pytest.mark.heavy
@counts
def test_no_text_is_ever_a_special_token_and_it_comes_back(tokenizer: Tokenizer, count: int) -> None:
    random = Random(1)
    for _ in range(count):
        conversation = conversation_of(hostile_text(random))
        ids = render(conversation, tokenizer).tokens
        assert [SPECIAL_TOKENS[number] for number in ids if number < len(SPECIAL_TOKENS)] == MARKS
        assert spelled(parse(ids, tokenizer)) == spelled(conversation)


def outcome(parser: Callable[..., Any], ids: list[int], tokenizer: Tokenizer) -> Any:
    """What is parsed; None: refused, in one line. Any other error ends the test."""
    said = ""
    try:
        return parser(ids, tokenizer)
    except ChatError as error:
        said = str(error)
    assert len(said.splitlines()) == 1
    return None


@pytest.mark.heavy
@counts
def test_damaged_tokens_are_a_conversation_or_refused(tokenizer: Tokenizer, count: int) -> None:
    random = Random(2)
    parsed = 0
    for _ in range(count):
        ids = render(conversation_of(hostile_text(random)[:200]), tokenizer).tokens.tolist()
        damaged = mutated(ids, tokenizer.vocab_size, random)
        found = outcome(parse, damaged, tokenizer)
        if found is not None:  # what is accepted can be said again
            parsed += 1
            assert spelled(parse(render(found, tokenizer).tokens, tokenizer)) == spelled(found)
        begin = random.randrange(len(damaged))
        outcome(parse_turn, damaged[begin:], tokenizer)
    assert 0 < parsed < count


@counts
def test_random_tokens_are_a_turn_or_refused(tokenizer: Tokenizer, count: int) -> None:
    random = Random(3)
    for number in range(count):
        most = (len(SPECIAL_TOKENS), tokenizer.vocab_size, tokenizer.vocab_size + 5)[number % 3]
        ids = [random.randrange(-1 if most > tokenizer.vocab_size else 0, most) for _ in range(random.randrange(60))]
        outcome(parse, [tokenizer.eot_id, *ids], tokenizer)
        outcome(parse_turn, ids, tokenizer)


@counts
def test_hostile_json_in_the_right_place_is_a_call_or_refused(tokenizer: Tokenizer, count: int) -> None:
    random = Random(4)
    special = tokenizer.special_ids
    for _ in range(count):
        text = hostile_text(random)
        ids = [special["<tool_call>"], *tokenizer.encode(text), special["</tool_call>"]]
        outcome(parse_turn, ids, tokenizer)
        outcome(
            parse_turn,
            [ids[0], *tokenizer.encode('{"name": "f", "arguments": {"x": ' + text + "}}"), ids[-1]],
            tokenizer,
        )
