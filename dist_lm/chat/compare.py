"""Whether two calls ask for the same, by the rules of the Berkeley Function Calling Leaderboard.

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
NUMBER_TYPES = {"number", "float", "double"}  # the last two are types of the leaderboard's own schemas


def same_call(found: Call, expected: Call, tool: Tool) -> bool:
    """Whether `found` does what `expected` does. `tool`: the tool that `expected` calls."""
    return found.name == expected.name and same_value(found.arguments, expected.arguments, tool.parameters)


def same_calls(found: Sequence[Call], expected: Sequence[Call], tools: Sequence[Tool]) -> bool:
    """Whether the calls are the same in some order, each used once.

    Raises:
        ChatError: a call of `expected` names a tool that is not in `tools`.
    """
    if len(found) != len(expected):
        return False
    by_name = {tool.name: tool for tool in tools}
    for call in expected:
        if call.name not in by_name:
            raise ChatError(f"an expected call names {shown(call.name)}: there is no such tool")
    fits = [[same_call(one, other, by_name[other.name]) for one in found] for other in expected]
    return _all_matched(fits)


def same_value(found: Json, expected: Json, schema: Json) -> bool:
    """Whether `found` passes for `expected`. `schema`: the schema of both values; `{}` if it is unknown."""
    schema = schema if isinstance(schema, dict) else {}
    kind = type(expected)
    if kind is dict:
        return type(found) is dict and _same_object(found, expected, schema)
    if kind is list:
        if type(found) is not list or len(found) != len(expected):
            return False
        return all(
            same_value(one, other, _item_schema(schema, place))
            for place, (one, other) in enumerate(zip(found, expected, strict=True))
        )
    if kind is str:
        return type(found) is str and standard_text(found) == standard_text(expected)
    if kind is float or (kind is int and type(found) is float and _is_number(schema)):
        return type(found) in (int, float) and found == expected
    return type(found) is kind and found == expected


def standard_text(text: str) -> str:
    """`text` without the differences that are ignored: April 1, 2024 is april 1 2024."""
    return IGNORED.sub("", text).lower().replace("'", '"')


def _same_object(found: dict[str, Json], expected: dict[str, Json], schema: dict[str, Any]) -> bool:
    schemas = schema.get("properties")
    required = schema.get("required")
    for name in found.keys() | expected.keys():
        part = schemas.get(name) if isinstance(schemas, dict) else None
        part = part if isinstance(part, dict) else {}
        if not (name in found and name in expected):
            optional = "default" in part and not (isinstance(required, list) and name in required)
            if not optional:
                return False
        if not same_value(found.get(name, part.get("default")), expected.get(name, part.get("default")), part):
            return False
    return True


def _item_schema(schema: dict[str, Any], place: int) -> Json:
    """The schema of item `place` of a list."""
    first = schema.get("prefixItems")
    if isinstance(first, list) and place < len(first):
        return first[place]
    return schema.get("items")


def _is_number(schema: dict[str, Any]) -> bool:
    kinds = schema.get("type")
    return any(
        kind in NUMBER_TYPES for kind in (kinds if isinstance(kinds, list) else [kinds]) if isinstance(kind, str)
    )


def _all_matched(fits: Sequence[Sequence[bool]]) -> bool:
    """Whether every row can be matched to a fitting column of its own: augmenting paths (Kuhn 1955)."""
    row_of: dict[int, int] = {}

    def place(row: int, tried: set[int]) -> bool:
        for column, fit in enumerate(fits[row]):
            if fit and column not in tried:
                tried.add(column)
                if column not in row_of or place(row_of[column], tried):
                    row_of[column] = row
                    return True
        return False

    return all(place(row, set()) for row in range(len(fits)))
