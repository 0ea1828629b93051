"""A JSON schema cut down to what is safe to run: known keywords, references put in place, a bounded size.

A schema comes with a tool, and a tool from anywhere. What could fetch (a reference to elsewhere), recurse (a reference
to itself), take exponential time (a regular expression, references that double) is refused here, so that nothing
behind this module has to be careful.
"""

import re
from typing import Any
from urllib.parse import unquote

from dist_lm.chat.errors import ChatError
from dist_lm.chat.json_text import shown
from dist_lm.chat.messages import Json

DEEPEST_SCHEMA = 24  # schemas inside each other: jsonschema takes a dozen frames for each
MOST_SCHEMAS = 2_000  # in one tool, references put in place

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


def plain_schema(schema: Json, where: str) -> Json:
    """`schema` with nothing in it but what asserts something; an equal one for every value.

    References inside the schema (`#/$defs/...`) are replaced by what they name. Unknown keywords, titles, formats and
    examples are left out: they refuse no value.

    Raises:
        ChatError: it has a keyword of `REFUSED`, a reference to elsewhere or to itself, or is beyond
            `DEEPEST_SCHEMA` or `MOST_SCHEMAS`; the message begins with `where`.
    """
    return _Copy(schema, where).of(schema, ())


class _Copy:
    """One schema being copied."""

    def __init__(self, root: Json, where: str) -> None:
        self._root = root
        self._where = where
        self._count = 0

    def of(self, schema: Json, inside: tuple[str, ...], depth: int = 0) -> Json:
        """A copy of a part of the root. `inside`: references that led here."""
        self._count += 1
        if self._count > MOST_SCHEMAS or depth > DEEPEST_SCHEMA:
            raise ChatError(
                f"{self._where}: expected at most {MOST_SCHEMAS} schemas, {DEEPEST_SCHEMA} inside each other "
                "(references count as what they name)"
            )
        if type(schema) is not dict:
            return schema  # a truth value, or for the meta-schema to refuse
        for keyword, way_out in REFUSED.items():
            if keyword in schema:
                raise ChatError(f"{self._where}: {keyword} is not supported: {way_out}")
        plain: dict[str, Any] = {name: schema[name] for name in ASSERTIONS if name in schema}
        for name in SCHEMA_MAPS:
            if name in schema:
                plain[name] = schema[name]
                if type(schema[name]) is dict:
                    plain[name] = {key: self.of(part, inside, depth + 1) for key, part in schema[name].items()}
        for name in SCHEMA_LISTS:
            if name in schema:
                plain[name] = schema[name]
                if type(schema[name]) is list:
                    plain[name] = [self.of(part, inside, depth + 1) for part in schema[name]]
        for name in SCHEMAS:
            if name in schema:
                plain[name] = self.of(schema[name], inside, depth + 1)
        if "$ref" in schema:
            reference = schema["$ref"]
            if reference in inside:
                raise ChatError(f"{self._where}: $ref {shown(reference)} leads to itself; expected a finite schema")
            target = self.of(self._named(reference), (*inside, reference), depth + 1)
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
