"""Checks tools and calls against the JSON schema (2020-12) of their arguments.

A schema comes with a tool, and a tool may come from anyone. Before it is used, a schema is reduced to what is safe to
run: known keywords, references replaced by their targets, a bounded size. A reference to elsewhere could fetch, a
reference to itself could recurse, and a regular expression could take exponential time: all three are refused.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

from jsonschema import Draft202012Validator, SchemaError, ValidationError, validators
from jsonschema.protocols import Validator

from dist_lm.chat import json_text
from dist_lm.chat.messages import Call, ChatError, Json, Tool, check_call, check_tools, shown

NAME = re.compile("[A-Za-z0-9_.-]{1,128}")
LONGEST_SCHEMA = 50_000  # characters of a tool's parameters, in JSON
CACHED = 4096  # validators of schemas of at most `SHORT_SCHEMA` characters
SHORT_SCHEMA = 4_000
CACHED_LONG = 16  # validators of longer ones: thousands would fill the memory
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
    """Refuses a tool whose calls could not be checked; returns nothing.

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
    """Returns the problems of `call`, one line for each, with the name of the argument; none: it can be executed.

    Problems are an unknown tool, a missing argument, an argument that the tool does not have, and a value of another
    type, outside an enum or beyond a bound. 1.0 is a number, not an integer.

    Raises:
        ChatError: `check_call` refuses `call`, JSON cannot hold its arguments, or the schema of its tool is one that
            `check_tool` refuses.
    """
    check_call(call, "call")
    # Refuses arguments that are no JSON; the text is not needed.
    json_text.write(call.arguments, f"call of {shown(call.name)}")
    tool = next((tool for tool in tools if tool.name == call.name), None)
    if tool is None:
        return [f"there is no tool {shown(call.name)}"]

    validator = _validator_of(tool)
    try:
        lines = [line for error in validator.iter_errors(call.arguments) for line in _lines(error)]
    except (ArithmeticError, RecursionError):
        return ["the arguments are too large to be compared with the schema"]
    # Several keywords may say the same of an argument.
    return list(dict.fromkeys(lines))


def arguments_schema(tool: Tool) -> dict[str, Json]:
    """Returns the schema that the arguments of a call are checked against.

    It is that of the tool, reduced to keywords that assert something, with its references replaced. Arguments that it
    does not name are refused, unless it says otherwise or combines schemas.

    Raises:
        ChatError: the schema is one that `check_tool` refuses.
    """
    schema = _validator_of(tool).schema
    assert isinstance(schema, dict), "that of an object"
    return deepcopy(schema)


def _validator_of(tool: Tool) -> Validator:
    """Returns the validator of a tool's arguments.

    Raises:
        ChatError: the schema is longer than `LONGEST_SCHEMA`, is no JSON, or `_validator` refuses it; the message names
            the tool.
    """
    where = f"tool {shown(tool.name)}, parameters"
    text = json_text.write(tool.parameters, where)
    # The length is checked first: the work below grows with it.
    if len(text) > LONGEST_SCHEMA:
        raise ChatError(f"{where}: {len(text)} characters; expected at most {LONGEST_SCHEMA}")
    if len(text) > SHORT_SCHEMA:
        return _long_validator(text, where)
    return _short_validator(text, where)


@lru_cache(CACHED)
def _short_validator(text: str, where: str) -> Validator:
    return _validator(text, where)


@lru_cache(CACHED_LONG)
def _long_validator(text: str, where: str) -> Validator:
    return _validator(text, where)


def _validator(text: str, where: str) -> Validator:
    """Returns the validator of arguments for the JSON schema `text`.

    Arguments that the schema does not name are refused, unless it says otherwise or combines schemas.

    Raises:
        ChatError: the schema is no JSON, not of an object, invalid, too large, or holds what is not safe to run; the
            message begins with `where`.
    """
    schema = _Reduced(json_text.read(text, where), where).copy()
    if type(schema) is not dict or schema.get("type") != "object":
        raise ChatError(f'{where}: expected a schema of "type": "object"')

    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise ChatError(f"{where}{_place(error.absolute_path, 'at')}: {_short(error.message)}") from None
    except (ArithmeticError, RecursionError):
        raise ChatError(f"{where}: the schema is too large to be checked") from None

    # A function has no other arguments, but a schema that combines others may name them there.
    if not any(name in schema for name in (*SCHEMA_LISTS, "if")):
        schema.setdefault("properties", {})
        schema.setdefault("additionalProperties", False)
    return _Arguments(schema)


