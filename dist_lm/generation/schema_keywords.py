"""The part of JSON Schema that constrained answers hold to; everything else is refused by its keyword.

llguidance, which follows the schema, ignores keywords that it does not know. An answer would then break a schema that
nobody refused.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema import SchemaError as InvalidSchemaError

from dist_lm.errors import UserError

# Keywords that say nothing about a value.
NOTES = {
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
    *("$schema", "$id", "$comment", "$defs", "definitions", "discriminator"),
}
# Keywords whose value is a schema, a list of schemas, or an object of schemas.
OF_SCHEMA = {"items", "additionalProperties"}
OF_SCHEMAS = {"anyOf", "allOf", "oneOf", "prefixItems"}
OF_NAMED_SCHEMAS = {"properties", "patternProperties", "$defs", "definitions"}
PLAIN = {
    *("type", "enum", "const", "required", "$ref", "pattern", "format"),
    *("minLength", "maxLength", "minItems", "maxItems"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
OF_PARTS = OF_SCHEMA | OF_SCHEMAS | OF_NAMED_SCHEMAS
TYPES = {"null", "boolean", "object", "array", "number", "integer", "string"}
KNOWN = NOTES | OF_SCHEMA | OF_SCHEMAS | OF_NAMED_SCHEMAS | PLAIN
# Formats whose texts jsonschema accepts, too.
FORMATS = {"date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"}
DEEPEST = 64  # schemas inside each other
# A schema may leave numbers without bounds, but Python reads 1e999 as infinity, which is no JSON. 64 bits hold these.
LARGEST = 9 * 10**18
BOUNDS = {"minimum": -LARGEST, "maximum": LARGEST}
LOWER, UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
MOST_REMAINDERS = 1000
NUMBERS = {"const", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
ANYTHING = "any JSON value"  # name of the definition that stands for a schema without keywords


class SchemaError(UserError):
    """A schema that answers cannot hold to."""


def check_schema(schema: Any) -> None:
    """Refuses a schema with a keyword that answers would not hold to; returns nothing.

    Raises:
        SchemaError: the message names the keyword and its place.
    """
    parts = list(_parts(schema, "#", 0))
    try:
        # The validator takes 35 ms for 20 KB, so it is asked only about schemas that are not plainly valid.
        if not all(is_plainly_valid(part) for _, part in parts):
            Draft202012Validator.check_schema(schema)
    except InvalidSchemaError as error:
        raise SchemaError(f"#{''.join(f'/{step}' for step in error.absolute_path)}: {error.message[:200]}") from None

    for place, part in parts:
        for keyword in part:
            if keyword not in KNOWN:
                raise SchemaError(f"{place}/{keyword}: this keyword is not supported: remove it")

        for keyword in NUMBERS & part.keys():
            if (number := _too_large(part[keyword])) is not None:
                raise SchemaError(
                    f"{place}/{keyword}: {number:.4g}; expected numbers of at most {LARGEST:.0e}, which 64 bits hold"
                )

        # The automaton of multiples has a state for each remainder: at 2 ** 31 the process runs out of memory.
        if "multipleOf" in part and _numerator(part["multipleOf"]) > MOST_REMAINDERS:
            raise SchemaError(
                f"{place}/multipleOf: {part['multipleOf']:g}; expected at most {MOST_REMAINDERS}, with few decimals"
            )

        text_format = part.get("format", "date")
        if text_format not in FORMATS:
            accepted = ", ".join(sorted(FORMATS))
            raise SchemaError(f"{place}/format: {text_format!r} is not supported; expected one of {accepted}")
        reference = part.get("$ref", "#")
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise SchemaError(f"{place}/$ref: {reference!r} lies outside the schema: copy it into $defs")

        # An answer that fits two branches breaks oneOf, and a grammar cannot tell.
        if "oneOf" in part and not _exclude_each_other(part["oneOf"], schema):
            raise SchemaError(
                f"{place}/oneOf: more than one branch may fit: give each another type, or a required property with "
                "another const; or use anyOf"
            )


def loosened(schema: Any) -> Any:
    """Returns a copy of a schema without the keywords that `check_schema` refuses: every value of the schema fits it,
    and more. `oneOf` becomes `anyOf`."""
    if not isinstance(schema, Mapping):
        return schema

    loose: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword in OF_SCHEMA:
            loose[keyword] = loosened(value)
        elif keyword in OF_SCHEMAS:
            loose[keyword] = [loosened(part) for part in value]
        elif keyword in OF_NAMED_SCHEMAS:
            loose[keyword] = {name: loosened(part) for name, part in value.items()}
        elif keyword in KNOWN and not _is_refused(keyword, value):
            loose[keyword] = value

    # Beside an `anyOf` of the schema itself, its `oneOf` cannot become another one.
    branches = loose.pop("oneOf", None)
    if branches is not None and "anyOf" not in loose:
        loose["anyOf"] = branches
    return loose


def _is_refused(keyword: str, value: Any) -> bool:
    """Returns whether `check_schema` refuses a keyword that it knows for its value."""
    if keyword in NUMBERS and _too_large(value) is not None:
        return True
    if keyword == "multipleOf":
        return _numerator(value) > MOST_REMAINDERS
    return keyword == "format" and value not in FORMATS


def bounded(schema: Any) -> Any:
    """Returns a copy of a schema with bounds for numbers: `LARGEST` and its negative, at each end that has no bound.

    A part that allows any JSON value becomes a reference to the definition `ANYTHING`, whose numbers are bounded, too.
    The copy gets it in its own `$defs`, so it must stay the root of a document.

    Args:
        schema: one that `check_schema` accepts.
    """
    uses_anything = False

    def part(value: Any) -> Any:
        nonlocal uses_anything
        if value is True or (isinstance(value, Mapping) and not value.keys() - NOTES):
            uses_anything = True
            return {"$ref": f"#/$defs/{ANYTHING}"}
        if not isinstance(value, Mapping):
            return value

        copied = dict(value)
        for keyword in value:
            if keyword in OF_SCHEMA:
                copied[keyword] = part(value[keyword])
            elif keyword in OF_SCHEMAS:
                copied[keyword] = [part(subschema) for subschema in value[keyword]]
            elif keyword in OF_NAMED_SCHEMAS:
                copied[keyword] = {name: part(subschema) for name, subschema in value[keyword].items()}
        if "number" in _types(value):
            for keyword, bounds in (("minimum", LOWER), ("maximum", UPPER)):
                if not any(bound in value for bound in bounds):
                    copied[keyword] = BOUNDS[keyword]
        return copied

    copied = part(schema)
    if uses_anything and isinstance(copied, dict):
        anything = {"$ref": f"#/$defs/{ANYTHING}"}
        numbers = {"type": "number"} | BOUNDS
        values = [{"type": ["null", "boolean", "string"]}, numbers, {"type": "array", "items": anything}]
        values.append({"type": "object", "additionalProperties": anything})
        copied["$defs"] = {**copied.get("$defs", {}), ANYTHING: {"anyOf": values}}
    return copied


def is_plainly_valid(part: Mapping[str, Any]) -> bool:
    """Returns whether every keyword of a schema has a value of its usual type; what stands inside is not looked at.

    False says nothing: the rules for schemas allow more, such as 2.0 where a length is expected.
    """
    return all(
        keyword in OF_PARTS or (keyword in USUAL_TYPES and USUAL_TYPES[keyword](value))
        for keyword, value in part.items()
    )


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_length(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


USUAL_TYPES: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("title", "description", "pattern", "format"), _is_text),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), _is_length),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _is_number),
    "type": lambda value: type(value) is str and value in TYPES,
    "enum": lambda value: type(value) is list,
    "const": lambda value: True,
    "default": lambda value: True,
    "required": lambda value: type(value) is list and all(map(_is_text, value)) and len({*value}) == len(value),
}


def _parts(schema: Any, place: str, depth: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields every schema inside a schema with its place, itself first.

    Raises:
        SchemaError: a part is no schema, or lies too deep.
    """
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise SchemaError(f"{place}: {type(schema).__name__}; expected a schema, which is an object")
    if depth > DEEPEST:
        raise SchemaError(f"{place}: more than {DEEPEST} schemas inside each other")
    yield place, schema

    for keyword, value in schema.items():
        inside: Sequence[tuple[str, Any]] = ()
        if keyword in OF_SCHEMA:
            inside = [("", value)]
        elif keyword in OF_SCHEMAS:
            if not isinstance(value, list) or not value:
                raise SchemaError(f"{place}/{keyword}: expected a list of schemas")
            inside = [(f"/{index}", part) for index, part in enumerate(value)]
        elif keyword in OF_NAMED_SCHEMAS:
            if not isinstance(value, Mapping):
                raise SchemaError(f"{place}/{keyword}: expected an object of schemas")
            inside = [(f"/{name}", part) for name, part in value.items()]
        for name, part in inside:
            yield from _parts(part, f"{place}/{keyword}{name}", depth + 1)


