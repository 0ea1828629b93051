"""Calls that ask for the same are the same, however they are written, and no others."""

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_lm.chat.compare import same_call, same_calls, same_value
from dist_lm.chat.messages import Call, ChatError, Json, Tool
from tests.chat.conversations import json_values

TOOL = Tool(
    "f",
    "",
    {
        "type": "object",
        "properties": {
            "day": {"type": "string"},
            "count": {"type": "integer"},
            "price": {"type": "number"},
            "unit": {"type": "string", "default": "km"},
            "where": {
                "type": "object",
                "properties": {"x": {"type": "number"}, "zone": {"type": "string", "default": "UTC"}},
                "required": ["x"],
            },
            "needed": {"type": "integer", "default": 1},
        },
        "required": ["day", "needed"],
    },
)


def call(**arguments: Json) -> Call:
    return Call("f", {"day": "April 1, 2024", "needed": 1, **arguments})


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (call(), Call("f", {"needed": 1, "day": "april 1 2024"})),
        (call(day="APRIL-1_2024."), call()),
        (call(day="it's"), call(day='it"s')),
        (call(price=3), call(price=3.0)),
        (call(price=3.0), call(price=3)),
        (call(unit="km"), call()),
        (call(), call(unit="KM")),
        (call(where={"zone": "utc", "x": 1}), call(where={"x": 1.0})),
        (call(tags=["A b", 1]), call(tags=["ab", 1.0])),
        (call(note=None), call(note=None)),
    ],
)
def test_the_same(found: Call, expected: Call) -> None:
    assert same_call(found, expected, TOOL)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (Call("F", call().arguments), call()),
        (call(day="April 2, 2024"), call()),
        (call(Day="x"), call(day="x")),
        (call(count=3.0), call(count=3)),
        (call(count="3"), call(count=3)),
        (call(count=True), call(count=1)),
        (call(price=True), call(price=1)),
        (call(flag=1), call(flag=True)),
        (call(flag=0), call(flag=None)),
        (call(unit="mile"), call()),
        (call(), call(unit="mile")),
        (call(count=1), call()),
        (Call("f", {"day": "April 1, 2024"}), call()),  # required, whatever its default
        (call(where={"x": 1, "y": 2}), call(where={"x": 1})),
        (call(where={}), call(where={"x": 1})),
        (call(where=[1]), call(where={"x": 1})),
        (call(tags=["b", "a"]), call(tags=["a", "b"])),
        (call(tags=["a"]), call(tags=["a", "a"])),
    ],
)
def test_not_the_same(found: Call, expected: Call) -> None:
    assert not same_call(found, expected, TOOL)


@pytest.mark.heavy
@settings(max_examples=150)
@given(value=json_values, other=json_values)
def test_a_value_is_the_same_as_itself_and_nothing_is_raised(value: Json, other: Json) -> None:
    assert same_value(value, value, {})
    assert same_value(value, other, {}) in (True, False)
    assert same_value(value, other, other) in (True, False)  # nor by a schema that is none


def test_calls_in_any_order_each_used_once() -> None:
    calls = [call(count=n // 2) for n in range(6)]
    shuffled = Random(0).sample(calls, len(calls))
    assert same_calls(shuffled, calls, [TOOL])
    assert same_calls([], [], [])
    assert not same_calls(shuffled[1:], calls, [TOOL])
    assert not same_calls([*shuffled[1:], shuffled[1]], calls, [TOOL])


@settings(max_examples=50)
@given(order=st.permutations(range(3)), swap=st.booleans())
def test_a_call_that_fits_two_leaves_one_to_the_other(order: Any, swap: bool) -> None:
    tags = [[1.0], [1], [2]]  # 1 passes for 1.0 and for 1; 1.0 for itself only
    expected = [call(tags=tags[n]) for n in order]
    found = [call(tags=[1]), call(tags=[1.0]), call(tags=[2])]
    assert same_calls(found[::-1] if swap else found, expected, [TOOL])


def test_an_expected_call_is_of_a_known_tool() -> None:
    with pytest.raises(ChatError, match="no such tool"):
        same_calls([call()], [call()], [])