class _Reduced:
    """A schema, reduced to the keywords that assert something; valid for the same values.

    References inside the schema (`#/$defs/...`) are replaced by their targets. Unknown keywords, titles, formats and
    examples are left out: they refuse no value.
    """

    def __init__(self, root: Json, where: str) -> None:
        self._root = root
        self._where = where
        self._num_schemas = 0

    def copy(self) -> Json:
        """Returns the reduced schema.

        Raises:
            ChatError: the schema has a keyword of `REFUSED`, a reference to elsewhere or to itself, or exceeds
                `DEEPEST_SCHEMA` or `MOST_SCHEMAS`; the message begins with `where`.
        """
        return self._part(self._root, (), 0)

    def _part(self, schema: Json, references: tuple[str, ...], depth: int) -> Json:
        """Returns a part of the root, reduced to known keywords, with its references replaced; counts its schemas.

        Args:
            schema: the part.
            references: those that led to it.
            depth: nesting of schemas above it, references included.

        Raises:
            ChatError: a keyword of `REFUSED`, a reference to elsewhere or to itself, or too many or too deep schemas.
        """
        self._num_schemas += 1
        if self._num_schemas > MOST_SCHEMAS or depth > DEEPEST_SCHEMA:
            raise ChatError(
                f"{self._where}: expected at most {MOST_SCHEMAS} schemas, {DEEPEST_SCHEMA} nested "
                "(a reference counts as its target)"
            )
        if type(schema) is not dict:
            return schema  # true or false, or a value that the meta-schema refuses
        for keyword, way_out in REFUSED.items():
            if keyword in schema:
                raise ChatError(f"{self._where}: {keyword} is not supported: {way_out}")

        # Values of other types than expected are copied: the meta-schema refuses them by name.
        reduced: dict[str, Any] = {name: schema[name] for name in ASSERTIONS if name in schema}
        for name in SCHEMA_MAPS:
            if name in schema:
                reduced[name] = schema[name]
                if type(schema[name]) is dict:
                    reduced[name] = {key: self._part(part, references, depth + 1) for key, part in schema[name].items()}
        for name in SCHEMA_LISTS:
            if name in schema:
                reduced[name] = schema[name]
                if type(schema[name]) is list:
                    reduced[name] = [self._part(part, references, depth + 1) for part in schema[name]]
        for name in SCHEMAS:
            if name in schema:
                reduced[name] = self._part(schema[name], references, depth + 1)

        # Both the target of a reference and the keywords beside it must hold.
        if "$ref" in schema:
            reference = schema["$ref"]
            if reference in references:
                raise ChatError(f"{self._where}: $ref {shown(reference)} refers to itself; expected a finite schema")
            target = self._part(self._part_at(reference), (*references, reference), depth + 1)
            if not reduced:
                return target
            conjuncts = reduced.setdefault("allOf", [])
            if type(conjuncts) is list:
                conjuncts.append(target)
        return reduced

    def _part_at(self, reference: Json) -> Json:
        """Returns the part of the root at a JSON pointer (RFC 6901), not yet reduced.

        Raises:
            ChatError: `reference` is no pointer into the same schema, or there is no such place.
        """
        if type(reference) is not str or not reference.startswith("#/"):
            raise ChatError(
                f"{self._where}: $ref {shown(reference)}: expected a place in the same schema, such as #/$defs/name"
            )

        # A pointer writes `/` and `~` inside a name as `~1` and `~0`.
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
    """Yields the lines of an error for a reader who did not see the schema.

    For `required` and `additionalProperties` the error names the object, so the name of the argument is added: a line
    for each argument.
    """
    # jsonschema quotes whole objects in these messages, which a model would have to search.
    path = list(error.absolute_path)
    instance: Any = error.instance
    expected: Any = error.validator_value
    schema: Any = error.schema
    if error.validator == "required":
        yield from (f"argument {_path([*path, name])}: missing" for name in expected if name not in instance)
    elif error.validator == "additionalProperties" and expected is False:
        properties = schema.get("properties", {})
        foreign = [name for name in instance if name not in properties]
        yield from (f"argument {_path([*path, name])}: the tool has none of that name" for name in foreign)
    else:
        reason = _expectation(error.validator, expected, instance) or _short(error.message)
        yield f"argument{_place(path)}: {reason}"


def _expectation(keyword: Any, expected: Any, instance: Json) -> str | None:
    """Returns a message `expected ..., found ...` about a value that a keyword refuses.

    It is None for keywords other than type, enum, anyOf and oneOf: the words of jsonschema are good enough.

    Args:
        keyword: of the schema, such as enum.
        expected: its value there.
        instance: the value of the argument; a long one is cut.
    """
    contrast = f"found {_short(json.dumps(instance, ensure_ascii=False))}"
    if keyword == "type":
        types = [expected] if isinstance(expected, str) else expected
        return f"expected {' or '.join(types)}, {contrast}"
    if keyword == "enum":
        return f"expected one of {_short(json.dumps(expected, ensure_ascii=False))}, {contrast}"
    if keyword in ("anyOf", "oneOf"):
        count = "one" if keyword == "anyOf" else "exactly one"
        return f"expected {count} of {len(expected)} shapes, {contrast}"
    return None


def _place(path: Iterable[Any], word: str = "") -> str:
    """Returns the path behind the word `argument`: ` seats[1].row`, or `s` for all arguments."""
    text = _path(path)
    if not text:
        return "s"
    if word:
        return f" {word} {text}"
    return f" {text}"


def _path(steps: Iterable[Any]) -> str:
    """Returns the path of an argument as text: `address.lines[2]`; empty without steps.

    Names that are no plain words are quoted and cut.
    """
    text = ""
    for step in steps:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            name = step if re.fullmatch(r"[\w-]{1,64}", step) else shown(step)
            text += f".{name}"
    return text.removeprefix(".")


def _short(text: str) -> str:
    """Returns `text` in one line of printable characters, cut to 120."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(line) <= 120:
        return line
    return line[:119] + "…"


def _is_integer(_checker: Any, instance: Json) -> bool:
    return type(instance) is int


def _unique(_validator: Any, must_be_unique: bool, instance: Json, _schema: Any) -> Iterator[ValidationError]:
    """Checks `uniqueItems` in linear time; jsonschema compares all pairs."""
    if must_be_unique and type(instance) is list:
        distinct = {json.dumps(element, sort_keys=True) for element in instance}
        if len(distinct) < len(instance):
            yield ValidationError("expected no value twice")


_Arguments = validators.extend(
    Draft202012Validator,
    {"uniqueItems": _unique},
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer),
)
