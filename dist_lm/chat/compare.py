"""Compares calls by the rules of the Berkeley Function Calling Leaderboard.

The rules are those of its check of the syntax tree (`bfcl-eval`, `ast_checker.py`): names of tools and arguments are
compared exactly; arguments and keys may have any order; text is compared without case, spaces and ``,./-_*^``, and with
one kind of quotes; lists are compared in order; an integer passes for a number, but not the reverse; true is not 1; an
optional argument may be left out, or given, if its default is the value of the other call. That check stops at the
second level of nesting; here the same rules apply at every level.
"""

import re
from collections.abc import Sequence
from typing import Any

from dist_lm.chat.messages import Call, ChatError, Json, Tool, shown

IGNORED = re.compile(r"[ ,./\-_*^]")
NUMBER_TYPES = {"number", "float", "double"}  # float and double are types of the leaderboard's own schemas


def same_call(call: Call, expected: Call, tool: Tool) -> bool:
    """Returns whether `call` does what `expected` does. `tool` is the tool that `expected` calls."""
    return call.name == expected.name and same_value(call.arguments, expected.arguments, tool.parameters)


def same_calls(calls: Sequence[Call], expected: Sequence[Call], tools: Sequence[Tool]) -> bool:
    """Returns whether the calls are the same in some order, each used once. Two empty lists are the same.

    Args:
        calls: of a model; their names may be any.
        tools: the tools that `expected` calls; their schemas give types and defaults.

    Raises:
        ChatError: a call of `expected` names a tool that is not in `tools`; only looked for if there are as many calls.
    """
    if len(calls) != len(expected):
        return False

    tool_of = {tool.name: tool for tool in tools}
    for expected_call in expected:
        if expected_call.name not in tool_of:
            raise ChatError(f"an expected call names {shown(expected_call.name)}: there is no such tool")
    # A call may fit several expected ones, so taking the first fit could miss a matching.
    fits = [[same_call(call, target, tool_of[target.name]) for call in calls] for target in expected]
    return most_matched(fits) == len(fits)


def same_value(value: Json, expected: Json, schema: Json) -> bool:
    """Returns whether `value` passes for `expected`; the comparison is not symmetric: 1 passes for 1.0 of `expected`.

    Args:
        schema: that of both values; `{}` or any value that is no object if it is unknown.
    """
    schema = _as_object(schema)
    kind = type(expected)
    if kind is dict:
        return type(value) is dict and _same_object(value, expected, schema)

    # Lists are in order and of one length; only the keys of an object may have defaults.
    if kind is list:
        if type(value) is not list or len(value) != len(expected):
            return False
        pairs = enumerate(zip(value, expected, strict=True))
        return all(same_value(part, target, _element_schema(schema, index)) for index, (part, target) in pairs)

    if kind is str:
        return type(value) is str and standard_text(value) == standard_text(expected)

    # An integer passes for a number, but true passes for neither.
    if kind is float or (kind is int and type(value) is float and _is_number(schema)):
        return type(value) in (int, float) and value == expected
    return type(value) is kind and value == expected


def standard_text(text: str) -> str:
    """Returns `text` without the differences that are ignored: April 1, 2024 is april 1 2024."""
    return IGNORED.sub("", text).lower().replace("'", '"')


def _same_object(arguments: dict[str, Json], expected: dict[str, Json], schema: dict[str, Any]) -> bool:
    """Returns whether each argument passes for the expected one, by the schema of the object.

    An argument on one side only counts as its default in the schema; without a default, or if it is required, the
    objects differ.
    """
    schemas = _as_object(schema.get("properties"))
    required = schema.get("required")
    for name in arguments.keys() | expected.keys():
        argument_schema = _as_object(schemas.get(name))
        if not (name in arguments and name in expected):
            is_required = isinstance(required, list) and name in required
            if "default" not in argument_schema or is_required:
                return False
        default = argument_schema.get("default")
        if not same_value(arguments.get(name, default), expected.get(name, default), argument_schema):
            return False
    return True


def _as_object(schema: Json) -> dict[str, Any]:
    """Returns an object as it is, and `{}` for anything else: schemas of models and data sets may have any shape."""
    if isinstance(schema, dict):
        return schema
    return {}


def _element_schema(schema: dict[str, Any], index: int) -> Json:
    """Returns the schema of element `index` of a list."""
    first_schemas = schema.get("prefixItems")
    if isinstance(first_schemas, list) and index < len(first_schemas):
        return first_schemas[index]
    return schema.get("items")


def _is_number(schema: dict[str, Any]) -> bool:
    types = schema.get("type")
    if not isinstance(types, list):
        types = [types]
    return any(isinstance(name, str) and name in NUMBER_TYPES for name in types)


def most_matched(fits: Sequence[Sequence[bool]]) -> int:
    """Returns how many rows at most can each have a fitting column that no other row has: augmenting paths (Kuhn 1955).

    Args:
        fits: fits[row][column]; any number of rows and columns.
    """
    row_of: dict[int, int] = {}  # column -> row

    def match(row: int, visited: set[int]) -> bool:
        """Gives `row` a column in `row_of` and returns True, moving other rows for it; False if there is none.

        `visited` gets the columns that were tried, and those that it has are passed over.
        """
        for column, fit in enumerate(fits[row]):
            if fit and column not in visited:
                visited.add(column)
                # A column that has a row is free if that row can move to another column.
                if column not in row_of or match(row_of[column], visited):
                    row_of[column] = row
                    return True
        return False

    return sum(match(row, set()) for row in range(len(fits)))
