"""Functions as the Berkeley Function Calling Leaderboard describes them, as tools with a JSON schema. Pure."""

from typing import Any

from dist_lm.chat.messages import Json, Tool

TYPES = {  # theirs -> JSON schema's; as `bfcl_eval/constants/type_mappings.py` has them
    "integer": "integer",
    "number": "number",
    "float": "number",
    "double": "number",
    "string": "string",
    "any": "string",
    "boolean": "boolean",
    "bool": "boolean",
    "array": "array",
    "list": "array",
    "tuple": "array",
    "dict": "object",
    "object": "object",
}
NO_SCHEMA = ("optional",)  # their own words


def tool_of(function: dict[str, Any]) -> Tool:
    """A function of the leaderboard.

    Raises:
        ValueError: it has a type that is not known here.
    """
    parameters = schema_of(function["parameters"])
    parameters.setdefault("properties", {})
    return Tool(function["name"], function.get("description", ""), parameters)


def schema_of(described: dict[str, Any]) -> dict[str, Json]:
    """A part of a description as JSON schema."""
    schema: dict[str, Json] = {}
    for key, value in described.items():
        if key in NO_SCHEMA:
            continue
        if key == "type":
            schema[key] = _type(value)
        elif key == "properties" and isinstance(value, dict):
            schema[key] = {name: schema_of(part) for name, part in value.items()}
        elif key in ("items", "additionalProperties") and isinstance(value, dict):
            schema[key] = schema_of(value)
        else:
            schema[key] = value
    return schema


def _type(name: Any) -> str:
    if not isinstance(name, str) or name not in TYPES:
        raise ValueError(f"the type {name!r} is not known: expected one of {', '.join(TYPES)}")
    return TYPES[name]
