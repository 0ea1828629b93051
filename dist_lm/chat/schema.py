"""Tools and calls, checked against the JSON schema (2020-12) of their arguments.

A schema comes with a tool, and a tool may come from anyone. Before it is used, a schema is reduced to what is safe to
run: known keywords, references replaced by their targets, a bounded size. A reference to elsewhere could fetch, a
reference to itself could recurse, and a regular expression could take exponential time: all three are refused.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

from jsonschema import Draft202012Validator, SchemaError, ValidationError, validators
from jsonschema.protocols import Validator

from dist_lm.chat import json_text
from dist_lm.chat.messages import Call, ChatError, Json, Tool, check_call, check_tools, shown

NAME = re.compile("[A-Za-z0-9_.-]{1,128}")
LONGEST_SCHEMA = 50_000  # characters of a tool's parameters, in JSON
CACHED = 4096  # validators that are kept
DEEPEST_SCHEMA = 24  # nested schemas: jsonschema takes a dozen frames for each
MOST_SCHEMAS = 2_000  # in one tool, with references replaced

SCHEMA_MAPS = ("properties", "dependentSchemas")
SCHEMA_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems")
SCHEMAS = ("items", "additionalProperties", "propertyNames", "contains", "not", "if", "then", "else")
ASSERTIONS = (
    *("type", "enum", "const", "required", "dependentRequired", "minProperties", "maxProperties"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength"),
    *("minItems", "maxItems", "uniqueItems", "minContains", "maxContains"),
)
REFUSED = {
    "pattern": "a regular expression can take forever: use enum, or say it in the description",
    "patternProperties": "a regular expression can take forever: name the properties",
    "unevaluatedProperties": "use additionalProperties",
    "unevaluatedItems": "use items",
    "$dynamicRef": "use $ref",
    "$recursiveRef": "use $ref",
}


def check_tool(tool: Tool) -> None:
    """Refuse a tool whose calls could not be checked.

    The name must be 1 to 128 of `A-Z a-z 0-9 _ . -`; the parameters must be a valid JSON schema of an object, of at
    most `LONGEST_SCHEMA` characters and `MOST_SCHEMAS` schemas, at most `DEEPEST_SCHEMA` nested, without a keyword of
    `REFUSED`.

    Raises:
        ChatError: the message names the tool and the place in its schema.
    """
    check_tools((tool,))
    if not NAME.fullmatch(tool.name):
        raise ChatError(f"tool {shown(tool.name)}: expected a name of 1 to 128 letters, digits, _ . or -")
    _validator_of(tool)


def problems(call: Call, tools: Sequence[Tool]) -> list[str]:
    """The problems of `call`, one line for each, with the name of the argument; empty if it can be executed.

    Problems are an unknown tool, a missing argument, an argument that the tool does not have, and a value of another
    type, outside an enum or beyond a bound. 1.0 is a number, not an integer.

    Raises:
        ChatError: `check_call` refuses `call`, or `check_tool` its tool.
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
        return ["the arguments are too large to be compared with the schema"]
    return list(dict.fromkeys(found))


def _validator_of(tool: Tool) -> Validator:
    where = f"tool {shown(tool.name)}, parameters"
    text = json_text.write(tool.parameters, where)
    if len(text) > LONGEST_SCHEMA:
        raise ChatError(f"{where}: {len(text)} characters; expected at most {LONGEST_SCHEMA}")
    return _validator(text, where)


@lru_cache(CACHED)
def _validator(text: str, where: str) -> Validator:
    """The validator of arguments for the schema `text`."""
    schema = _Reduced(json_text.read(text, where), where).copy()
    if type(schema) is not dict or schema.get("type") != "object":
        raise ChatError(f'{where}: expected a schema of "type": "object"')
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise ChatError(f"{where}{_place(error.absolute_path, 'at')}: {_short(error.message)}") from None
    except (ArithmeticError, RecursionError):
        raise ChatError(f"{where}: the schema is too large to be checked") from None
    if not any(name in schema for name in (*SCHEMA_LISTS, "if")):
        schema.setdefault("properties", {})
        schema.setdefault("additionalProperties", False)  # a function has no other arguments
    return _Arguments(schema)


