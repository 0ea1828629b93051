"""Rows of `Salesforce/xlam-function-calling-60k` (and mirrors in its format) as conversations.

A row has a request (`query`) and two JSON texts: the offered tools (`tools`: name, description, and for each parameter
a Python type, a description and a default) and the calls that answer the request (`answers`: name, arguments). The set
has no results of calls, so a conversation ends with its calls.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from dist_lm.chat.messages import Call, Conversation, Json, Message, Tool
from dist_lm.errors import UserError

TYPES: dict[str, dict[str, Json]] = {
    "str": {"type": "string"},
    "string": {"type": "string"},
    "int": {"type": "integer"},
    "integer": {"type": "integer"},
    "float": {"type": "number"},
    "number": {"type": "number"},
    "complex": {"type": "string"},
    "bool": {"type": "boolean"},
    "boolean": {"type": "boolean"},
    "list": {"type": "array"},
    "array": {"type": "array"},
    "tuple": {"type": "array"},
    "set": {"type": "array"},
    "dict": {"type": "object"},
    "object": {"type": "object"},
    "any": {},
    "none": {"type": "null"},
}
NOTHING_FITS = "None of my tools can do that."
GENERIC = re.compile(r"(\w+)\s*\[(.*)\]$", re.DOTALL)


class RowError(UserError):
    """A row that is not in the format; the message names the column and the error."""


def conversation_of_row(row: Mapping[str, Any]) -> Conversation:
    """Returns the request of `row` and the calls that answer it; without calls, the answer says that no tool fits.

    Raises:
        RowError: a column is missing, is not JSON, or does not have the form above, or a call is to none of the tools;
            the message names the column.
    """
    query = row.get("query")
    if not isinstance(query, str) or not query:
        raise RowError("query: expected text")

    tools = tuple(_tool(entry) for entry in _objects(row, "tools"))
    calls = tuple(_call(entry) for entry in _objects(row, "answers"))

    schemas = {tool.name: tool.parameters for tool in tools}

    # A model cannot learn to call a tool that it is not offered.
    unknown = {call.name for call in calls} - schemas.keys()
    if unknown:
        raise RowError(f"answers: call {min(unknown)}, which is not among the tools")

    # The set writes null where it means that an argument is absent.
    calls = tuple(_without_nulls(call, schemas[call.name]) for call in calls)
    answer = Message("assistant", calls=calls) if calls else Message("assistant", NOTHING_FITS)
    return Conversation((Message("user", query), answer), tools)


def _without_nulls(call: Call, schema: dict[str, Json]) -> Call:
    """Returns `call` without nulls where the type of the argument has no null: they stand for absent arguments."""
    takes_null = {
        name for name, property_schema in schema["properties"].items() if property_schema.get("type", "null") == "null"
    }
    arguments = {name: value for name, value in call.arguments.items() if value is not None or name in takes_null}
    return Call(call.name, arguments)


def schema_of_type(text: str) -> dict[str, Json]:
    """Returns the JSON schema of a Python type: `List[int]` is an array of integers, `str, optional` a string.

    Empty, which allows every value, for a type that it does not know.
    """
    text = text.strip().removesuffix("optional").rstrip(" ,").strip()

    generic = GENERIC.match(text)
    if generic is None:
        return dict(TYPES.get(text.lower(), {}))

    name = generic[1].lower()
    types = _split(generic[2])
    if name == "optional":
        return schema_of_type(types[0])
    if name == "union":
        options = [schema for schema in map(schema_of_type, types) if schema != {"type": "null"}]
        if len(options) == 1:
            return options[0]
        return {"anyOf": options}

    # No one schema describes the elements of a tuple of several types.
    if name == "tuple" and len(set(types)) > 1:
        return {"type": "array"}
    if name in ("list", "set", "array", "sequence", "iterable", "tuple"):
        return {"type": "array", "items": schema_of_type(types[0])}
    if name == "dict":
        return {"type": "object"}
    return {}


def _objects(row: Mapping[str, Any], column: str) -> list[dict[str, Json]]:
    """Returns the objects of a column, which holds a list or its JSON text.

    Raises:
        RowError: the column is missing, no JSON or no list of objects.
    """
    objects = row.get(column)
    if isinstance(objects, str):
        try:
            objects = json.loads(objects)
        except ValueError as error:
            raise RowError(f"{column}: no JSON ({error})") from None

    if not isinstance(objects, list) or not all(isinstance(element, dict) for element in objects):
        raise RowError(f"{column}: expected a list of objects")
    return objects


def _tool(description: dict[str, Json]) -> Tool:
    """Returns a tool of the set, its parameters as one JSON schema.

    Raises:
        RowError: it has no name, or parameters that are no objects.
    """
    parameters = description.get("parameters") or {}
    if not isinstance(description.get("name"), str) or not isinstance(parameters, dict):
        raise RowError("tools: expected name and parameters of each")

    # The set says of each parameter whether it is required; JSON schema says it of the object.
    properties: dict[str, Json] = {}
    required: list[str] = []
    for name, parameter in parameters.items():
        if not isinstance(parameter, dict):
            raise RowError(f"tools: parameter {name} of {description['name']}: expected an object")
        properties[name], is_required = _property(parameter)
        required += [name] * is_required

    schema = {"type": "object", "properties": properties, "required": required}
    return Tool(description["name"], str(description.get("description") or ""), schema)


def _property(parameter: dict[str, Json]) -> tuple[dict[str, Json], bool]:
    """Returns (schema, whether it is required); a parameter is optional if its type says so or it has a default."""
    # The set writes `str, optional`, and an empty text for no default.
    kind = str(parameter.get("type") or "any")
    schema = schema_of_type(kind)

    if parameter.get("description"):
        schema["description"] = str(parameter["description"])

    default = parameter.get("default")
    has_default = default is not None and default != ""
    if has_default:
        schema["default"] = default

    optional = "optional" in kind.lower() or has_default
    return schema, not optional


def _call(answer: dict[str, Json]) -> Call:
    arguments = answer.get("arguments")
    if not isinstance(answer.get("name"), str) or not isinstance(arguments, dict):
        raise RowError("answers: expected name and arguments of each")
    return Call(answer["name"], arguments)


def _split(text: str) -> list[str]:
    """Splits the arguments of a generic type: `int, List[str, int]` has two."""
    # A comma inside brackets belongs to an argument, so the depth of brackets is counted.
    arguments = [""]
    depth = 0
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            arguments.append("")
        else:
            arguments[-1] += character

    return [argument.strip() for argument in arguments]