def _too_large(value: Any) -> float | None:
    """Returns a number in a JSON value that is larger than `LARGEST`; None if there is none.

    llguidance 1.9 ends the process at a constant of -2 ** 63.
    """
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        return next((number for entry in value if (number := _too_large(entry)) is not None), None)
    if isinstance(value, int | float) and not abs(value) <= LARGEST:
        return float(value)
    return None


def _numerator(number: float) -> int:
    """Returns a decimal number without its point: 0.25 gives 25."""
    digits = Decimal(repr(number)).as_tuple()
    assert isinstance(digits.exponent, int)
    return int("".join(map(str, digits.digits))) * 10 ** max(0, digits.exponent)


def _exclude_each_other(branches: Sequence[Any], root: Any) -> bool:
    """Returns whether no value fits two branches: by their types, or by a property that all require."""
    resolved = [_resolved(branch, root) for branch in branches]
    if not all(isinstance(branch, Mapping) for branch in resolved):
        return len(branches) == 1

    types = [_types(branch) for branch in resolved]
    if all(types) and _are_disjoint(types):
        return True
    shared = set.intersection(*(set(branch.get("required", ())) for branch in resolved))
    for name in sorted(shared):
        values = [_constants(_resolved(branch.get("properties", {}).get(name), root)) for branch in resolved]
        if all(values) and _are_disjoint(values):
            # A value that is no object would fit all branches.
            return all(types) and all(branch_types == {"object"} for branch_types in types)
    return False


def _resolved(schema: Any, root: Any) -> Any:
    """Returns what a schema of nothing but a reference into `root` refers to; other schemas as they are."""
    n_followed = 0
    while isinstance(schema, Mapping) and isinstance(schema.get("$ref"), str) and n_followed < DEEPEST:
        target: Any = root
        for name in schema["$ref"].lstrip("#").split("/")[1:]:
            name = name.replace("~1", "/").replace("~0", "~")
            target = target.get(name) if isinstance(target, Mapping) else None
        schema, n_followed = target, n_followed + 1
    return schema


def _types(schema: Mapping[str, Any]) -> set[str]:
    """Returns the types that a value may have; empty: any. An integer is a number, too."""
    named = schema.get("type", [])
    types = {named} if isinstance(named, str) else set(named)
    return types | {"number"} if "integer" in types else types


def _constants(schema: Any) -> set[str]:
    """Returns the only values of a schema, as Python writes them; empty if it has others."""
    if not isinstance(schema, Mapping):
        return set()
    if "const" in schema:
        return {repr(schema["const"])}
    return {repr(value) for value in schema.get("enum", ())}


def _are_disjoint(sets: Sequence[set[str]]) -> bool:
    return sum(map(len, sets)) == len(set().union(*sets))
