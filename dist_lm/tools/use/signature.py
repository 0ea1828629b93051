"""A Python function as a tool: its signature and docstring become name, description and JSON schema. Pure.

Types are Pydantic's: what it has a schema for can be an argument (int, float, str, bool, list[T], dict, Literal,
Optional, Enum, dates, dataclasses, ...). Descriptions come from the docstring, in Google, reST or NumPy style.
"""

import inspect
import typing
from collections.abc import Callable
from typing import Any

from docstring_parser import parse
from pydantic import PydanticUserError, TypeAdapter
from pydantic_core import PydanticSerializationError, to_jsonable_python

from dist_lm.chat.messages import ChatError, Json, Tool
from dist_lm.chat.schema import check_tool
from dist_lm.errors import UserError

BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class SignatureError(UserError):
    """A function that cannot be offered as a tool; the message names it, the argument and the way out."""


def tool_of(function: Callable[..., Any]) -> Tool:
    """What a model is shown of `function`.

    Raises:
        SignatureError: an argument has no type, one without a schema, or cannot be given by name.
    """
    name = function.__name__
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise SignatureError(f"{name}: expected a plain function, found one that is asynchronous or a generator")
    said = parse(inspect.getdoc(function) or "")
    described = {part.arg_name: _line(part.description) for part in said.params}
    properties: dict[str, Json] = {}
    required = []
    for parameter, adapter in adapters(function).items():
        default = inspect.signature(function).parameters[parameter].default
        schema = _schema(adapter, f"{name}({parameter})")
        if default is None:
            schema = _without_null(schema)
        if text := described.get(parameter):
            schema["description"] = text
        if default is inspect.Parameter.empty:
            required.append(parameter)
        elif default is not None:
            schema |= _default(default)
        properties[parameter] = schema
    parameters = {"type": "object", "properties": properties, "required": required}
    tool = Tool(name, _line(" ".join(filter(None, (said.short_description, said.long_description)))), parameters)
    try:
        check_tool(tool)
    except ChatError as error:
        raise SignatureError(f"{name}: {error}") from None
    return tool


def adapters(function: Callable[..., Any]) -> dict[str, TypeAdapter[Any]]:
    """What makes values of JSON arguments, by argument.

    Raises:
        SignatureError: as `tool_of`.
    """
    name = function.__name__
    try:
        types = typing.get_type_hints(function, include_extras=True)
    except Exception as error:
        raise SignatureError(f"{name}: its annotations cannot be read ({type(error).__name__}: {error})") from None
    found: dict[str, TypeAdapter[Any]] = {}
    for parameter in inspect.signature(function).parameters.values():
        place = f"{name}({parameter})" if parameter.kind in BY_NAME else f"{name}({parameter.name})"
        if parameter.kind not in BY_NAME:
            raise SignatureError(f"{place}: {parameter.kind.description}; expected arguments that are given by name")
        if parameter.name not in types:
            raise SignatureError(f"{place}: no type; expected an annotation such as {parameter.name}: int")
        try:
            found[parameter.name] = TypeAdapter(types[parameter.name])
        except (PydanticUserError, TypeError) as error:
            raise SignatureError(f"{place}: {_line(str(error)).split('. ')[0]}") from None
    return found


def _schema(adapter: TypeAdapter[Any], place: str) -> dict[str, Json]:
    try:
        schema = adapter.json_schema()
    except PydanticUserError as error:
        raise SignatureError(f"{place}: there is no JSON for it ({_line(str(error)).split('. ')[0]})") from None
    return _plain(schema, schema.get("$defs", {}), place, ())


def _plain(schema: Json, named: dict[str, Json], place: str, inside: tuple[str, ...]) -> Json:
    """The schema without titles, and with what references name in their place: short, as a model should see it."""
    if isinstance(schema, list):
        return [_plain(part, named, place, inside) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name in inside:
            raise SignatureError(f"{place}: {name} holds itself; expected a type that ends")
        rest = {key: part for key, part in schema.items() if key != "$ref"}
        return _plain(named[name], named, place, (*inside, name)) | _plain(rest, named, place, inside)
    kept = {}
    for key, part in schema.items():
        if key == "properties":
            kept[key] = {name: _plain(one, named, place, inside) for name, one in part.items()}
        elif key in ("enum", "const", "default", "required"):
            kept[key] = part
        elif key not in ("$defs", "title") and not (key == "additionalProperties" and part is True):
            kept[key] = _plain(part, named, place, inside)
    return {"type": kept.pop("type"), **kept} if "type" in kept else kept


def _without_null(schema: dict[str, Json]) -> dict[str, Json]:
    """`Optional[int] = None`: an integer, or left out."""
    others = [part for part in schema.get("anyOf", []) if part != {"type": "null"}]
    return dict(others[0]) if len(others) == 1 else schema


def _default(value: Any) -> dict[str, Json]:
    """The default, where JSON has a word for it."""
    try:
        return {"default": to_jsonable_python(value)}
    except (PydanticSerializationError, ValueError):
        return {}


def _line(text: str | None) -> str:
    return " ".join((text or "").split())
