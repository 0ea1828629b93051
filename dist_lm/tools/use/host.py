"""The process that runs a user's functions as tools: `python -m dist_lm.tools.use.host SOCKET FILE CHARACTERS`.

The signature and docstring of a function become a tool's name, description and JSON schema.
Argument types are those for which Pydantic has a schema (int, float, str, bool, list[T], dict, Literal, Optional, Enum,
dates, dataclasses). Descriptions come from the docstring, in Google, reST or NumPy style.

The process loads FILE, sends its tools over the socket (a file descriptor), then answers calls (`JsonProcess`).
"""

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
from dist_lm.storage.json_process import serve_requests
from dist_lm.storage.python_file import NotPythonError, load_python_file

Function = Callable[..., Any]
ATTRIBUTE = "TOOLS"  # the file may list its tools under this name
MODULE = "registered_tools"  # name of the loaded module; its file may have the name of a module that it imports
BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class SignatureError(UserError):
    """A function that cannot be offered as a tool; the message names it, the argument and the way out."""


def tool_of(function: Function) -> Tool:
    """Returns the tool that describes `function` to a model.

    Raises:
        SignatureError: an argument has no type, has a type without a JSON schema, or cannot be passed by name; the
            function is asynchronous or a generator, its annotations cannot be read, or name or schema suit no tool.
    """
    name = function.__name__
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise SignatureError(f"{name}: expected a plain function, found one that is asynchronous or a generator")

    docstring = parse(inspect.getdoc(function) or "")
    description_of = {param.arg_name: _line(param.description) for param in docstring.params}
    properties: dict[str, Json] = {}
    required = []

    for parameter, adapter in adapters(function).items():
        default = inspect.signature(function).parameters[parameter].default
        # `Optional[int] = None` becomes an int that may be absent, which is simpler for the model.
        schema = _schema(adapter, f"{name}({parameter})")
        if default is None:
            schema = _without_null(schema)

        if description := description_of.get(parameter):
            schema["description"] = description

        if default is inspect.Parameter.empty:
            required.append(parameter)
        elif default is not None:
            schema |= _default(default)
        properties[parameter] = schema

    parameters = {"type": "object", "properties": properties, "required": required}
    description = _line(" ".join(filter(None, (docstring.short_description, docstring.long_description))))
    tool = Tool(name, description, parameters)
    try:
        check_tool(tool)
    except ChatError as error:
        raise SignatureError(f"{name}: {error}") from None
    return tool


def adapters(function: Function) -> dict[str, TypeAdapter[Any]]:
    """Returns name -> adapter, which validates the JSON of an argument and converts it.

    Raises:
        SignatureError: annotations cannot be read, or an argument has no type, an unknown one, or cannot be passed by
            name.
    """
    name = function.__name__
    try:
        types = typing.get_type_hints(function, include_extras=True)
    except Exception as error:
        raise SignatureError(f"{name}: its annotations cannot be read ({type(error).__name__}: {error})") from None

    adapter_of: dict[str, TypeAdapter[Any]] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in BY_NAME:
            kind = parameter.kind.description
            raise SignatureError(f"{name}({parameter.name}): {kind}; expected arguments that are given by name")

        location = f"{name}({parameter})"
        if parameter.name not in types:
            raise SignatureError(f"{location}: no type; expected an annotation such as {parameter.name}: int")

        try:
            adapter_of[parameter.name] = TypeAdapter(types[parameter.name])
        except (PydanticUserError, TypeError) as error:
            raise SignatureError(f"{location}: {_line(str(error)).split('. ')[0]}") from None

    return adapter_of


def _schema(adapter: TypeAdapter[Any], location: str) -> dict[str, Json]:
    try:
        schema = adapter.json_schema()
    except PydanticUserError as error:
        raise SignatureError(f"{location}: there is no JSON for it ({_line(str(error)).split('. ')[0]})") from None
    return _plain(schema, schema.get("$defs", {}), location, ())


def _plain(schema: Json, named: dict[str, Json], location: str, inside: tuple[str, ...]) -> Json:
    """Returns the schema without titles and with references replaced by their targets, which is shorter for the model.

    Args:
        named: the schemas that references name.
        location: function and argument, for messages.
        inside: names of the references that this schema stands in.

    Raises:
        SignatureError: a type holds itself.
    """
    if isinstance(schema, list):
        return [_plain(part, named, location, inside) for part in schema]
    if not isinstance(schema, dict):
        return schema

    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name in inside:
            raise SignatureError(f"{location}: {name} holds itself; expected a type that ends")
        siblings = {key: part for key, part in schema.items() if key != "$ref"}
        return _plain(named[name], named, location, (*inside, name)) | _plain(siblings, named, location, inside)

    plain = {}
    for key, part in schema.items():
        if key == "properties":
            plain[key] = {
                name: _plain(property_schema, named, location, inside) for name, property_schema in part.items()
            }
        elif key in ("enum", "const", "default", "required"):
            plain[key] = part
        # `additionalProperties: true` is the default of JSON schema.
        elif key not in ("$defs", "title") and not (key == "additionalProperties" and part is True):
            plain[key] = _plain(part, named, location, inside)

    if "type" in plain:
        return {"type": plain.pop("type"), **plain}
    return plain