class _Reduced:
    """A schema, reduced to the keywords that assert something; valid for the same values.

    References inside the schema (`#/$defs/...`) are replaced by their targets. Unknown keywords, titles, formats and
    examples are left out: they refuse no value.
    """

    def __init__(self, root: Json, where: str) -> None:
        self._root = root
        self._where = where
        self._count = 0

    def copy(self) -> Json:
        """The reduced schema.

        Raises:
            ChatError: it has a keyword of `REFUSED`, a reference to elsewhere or to itself, or exceeds `DEEPEST_SCHEMA`
                or `MOST_SCHEMAS`; the message begins with `where`.
        """
        return self._part(self._root, (), 0)

    def _part(self, schema: Json, inside: tuple[str, ...], depth: int) -> Json:
        """A part of the root; `inside`: the references that led to it."""
        self._count += 1
        if self._count > MOST_SCHEMAS or depth > DEEPEST_SCHEMA:
            raise ChatError(
                f"{self._where}: expected at most {MOST_SCHEMAS} schemas, {DEEPEST_SCHEMA} nested "
                "(a reference counts as its target)"
            )
        if type(schema) is not dict:
            return schema  # true or false, or a value that the meta-schema refuses
        for keyword, way_out in REFUSED.items():
            if keyword in schema:
                raise ChatError(f"{self._where}: {keyword} is not supported: {way_out}")
        plain: dict[str, Any] = {name: schema[name] for name in ASSERTIONS if name in schema}
        for name in SCHEMA_MAPS:
            if name in schema:
                plain[name] = schema[name]
                if type(schema[name]) is dict:
                    plain[name] = {key: self._part(part, inside, depth + 1) for key, part in schema[name].items()}
        for name in SCHEMA_LISTS:
            if name in schema:
                plain[name] = schema[name]
                if type(schema[name]) is list:
                    plain[name] = [self._part(part, inside, depth + 1) for part in schema[name]]
        for name in SCHEMAS:
            if name in schema:
                plain[name] = self._part(schema[name], inside, depth + 1)
        if "$ref" in schema:
            reference = schema["$ref"]
            if reference in inside:
                raise ChatError(f"{self._where}: $ref {shown(reference)} refers to itself; expected a finite schema")
            target = self._part(self._named(reference), (*inside, reference), depth + 1)
            if not plain:
                return target
            others = plain.get("allOf", [])
            plain["allOf"] = [*others, target] if type(others) is list else others
        return plain

    def _named(self, reference: Json) -> Json:
        """The part of the root at a JSON pointer (RFC 6901)."""
        if type(reference) is not str or not reference.startswith("#/"):
            raise ChatError(
                f"{self._where}: $ref {shown(reference)}: expected a place in the same schema, such as #/$defs/name"
            )
        part = self._root
        for step in unquote(reference[2:]).split("/"):
            name = step.replace("~1", "/").replace("~0", "~")
            if type(part) is dict and name in part:
                part = part[name]
            elif type(part) is list and re.fullmatch("[0-9]{1,6}", name) and int(name) < len(part):
                part = part[int(name)]
            else:
                raise ChatError(f"{self._where}: $ref {shown(reference)}: there is no such place in the schema")
        return part


def _lines(error: ValidationError) -> Iterator[str]:
    """The error as lines. `required` and `additionalProperties` name the object, not the argument: it is added."""
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
    """`uniqueItems` in linear time; jsonschema compares all pairs."""
    if wanted and type(value) is list and len({json.dumps(item, sort_keys=True) for item in value}) < len(value):
        yield ValidationError("expected no value twice")


_Arguments = validators.extend(
    Draft202012Validator,
    {"uniqueItems": _unique},
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer),
)
