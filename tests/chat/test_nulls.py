"""A call spells all that its schema names, and reads as what was given."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_lm.chat.errors import ChatError
from dist_lm.chat.messages import Call, Conversation, Json, Message, Tool
from dist_lm.chat.nulls import with_nulls, without_nulls
from dist_lm.chat.template import parse_turn, prompt, render
from dist_lm.tokenizer.tokenizer import Tokenizer
from tests.chat.conversations import json_objects, object_schemas, parameters, spelled, values_of

DAY = {"type": "object", "properties": {"date": {"type": "string"}, "clock": {"type": "string"}}}
SCHEMA: Json = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "day": DAY,
        "unit": {"enum": ["C", "F"]},
        "note": {"type": ["string", "null"]},
        "legs": {"type": "array", "items": DAY},
    },
    "required": ["city"],
}


@pytest.mark.parametrize(
    ("given_", "spelled_"),
    [
        ({"city": "Oslo"}, {"city": "Oslo", "day": None, "unit": None, "legs": None}),
        ({}, {"city": None, "day": None, "unit": None, "legs": None}),
        ({"note": None, "unit": "C"}, {"city": None, "day": None, "unit": "C", "note": None, "legs": None}),
        (
            {"legs": [{"clock": "9:00"}, {}], "city": "Oslo", "tip": None},
            {
                **{"city": "Oslo", "day": None, "unit": None, "tip": None},
                "legs": [{"date": None, "clock": "9:00"}, {"date": None, "clock": None}],
            },
        ),
    ],
)
def test_what_is_not_given_is_null_where_null_is_no_value(given_, spelled_):
    assert with_nulls(given_, SCHEMA, "call") == spelled_
    assert spelled(without_nulls(spelled_, SCHEMA)) == spelled(
        {name: given_[name] for name in spelled_ if name in given_}
    )


@settings(max_examples=200, deadline=None)
@given(schema_and_value=object_schemas.flatmap(lambda schema: st.tuples(st.just(schema), values_of(schema))))
def test_what_is_given_comes_back_in_its_order(schema_and_value):
    schema, value = schema_and_value
    whole = with_nulls(value, schema, "call")
    assert spelled(without_nulls(whole, schema)) == spelled(value)
    assert spelled(with_nulls(without_nulls(whole, schema), schema, "call")) == spelled(whole)


@settings(max_examples=100, deadline=None)
@given(schema=object_schemas, chosen=st.randoms(use_true_random=False))
def test_keys_in_the_order_of_the_schema_stay_in_it(schema: Any, chosen: Any) -> None:
    properties = list(schema["properties"])
    given_ = {name: "a" for name in properties if chosen.random() < 0.5}
    whole = list(with_nulls(given_, schema, "call"))
    assert whole == [name for name in properties if name in whole]
    assert set(given_) <= set(whole)


@settings(max_examples=200, deadline=None)
@given(value=json_objects, schema=parameters)
def test_any_schema_does(value: Any, schema: Any) -> None:
    given_ = without_nulls(value, schema)
    whole = with_nulls(given_, schema, "call")
    assert spelled(without_nulls(whole, schema)) == spelled(given_)


def test_a_null_that_would_not_come_back_is_refused(tokenizer: Tokenizer) -> None:
    call = Message("assistant", calls=(Call("w", {"day": {"date": None}}),))
    conversation = Conversation((Message("user", "?"), call), (Tool("w", "", SCHEMA),))
    with pytest.raises(ChatError, match=r"turn 1 \(assistant\), call 0: 'date' is null.*leave it out"):
        render(conversation, tokenizer)


def test_a_call_is_read_by_the_schema_of_its_own_tool(tokenizer: Tokenizer) -> None:
    tools = (Tool("other", "", {"type": "object"}), Tool("w", "", SCHEMA))
    asked = Conversation((Message("user", "?"),), tools)
    turn = Message(
        "assistant", calls=(Call("w", {"unit": "C"}), Call("other", {"unit": None}), Call("no", {"a": None}))
    )
    tokens = render(Conversation((*asked.messages, turn), tools), tokenizer).tokens[len(prompt(asked, tokenizer)) :]
    text = tokenizer.content([token for token in tokens.tolist() if token > 30]).decode()
    assert '{" city": null, " day": null, " unit": " C", " legs": null}' in text
    assert parse_turn(tokens, tokenizer, tools) == turn
