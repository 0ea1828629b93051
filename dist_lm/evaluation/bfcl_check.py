"""Whether calls are right, as the Berkeley Function Calling Leaderboard decides it. Pure.

After `bfcl_eval/eval_checker/ast_eval/ast_checker.py` (Apache-2.0), its rules for Python, quirks included: an answer
lists the values that each argument may have, "" among them where it may be left out; an integer passes for a float,
but not inside a list; a value may have the type of the answers where that is not the declared one (they call it a
variable), and is then compared as it is.
"""

from collections.abc import Sequence
from typing import Any

from dist_lm.chat.compare import standard_text
from dist_lm.chat.messages import Call, Json

Answer = dict[str, dict[str, list[Json]]]
"""{name of the function: {argument: values that are right}}."""

TYPES: dict[str, type] = {
    "string": str,
    "any": str,
    "integer": int,
    "float": float,
    "number": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
}
LISTS = ("array", "tuple")


def right_calls(calls: Sequence[Call], answers: Sequence[Answer], functions: Sequence[dict[str, Any]]) -> bool:
    """Whether the calls are those of `answers`, each once, in any order. `functions`: as the leaderboard has them."""
    if len(calls) != len(answers):
        return False
    described = {function["name"]: function for function in functions}
    left = list(calls)
    for answer in answers:
        ((name, allowed),) = answer.items()
        same = next(
            (place for place, call in enumerate(left) if right_call(call, name, allowed, described[name])), None
        )
        if same is None:
            return False
        left.pop(same)
    return True


def right_call(call: Call, name: str, allowed: dict[str, list[Json]], function: dict[str, Any]) -> bool:
    """Whether a call is that of `name` with arguments of `allowed`."""
    described = function["parameters"].get("properties", {})
    given = call.arguments
    if call.name != name or any(key not in given for key in function["parameters"].get("required", [])):
        return False
    for key, value in given.items():
        if key not in described or key not in allowed or not _right_value(value, allowed[key], described[key]):
            return False
    return all(key in given or "" in values for key, values in allowed.items())


def _right_value(value: Json, allowed: list[Json], described: dict[str, Any]) -> bool:
    kind = TYPES[described["type"]]
    inner = TYPES[described["items"]["type"]] if described["type"] in LISTS else None
    if described["type"] == "float" and type(value) is int:
        value = float(value)
    type_of_answers = _type_of(allowed)
    is_variable = type_of_answers not in (None, kind)
    if not (type(value) is kind and (inner is None or _items_fit(value, allowed, inner))):
        if type(value) is not type_of_answers:
            return False
        is_variable = True
    if is_variable:
        return value in allowed
    if kind is dict:
        return any(_right_object(value, one) for one in allowed)
    if kind is list and inner is dict:
        return any(_right_objects(value, one) for one in allowed)
    if kind is str:
        return standard_text(value) in [standard_text(one) for one in allowed if isinstance(one, str)]
    if kind is list:
        return _standard_items(value) in [_standard_items(list(one)) for one in allowed]
    return value in allowed


def _type_of(allowed: list[Json]) -> type | None:
    return next((type(one) for one in allowed if one != ""), None)


def _items_fit(value: list[Json], allowed: list[Json], inner: type) -> bool:
    """Whether there is an answer whose items, or the declared type, have the types of all items."""
    return any(
        not isinstance(one, list) or all(type(item) is inner or type(item) is _type_of(one) for item in value)
        for one in allowed
    )


def _right_object(value: dict[str, Json], allowed: Json) -> bool:
    """`allowed`: {key: values that are right}; "" where the argument may be left out, which nothing given is."""
    if not isinstance(allowed, dict):
        return False
    for key, part in value.items():
        if key not in allowed or _standard(part) not in [_standard(one) for one in allowed[key]]:
            return False
    return all(key in value or "" in values for key, values in allowed.items())


def _right_objects(value: list[Json], allowed: Json) -> bool:
    if not isinstance(allowed, list) or len(value) != len(allowed):
        return False
    return all(_right_object(one, other) for one, other in zip(value, allowed, strict=True))


def _standard_items(items: list[Json]) -> list[Json]:
    return [_standard(item) for item in items]


def _standard(value: Json) -> Json:
    return standard_text(value) if isinstance(value, str) else value
