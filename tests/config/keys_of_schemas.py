"""The keys that a command line can set, by stage."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


def settable_keys(schema: type, group: str = "") -> Iterator[tuple[str, type, str]]:
    """(key, dataclass that has it, its field) of every key of a schema. An entry of a mapping or list is `*`."""
    hints = get_type_hints(schema)
    for field in fields(schema):
        key = f"{group}{field.name}"
        inner, entries = _inner(hints[field.name])
        if inner is None:
            yield key, schema, field.name
        else:
            yield from settable_keys(inner, f"{key}.{entries}")


def _inner(hint: Any, entries: str = "") -> tuple[type | None, str]:
    """The dataclass that a type is, or that entries of its mappings and lists are."""
    if is_dataclass(hint) and isinstance(hint, type):
        return hint, entries
    if get_origin(hint) in (Union, UnionType):
        found = [_inner(option, entries) for option in get_args(hint)]
        return next((one for one in found if one[0] is not None), (None, ""))
    if get_origin(hint) in (dict, list):
        return _inner(get_args(hint)[-1], f"{entries}*.")
    return None, ""
