"""Reads fields of a request's body. What is read has the type and the range that it should have, or is refused."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dist_lm.chat.openai_errors import ProtocolError
from dist_lm.errors import shown_value

Json = Any


def check_fields(
    body: Mapping[str, Json], fields: Collection[str], defaults: Mapping[str, Sequence[Json]] | None = None
) -> None:
    """Refuses a field that nothing here reads, because a client could not see that it changes nothing.

    Args:
        fields: those that may have any value.
        defaults: those that may only have the value that they have if they are left out, with all forms of this value.

    Raises:
        ProtocolError: there is one; it names the field.
    """
    defaults = defaults or {}
    for key, value in body.items():
        name = shown_value(key)
        if key not in fields and key not in defaults:
            raise ProtocolError(f"{name}: this field is not supported here: leave it out", param=name)
        if key in defaults and value not in defaults[key]:
            message = f"{key}={shown_value(value)}: not supported here; expected {json.dumps(defaults[key][0])}"
            raise ProtocolError(message, param=key)


def typed(body: Mapping[str, Json], key: str, kind: type, default: Json) -> Json:
    """Returns a field, or `default` where it is missing or null.

    Raises:
        ProtocolError: it has another type; true and false are no numbers.
    """
    value = body.get(key)
    if value is None:
        return default
    is_bool = isinstance(value, bool)
    if not isinstance(value, kind) or (is_bool and kind is not bool):
        raise ProtocolError(f"{key}: a {type(value).__name__}; expected {kind.__name__}", param=key)
    return value


def number(body: Mapping[str, Json], key: str, default: float, least: float, most: float) -> float:
    """Returns a field that is a number from `least` to `most`, or `default` where it is missing or null.

    Raises:
        ProtocolError: it is no number, or outside.
    """
    value = body.get(key)
    if value is None:
        return default
    # Integers of JSON may be too large for a float.
    if not is_number(value) or not least <= value <= most:
        raise ProtocolError(f"{key}={shown_value(value)}: expected a number from {least:g} to {most:g}", param=key)
    return float(value)


def integer(body: Mapping[str, Json], key: str, default: int, least: int, most: int) -> int:
    """Returns a field that is an integer from `least` to `most`, or `default` where it is missing or null.

    Raises:
        ProtocolError: it is no integer, or outside.
    """
    value = typed(body, key, int, default)
    if not least <= value <= most:
        raise ProtocolError(f"{key}={shown_value(value)}: expected {least} to {most}", param=key)
    return value


def is_number(value: Json) -> bool:
    """Returns whether a value of JSON is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_id(value: Json) -> bool:
    """Returns whether a value of JSON is an integer, as ids of tokens are."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_size(value: Json, key: str, most_bytes: int) -> None:
    """Refuses a value whose JSON is longer than `most_bytes`.

    Raises:
        ProtocolError: it is.
    """
    n_bytes = len(json.dumps(value))
    if n_bytes > most_bytes:
        raise ProtocolError(f"{key}: {n_bytes:,} bytes; expected at most {most_bytes:,}", param=key)
