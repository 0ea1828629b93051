"""Which tools can be checked, and what is said about a call that does not fit one."""

import socket
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_lm.chat.messages import Call, ChatError, Json, Tool
from dist_lm.chat.schema import DEEPEST_SCHEMA, check_tool, problems
from tests.chat.conversations import json_objects, json_values

BOOK = Tool(
    "travel.book-seat_2",
    "Books.",
    {
        "type": "object",
        "title": "Booking",
        "properties": {
            "city": {"type": "string", "minLength": 2, "format": "city"},
            "days": {"type": "integer", "minimum": 1},
            "price": {"type": "number"},
            "unit": {"enum": ["km", "mile"]},
            "pattern": {"type": "boolean", "description": "an argument may be named like a keyword"},
            "seats": {"type": "array", "items": {"$ref": "#/$defs/seat"}, "uniqueItems": True},
        },
        "required": ["city", "days"],
        "$defs": {"seat": {"type": "object", "properties": {"row": {"type": "integer"}}, "required": ["row"]}},
    },
)
GOOD = {"city": "Oslo", "days": 2, "price": 3, "pattern": True, "seats": [{"row": 1}, {"row": 2}]}


def test_a_call_that_fits_has_no_problems() -> None:
    check_tool(BOOK)
    assert problems(Call(BOOK.name, GOOD), [BOOK]) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"city": None}, "argument city: expected string, found null"),
        ({"city": "X"}, "argument city: 'X' is too short"),
        ({"days": "2"}, 'argument days: expected integer, found "2"'),
        ({"days": 2.0}, "argument days: expected integer, found 2.0"),
        ({"days": True}, "argument days: expected integer, found true"),
        ({"price": False}, "argument price: expected number, found false"),
        ({"unit": "m"}, 'argument unit: expected one of ["km", "mile"], found "m"'),
        ({"hotel": "x"}, "argument hotel: the tool has none of that name"),
        ({"a\nb": "x"}, r"argument 'a\nb': the tool has none of that name"),
        ({"seats": [{"row": 1}, {}]}, "argument seats[1].row: missing"),
        ({"seats": [{"row": "a"}]}, 'argument seats[0].row: expected integer, found "a"'),
        ({"seats": [{"row": 1}, {"row": 1}]}, "argument seats: expected no value twice"),
    ],
)
def test_a_problem_is_one_line_that_names_the_argument(change: dict[str, Json], said: str) -> None:
    assert problems(Call(BOOK.name, GOOD | change), [BOOK]) == [said]


def test_every_missing_argument_is_named_once() -> None:
    assert problems(Call(BOOK.name), [BOOK]) == ["argument city: missing", "argument days: missing"]


def test_an_unknown_tool_is_the_only_problem() -> None:
    assert problems(Call("travel", {"x": 1}), [BOOK]) == ["there is no tool 'travel'"]


def test_a_tool_says_whether_it_takes_other_arguments() -> None:
    bare = Tool("now", "", {"type": "object"})
    open_ = Tool("log", "", {"type": "object", "additionalProperties": {"type": "string"}})
    assert problems(Call("now"), [bare]) == []
    assert problems(Call("now", {"x": 1}), [bare]) == ["argument x: the tool has none of that name"]
    assert problems(Call("log", {"x": "a"}), [open_]) == []
    assert problems(Call("log", {"x": 1}), [open_]) == ["argument x: expected string, found 1"]


def argument(schema: Json, **more: Json) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": schema}, **more}


def nested(depth: int) -> dict[str, Any]:
    return argument(nested(depth - 1)) if depth else {"type": "object"}


DOUBLING = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)} | {"d30": {}}


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({}, 'expected a schema of "type": "object"'),
        ({"type": "array"}, 'expected a schema of "type": "object"'),
        ({"$ref": "#/$defs/x", "$defs": {"x": True}}, 'expected a schema of "type": "object"'),
        (argument({"type": "strng"}), "at properties.a.type"),
        (argument({"multipleOf": 0}), "at properties.a.multipleOf"),
        (argument({"allOf": 1, "$ref": "#/$defs/x"}, **{"$defs": {"x": {}}}), "at properties.a.allOf"),
        ({"type": "object", "properties": []}, "at properties"),
        ({"type": "object", "required": "a"}, "at required"),
        (argument({"pattern": "(a+)+$"}), "pattern is not supported"),
        (argument({"patternProperties": {"(a+)+$": {}}}), "patternProperties is not supported"),
        (argument({"$ref": "http://127.0.0.1/x.json"}), "expected a place in the same schema"),
        (argument({"$ref": "file:///etc/passwd"}), "expected a place in the same schema"),
        (argument({"$ref": ["#/x"]}), "expected a place in the same schema"),
        (argument({"$dynamicRef": "http://127.0.0.1/x.json"}), "use $ref"),
        (argument({"$ref": "#/$defs/none"}), "there is no such place"),
        (argument({"$ref": "#/properties/a"}), "refers to itself"),
        (argument({"$ref": "#/$defs/d0"}, **{"$defs": DOUBLING}), "expected at most"),
        (nested(DEEPEST_SCHEMA + 1), "expected at most"),
        (argument({"description": "x" * 60_000}), "characters; expected at most"),
        (argument({"enum": [float("nan")]}), "nan is not JSON"),
    ],
)
def test_a_schema_that_is_wrong_or_could_harm_is_refused(
    parameters: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "socket", None)  # nothing is fetched
    for use in (check_tool, lambda tool: problems(Call("f"), [tool])):
        with pytest.raises(ChatError) as refused:
            use(Tool("f", "", parameters))
        assert said in str(refused.value)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "é", "a" * 129, "a\n", "<|im_end|>"])
def test_a_tool_has_a_plain_name(name: str) -> None:
    with pytest.raises(ChatError, match="name"):
        check_tool(Tool(name, "", {"type": "object"}))


def test_the_deepest_schema_is_checked_all_the_way() -> None:
    value: Json = 1
    for _ in range(DEEPEST_SCHEMA):
        value = {"a": value}
    tool = Tool("f", "", nested(DEEPEST_SCHEMA))
    assert problems(Call("f", value), [tool]) == [
        f"argument {'.'.join('a' * DEEPEST_SCHEMA)}: expected object, found 1"
    ]


def test_numbers_beyond_floats_are_no_accident() -> None:
    tool = Tool("f", "", argument({"multipleOf": 0.5}))
    assert problems(Call("f", {"a": 10**600}), [tool]) != []


KEYWORDS = ("type", "properties", "items", "enum", "required", "anyOf", "allOf", "not", "$ref", "additionalProperties")
schemas = st.recursive(
    st.one_of(st.booleans(), json_values, st.sampled_from(["string", "integer", "object", "#/properties", "#/x"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2),
        st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=3),
    ),
    max_leaves=10,
)


@pytest.mark.heavy
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(parts=st.dictionaries(st.sampled_from(KEYWORDS), schemas, max_size=4), arguments=json_objects)
def test_any_schema_checks_any_arguments_or_is_refused(parts: dict[str, Any], arguments: dict[str, Json]) -> None:
    refused = False
    lines: list[str] = []
    try:
        lines = problems(Call("f", arguments), [Tool("f", "", {**parts, "type": "object"})])
    except ChatError:
        refused = True
    assert refused or all(len(line.splitlines()) == 1 for line in lines)
