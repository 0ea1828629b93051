"""The process that runs a user's functions as tools: `python -m dist_lm.tools.use.host SOCKET FILE CHARACTERS`.

The signature and docstring of a function become a tool's name, description and JSON schema. Argument types are those
that Pydantic has a schema for (int, float, str, bool, list[T], dict, Literal, Optional, Enum, dates, dataclasses).
Descriptions come from the docstring, in Google, reST or NumPy style.

The process loads FILE, sends its tools over the socket (a file descriptor), then answers calls (`JsonProcess`).
"""

import importlib.util
import inspect
import json
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from docstring_parser import parse
from pydantic import PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, to_jsonable_python

from dist_lm.chat import json_text
from dist_lm.chat.messages import ChatError, Json, Tool
from dist_lm.chat.schema import check_tool
from dist_lm.errors import UserError
from dist_lm.storage.json_process import asked

Function = Callable[..., Any]
ATTRIBUTE = "TOOLS"
MODULE = "registered_tools"  # name of the loaded module; the file's own name may be that of a module it imports
BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class SignatureError(UserError):
    """A function that cannot be offered as a tool; the message names it, the argument and the way out."""


def tool_of(function: Function) -> Tool:
    """The tool that describes `function` to a model.

    Raises:
        SignatureError: an argument has no type, has a type without a JSON schema, or cannot be passed by name.
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


def adapters(function: Function) -> dict[str, TypeAdapter[Any]]:
    """The converter from JSON of each argument, by name.

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
    """The schema without titles and with references replaced by their targets, which is shorter for the model."""
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
    """The schema of `Optional[int] = None` becomes that of int: the model may leave the argument out."""
    others = [part for part in schema.get("anyOf", []) if part != {"type": "null"}]
    beside = {key: part for key, part in schema.items() if key != "anyOf"}
    return {**others[0], **beside} if len(others) == 1 else schema


def _default(value: Any) -> dict[str, Json]:
    """`{"default": value}`, or nothing if JSON cannot express the value."""
    try:
        return {"default": to_jsonable_python(value)}
    except (PydanticSerializationError, ValueError):
        return {}


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


def main() -> None:
    """Load the file, send its tools, and answer calls until the parent ends."""
    file, characters = Path(sys.argv[2]), int(sys.argv[3])
    with asked() as (calls, send):
        try:
            functions = {function.__name__: function for function in functions_of(load(file), file)}
            tools = [tool_of(function) for function in functions.values()]
        except BaseException as error:  # loading the file may raise anything, SystemExit included
            known = isinstance(error, SignatureError)
            send({"refused": str(error) if known else f"{type(error).__name__}: {error}"})
            return
        send({"tools": [[tool.name, tool.description, tool.parameters] for tool in tools]})
        while True:
            call = calls.get()
            send(answer(functions[call["name"]], call["arguments"], characters))


def load(file: Path) -> ModuleType:
    """The module in `file`. It can import modules of its own folder."""
    sys.path.insert(0, str(file.resolve().parent))
    spec = importlib.util.spec_from_file_location(MODULE, file)
    if spec is None or spec.loader is None:
        raise SignatureError("expected a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    spec.loader.exec_module(module)
    return module


def functions_of(module: ModuleType, file: Path) -> list[Function]:
    """The functions in `TOOLS`, or else the public functions that the file defines.

    Raises:
        SignatureError: there is no function, two have the same name, or `TOOLS` holds something else.
    """
    named = getattr(module, ATTRIBUTE, None)
    if named is None:
        found = list(
            dict.fromkeys(  # a function with two names counts once
                value
                for name, value in vars(module).items()
                if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
            )
        )
    else:
        if not isinstance(named, list | tuple):
            raise SignatureError(f"{ATTRIBUTE} is {named!r}; expected a list of functions")
        found = list(named)
        for one in found:
            if not inspect.isroutine(one):
                raise SignatureError(f"{ATTRIBUTE} holds {one!r}; expected functions")
    if not found:
        raise SignatureError(f"no functions; expected some without _ at the beginning, or {ATTRIBUTE} = [...]")
    names = [one.__name__ for one in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise SignatureError(f"two functions are named {twice}")
    return found


def answer(function: Function, arguments: dict[str, Any], characters: int) -> dict[str, Any]:
    """`{"result": JSON}` of a call, or `{"error": why}`. A result longer than `characters` becomes a cut text."""
    try:
        readers = adapters(function)
        given = {name: readers[name].validate_json(json.dumps(value)) for name, value in arguments.items()}
        result = to_jsonable_python(function(**given))
        json_text.write(result, "the result")  # refuses values that a conversation cannot hold
        text = json.dumps(result, ensure_ascii=False)
    except ValidationError as error:
        first = error.errors()[0]
        return {"error": f"arguments: {first['msg']}"[:characters]}
    except ChatError as error:
        return {"error": str(error)[:characters]}
    except (Exception, SystemExit) as error:
        return {"error": f"{type(error).__name__}: {error}"[:characters]}
    if len(text) > characters:
        shown = result if isinstance(result, str) else text
        return {"result": f"{shown[:characters]} ... (cut: {characters:,} of {len(shown):,} characters)"}
    return {"result": result}


if __name__ == "__main__":
    main()
