"""Signatures and docstrings as tools."""

import datetime
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal, Optional

import pytest
from pydantic import Field

from dist_lm.chat.messages import Call
from dist_lm.chat.schema import check_tool, problems
from dist_lm.tools.use.host import SignatureError, tool_of


class Unit(Enum):
    CELSIUS = "celsius"
    FAHRENHEIT = "fahrenheit"


@dataclass
class Point:
    x: float
    y: float


@dataclass
class Tree:
    branches: list["Tree"]


def everything(
    city: str,
    when: datetime.date,
    places: list[Point],
    days: int = 3,
    wind: float = 0.5,
    metric: bool = True,
    unit: Unit = Unit.CELSIUS,
    detail: Literal["short", "long"] = "short",
    limit: Optional[int] = None,  # noqa: UP045
    note: str | None = None,
    options: dict = {},  # noqa: B006
    *,
    anything: Any = None,
) -> None:
    """Weather of a city."""


def test_types_become_a_schema():
    tool = tool_of(everything)
    point = {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "number"}}, "required": ["x", "y"]}
    assert (tool.name, tool.description) == ("everything", "Weather of a city.")
    assert tool.parameters == {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "when": {"type": "string", "format": "date"},
            "places": {"type": "array", "items": point},
            "days": {"type": "integer", "default": 3},
            "wind": {"type": "number", "default": 0.5},
            "metric": {"type": "boolean", "default": True},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
            "detail": {"type": "string", "enum": ["short", "long"], "default": "short"},
            "limit": {"type": "integer"},
            "note": {"type": "string"},
            "options": {"type": "object", "default": {}},
            "anything": {},
        },
        "required": ["city", "when", "places"],
    }
    check_tool(tool)
    right = {"city": "Oslo", "when": "2024-05-03", "places": [{"x": 1, "y": 2.5}]}
    assert problems(Call("everything", right), [tool]) == []
    assert problems(Call("everything", right | {"unit": "kelvin"}), [tool])


def test_what_stands_beside_an_optional_type_is_kept():
    def find(count: Annotated[Optional[int], Field(description="how many", ge=1)] = None) -> list: ...  # noqa: UP045

    assert tool_of(find).parameters["properties"] == {
        "count": {"type": "integer", "minimum": 1, "description": "how many"}
    }


GOOGLE = """Find orders.

    Only those of this year.

    Args:
        name: Of the customer,
            as it is written.
        count (int): At most.

    Returns:
        list: ids
    """
REST = """Find orders.

    Only those of this year.

    :param name: Of the customer, as it is written.
    :param int count: At most.
    :returns: ids
    """


@pytest.mark.parametrize("text", [GOOGLE, REST])
def test_descriptions_come_from_the_docstring(text):
    def find(name: str, count: int = 1, other: int = 2) -> list: ...

    find.__doc__ = text
    tool = tool_of(find)
    assert tool.description == "Find orders. Only those of this year."
    said = {name: schema.get("description") for name, schema in tool.parameters["properties"].items()}
    assert said == {"name": "Of the customer, as it is written.", "count": "At most.", "other": None}


def test_a_function_without_docstring_or_arguments_is_a_tool():
    def now(): ...

    assert tool_of(now).parameters == {"type": "object", "properties": {}, "required": []}


def no_type(x): ...
def several(*x: int): ...
def named(**x: int): ...
def by_place(x: int, /): ...
def no_json(x: object.__class__ = int, *, y: complex = 1j, z: "Socket" = None): ...  # noqa: F821
def callback(x: type(print)): ...
def endless(x: Tree): ...
def pattern(x: Annotated[str, Field(pattern="a+")]): ...
async def later(x: int): ...


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_type, r"no_type\(x\): no type; expected an annotation such as x: int"),
        (several, r"several\(x\): variadic positional"),
        (named, r"named\(x\): variadic keyword"),
        (by_place, r"by_place\(x\): positional-only; expected arguments that are given by name"),
        (no_json, r"no_json: its annotations cannot be read \(NameError: name 'Socket'"),
        (callback, r"callback\(x.*\): "),
        (endless, r"endless\(x\): Tree holds itself"),
        (pattern, "pattern: .*pattern is not supported"),
        (later, "later: expected a plain function"),
    ],
)
def test_what_cannot_be_offered_is_named(function, message):
    with pytest.raises(SignatureError, match=message):
        tool_of(function)
