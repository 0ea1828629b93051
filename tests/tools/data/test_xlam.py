"""Rows of xLAM as conversations."""

import json

import pytest

from dist_lm.chat.messages import Call, Message, check_conversation
from dist_lm.chat.schema import problems
from dist_lm.tools.data.xlam import RowError, conversation_of_row, schema_of_type

ROW = {
    "id": 7,
    "query": "Which ferries leave Oslo after 09:30, and what do two seats cost?",
    "tools": json.dumps(
        [
            {
                "name": "ferry_times",
                "description": "Departures of ferries.",
                "parameters": {
                    "port": {"description": "Where from.", "type": "str"},
                    "after": {"description": "Clock.", "type": "str, optional", "default": "00:00"},
                    "stops": {"description": "On the way.", "type": "List[str], optional"},
                },
            },
            {
                "name": "fare",
                "description": "Price of seats.",
                "parameters": {"seats": {"description": "How many.", "type": "int"}},
            },
        ]
    ),
    "answers": json.dumps(
        [
            {"name": "ferry_times", "arguments": {"port": "Oslo", "after": "09:30"}},
            {"name": "fare", "arguments": {"seats": 2}},
        ]
    ),
}


def test_a_null_where_the_type_has_none_is_an_argument_that_is_not_given():
    calls = [{"name": "ferry_times", "arguments": {"port": "Oslo", "after": None, "stops": None}}]
    answer = conversation_of_row({**ROW, "answers": json.dumps(calls)}).messages[1]
    assert answer.calls == (Call("ferry_times", {"port": "Oslo"}),)


def test_a_row_is_a_request_and_its_calls():
    conversation = conversation_of_row(ROW)
    check_conversation(conversation)
    user, assistant = conversation.messages
    assert user == Message("user", ROW["query"])
    assert assistant.calls == (
        Call("ferry_times", {"port": "Oslo", "after": "09:30"}),
        Call("fare", {"seats": 2}),
    )
    ferry, fare = conversation.tools
    assert ferry.parameters == {
        "type": "object",
        "properties": {
            "port": {"type": "string", "description": "Where from."},
            "after": {"type": "string", "description": "Clock.", "default": "00:00"},
            "stops": {"type": "array", "items": {"type": "string"}, "description": "On the way."},
        },
        "required": ["port"],
    }
    assert fare.parameters["required"] == ["seats"]
    for call in assistant.calls:
        assert problems(call, conversation.tools) == []


def test_no_calls_is_that_no_tool_fits():
    answer = conversation_of_row({**ROW, "answers": "[]"}).messages[-1]
    assert answer.content
    assert not answer.calls


@pytest.mark.parametrize(
    ("text", "schema"),
    [
        ("str", {"type": "string"}),
        ("int, optional", {"type": "integer"}),
        ("List[int]", {"type": "array", "items": {"type": "integer"}}),
        ("List[List[float]]", {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}),
        ("Optional[bool]", {"type": "boolean"}),
        ("Union[int, str]", {"anyOf": [{"type": "integer"}, {"type": "string"}]}),
        ("Dict[str, Any]", {"type": "object"}),
        ("Tuple[float, float]", {"type": "array", "items": {"type": "number"}}),
        ("Callable[[float], float]", {}),
        ("datetime", {}),
    ],
)
def test_types_of_python_are_types_of_json(text, schema):
    assert schema_of_type(text) == schema


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("query", ""),
        ("query", None),
        ("tools", "{"),
        ("tools", '[{"name": 3}]'),
        ("tools", "[]"),
        ("answers", '[{"name": "ferry_times"}]'),
        ("answers", "[3]"),
        ("answers", None),
    ],
)
def test_a_row_of_another_shape_is_refused(column, value):
    with pytest.raises(RowError, match=column if value != "[]" else "answers"):
        conversation_of_row({**ROW, column: value})