def _without_null(schema: dict[str, Json]) -> dict[str, Json]:
    """Returns the schema of `int` for `Optional[int] = None`, since the model may leave the argument out."""
    alternatives = [part for part in schema.get("anyOf", []) if part != {"type": "null"}]
    siblings = {key: part for key, part in schema.items() if key != "anyOf"}
    if len(alternatives) == 1:
        return {**alternatives[0], **siblings}
    return schema


def _default(value: Any) -> dict[str, Json]:
    """Returns `{"default": value}`, or an empty schema if JSON cannot express the value."""
    try:
        return {"default": to_jsonable_python(value)}
    except (PydanticSerializationError, ValueError):
        return {}


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


def main() -> None:
    """Loads the file, sends its tools, and answers calls until the parent process ends.

    If the file cannot be loaded, or a function cannot be a tool, it sends `refused` with the reason and returns.
    """
    file = Path(sys.argv[2])
    characters = int(sys.argv[3])

    with serve_requests() as (calls, send):
        try:
            functions = {function.__name__: function for function in functions_of(load(file), file)}
            tools = [tool_of(function) for function in functions.values()]
        except BaseException as error:
            # Loading the file may raise anything, SystemExit included.
            reason = str(error) if isinstance(error, SignatureError) else f"{type(error).__name__}: {error}"
            send({"refused": reason})
            return

        # Calls are answered in order; the process ends when the parent closes the socket.
        send({"tools": [[tool.name, tool.description, tool.parameters] for tool in tools]})
        while True:
            call = calls.get()
            send(answer(functions[call["name"]], call["arguments"], characters))


def load(file: Path) -> ModuleType:
    """Imports `file`, which can import modules of its own folder, and returns the module.

    The folder stays in `sys.path`, and the module in `sys.modules`. Errors of the code in `file` reach the caller as
    they are.

    Raises:
        SignatureError: `file` is not a Python file.
    """
    try:
        return load_python_file(file, MODULE)
    except NotPythonError as error:
        raise SignatureError(str(error)) from None


def functions_of(module: ModuleType, file: Path) -> list[Function]:
    """Returns the functions in `TOOLS`, or else the public functions that the file defines.

    Raises:
        SignatureError: there is no function, two have the same name, or `TOOLS` holds something else.
    """
    listed = getattr(module, ATTRIBUTE, None)
    if listed is None:
        # Imported functions are no tools; a function with two names counts once.
        functions = list(
            dict.fromkeys(
                function
                for name, function in vars(module).items()
                if inspect.isfunction(function) and function.__module__ == module.__name__ and not name.startswith("_")
            )
        )
    else:
        if not isinstance(listed, list | tuple):
            raise SignatureError(f"{ATTRIBUTE} is {listed!r}; expected a list of functions")
        functions = list(listed)
        for function in functions:
            if not inspect.isroutine(function):
                raise SignatureError(f"{ATTRIBUTE} holds {function!r}; expected functions")

    if not functions:
        raise SignatureError(f"no functions; expected some without _ at the beginning, or {ATTRIBUTE} = [...]")
    # A call names its function, so names must differ.
    names = [function.__name__ for function in functions]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise SignatureError(f"two functions are named {twice}")

    return functions


def answer(function: Function, arguments: dict[str, Any], characters: int) -> dict[str, Any]:
    """Calls the function and returns `{"result": JSON}`, or `{"error": why}` if it raises or the arguments do not fit.
    Nothing is raised but what is neither an Exception nor SystemExit.

    A result of more than `characters` as JSON becomes a text that is cut there and says so; an error is cut too.
    """
    try:
        readers = adapters(function)
        values = {name: readers[name].validate_json(json.dumps(value)) for name, value in arguments.items()}
        result = to_jsonable_python(function(**values))
        # A conversation cannot hold every value; `write` refuses the others.
        json_text.write(result, "the result")
        text = json.dumps(result, ensure_ascii=False)
    except ValidationError as error:
        first = error.errors()[0]
        return {"error": f"arguments: {first['msg']}"[:characters]}
    except ChatError as error:
        return {"error": str(error)[:characters]}
    except (Exception, SystemExit) as error:
        return {"error": f"{type(error).__name__}: {error}"[:characters]}

    if len(text) > characters:
        full_text = result if isinstance(result, str) else text
        return {"result": f"{full_text[:characters]} ... (cut: {characters:,} of {len(full_text):,} characters)"}

    return {"result": result}


if __name__ == "__main__":
    main()
