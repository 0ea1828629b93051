"""Tools and calls held against the JSON schema of their arguments."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator, SchemaError, ValidationError, validators
from jsonschema.protocols import Validator

from dist_lm.chat import json_text
from dist_lm.chat.errors import ChatError
from dist_lm.chat.json_text import shown
from dist_lm.chat.messages import Call, Json, Tool
from dist_lm.chat.plain_schema import SCHEMA_LISTS, plain_schema
from dist_lm.chat.rules import check_call, check_tools

NAME = re.compile("[A-Za-z0-9_.-]{1,128}")
LONGEST_SCHEMA = 50_000  # characters of a tool's parameters, in JSON
CACHED = 4096  # schemas that stay ready to use


def check_tool(tool: Tool) -> None:
    """Refuse a tool whose calls could not be checked.

    Its name is 1 to 128 of `A-Z a-z 0-9 _ . -`; its parameters are a valid JSON schema (2020-12) of an object, of at
    most `LONGEST_SCHEMA` characters, within the bounds of `plain_schema`.

    Raises:
        ChatError: it is not so; the message names the tool and the place.
    """
    check_tools((tool,))
    if not NAME.fullmatch(tool.name):
        raise ChatError(f"tool {shown(tool.name)}: expected a name of 1 to 128 letters, digits, _ . or -")
    _validator_of(tool)


def problems(call: Call, tools: Sequence[Tool]) -> list[str]:
    """What is wrong with `call`, a line each that names the argument; none: it can be executed.

    An unknown tool, a missing argument, one that the tool does not have, a value of another type, outside an enum or
    beyond a bound. An integer is what is written without a point: 1.0 is a number only.

    Raises:
        ChatError: `call` is no call (see `rules.check_call`), or `check_tool` would refuse its tool.
    """
    check_call(call, "call")
    json_text.write(call.arguments, f"call of {shown(call.name)}")
    tool = next((tool for tool in tools if tool.name == call.name), None)
    if tool is None:
        return [f"there is no tool {shown(call.name)}"]
    validator = _validator_of(tool)
    try:
        found = [line for error in validator.iter_errors(call.arguments) for line in _lines(error)]
    except (ArithmeticError, RecursionError):
        return ["the arguments are beyond what can be compared with the schema"]
    return list(dict.fromkeys(found))


def _validator_of(tool: Tool) -> Validator:
    where = f"tool {shown(tool.name)}, parameters"
    text = json_text.write(tool.parameters, where)
    if len(text) > LONGEST_SCHEMA:
        raise ChatError(f"{where}: {len(text)} characters; expected at most {LONGEST_SCHEMA}")
    return _validator(text, where)


@lru_cache(CACHED)
def _validator(text: str, where: str) -> Validator:
    """What checks arguments against the schema `text`."""
    schema = plain_schema(json_text.read(text, where), where)
    if type(schema) is not dict or schema.get("type") != "object":
        raise ChatError(f'{where}: expected a schema of "type": "object"')
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise ChatError(f"{where}{_place(error.absolute_path, 'at')}: {_short(error.message)}") from None
    except (ArithmeticError, RecursionError):
        raise ChatError(f"{where}: no schema that can be checked") from None
    if not any(name in schema for name in (*SCHEMA_LISTS, "if")):
        schema.setdefault("properties", {})
        schema.setdefault("additionalProperties", False)  # a function has the arguments it names
    return _Arguments(schema)


def _lines(error: ValidationError) -> Iterator[str]:
    """The error in words; `required` and `additionalProperties` are about arguments inside the place they name."""
    path = list(error.absolute_path)
    value: Any = error.instance
    expected: Any = error.validator_value
    schema: Any = error.schema
    if error.validator == "required":
        yield from (f"argument {_path([*path, name])}: missing" for name in expected if name not in value)
    elif error.validator == "additionalProperties" and expected is False:
        known = schema.get("properties", {})
        yield from (
            f"argument {_path([*path, name])}: the tool has none of that name" for name in value if name not in known
        )
    else:
        yield f"argument{_place(path)}: {_expectation(error.validator, expected, value) or _short(error.message)}"


def _expectation(keyword: Any, expected: Any, value: Json) -> str | None:
    found = f"found {_short(json.dumps(value, ensure_ascii=False))}"
    if keyword == "type":
        return f"expected {' or '.join([expected] if isinstance(expected, str) else expected)}, {found}"
    if keyword == "enum":
        return f"expected one of {_short(json.dumps(expected, ensure_ascii=False))}, {found}"
    if keyword in ("anyOf", "oneOf"):
        return f"expected {'one' if keyword == 'anyOf' else 'exactly one'} of {len(expected)} shapes, {found}"
    return None


def _place(path: Iterable[Any], word: str = "") -> str:
    named = _path(path)
    return f"{' ' + word if word else ''} {named}" if named else "s"


def _path(steps: Iterable[Any]) -> str:
    """`address.lines[2]`."""
    named = ""
    for step in steps:
        if isinstance(step, int):
            named += f"[{step}]"
        else:
            named += ("." if named else "") + (step if re.fullmatch(r"[\w-]{1,64}", step) else shown(step))
    return named


def _short(text: str) -> str:
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= 120 else line[:119] + "…"


def _is_integer(_checker: Any, value: Json) -> bool:
    return type(value) is int


def _unique(_validator: Any, wanted: bool, value: Json, _schema: Any) -> Iterator[ValidationError]:
    """`uniqueItems` in time that grows with the list, where jsonschema compares all pairs."""
    if wanted and type(value) is list and len({json.dumps(item, sort_keys=True) for item in value}) < len(value):
        yield ValidationError("expected no value twice")


_Arguments = validators.extend(
    Draft202012Validator,
    {"uniqueItems": _unique},
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer),
)
