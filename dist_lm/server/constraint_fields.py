"""Fields of a request that say what form an answer has."""

from collections.abc import Mapping

from dist_lm.chat.openai_errors import ProtocolError
from dist_lm.chat.openai_fields import Json, check_size, typed
from dist_lm.errors import UserError, shown_value
from dist_lm.generation.constraint import Constraint
from dist_lm.server.served import ServeLimits

ANY_OBJECT: Json = {"type": "object"}


def answer_constraint(body: Mapping[str, Json], limits: ServeLimits) -> Constraint | None:
    """Returns the constraint of `response_format` or `constraint`; None without one.

    Raises:
        ProtocolError: it has another form, or is too long.
    """
    response_format = typed(body, "response_format", dict, None)
    described = typed(body, "constraint", dict, None)
    if response_format and described:
        raise ProtocolError("constraint: expected no response_format beside it", param="constraint")

    key = "constraint" if described else "response_format"
    if response_format:
        described = _of_format(response_format)
    if not described:
        return None
    check_size(described, key, limits.schema_bytes)
    try:
        return Constraint.from_json(described)
    except UserError as error:
        raise ProtocolError(str(error), param=key) from error


def _of_format(response_format: Mapping[str, Json]) -> dict[str, Json] | None:
    """Returns the constraint that OpenAI's `response_format` describes; None for plain text.

    Raises:
        ProtocolError: it has another form.
    """
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_schema": ANY_OBJECT}
    if kind != "json_schema":
        raise ProtocolError(
            f"response_format.type={shown_value(kind)}: expected text, json_object or json_schema",
            param="response_format",
        )

    json_schema = response_format.get("json_schema")
    schema = json_schema.get("schema") if isinstance(json_schema, dict) else None
    if not isinstance(schema, dict):
        raise ProtocolError("response_format.json_schema.schema: expected an object", param="response_format")
    return {"json_schema": schema}
