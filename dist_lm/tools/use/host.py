"""The process in which a person's own functions run: `python -m dist_lm.tools.use.host FILE SOCKET CHARACTERS`.

It reads FILE, says over the socket (a descriptor) which tools are in it, then takes calls and gives results: one JSON
object a line. What functions print goes to standard error. It ends with its parent, and is ended by it when a function
hangs.
"""

import importlib.util
import inspect
import json
import os
import queue
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError
from pydantic_core import to_jsonable_python

from dist_lm.chat import json_text
from dist_lm.chat.messages import ChatError
from dist_lm.tools.use.signature import SignatureError, adapters, tool_of

Function = Callable[..., Any]
ATTRIBUTE = "TOOLS"
MODULE = "registered_tools"  # the file's name as a module: its own may be that of one it imports


def main() -> None:
    """Serve calls until the parent goes."""
    file, descriptor, characters = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    os.dup2(2, 1)  # what functions print is no answer
    with socket.socket(fileno=descriptor) as connection:
        calls: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=_listen, args=(connection, calls), daemon=True).start()
        try:
            functions = {function.__name__: function for function in functions_of(load(file), file)}
            tools = [tool_of(function) for function in functions.values()]
        except BaseException as error:  # whatever the file does when it is read
            known = isinstance(error, SignatureError)
            _send(connection, {"refused": str(error) if known else f"{type(error).__name__}: {error}"})
            return
        _send(connection, {"tools": [[tool.name, tool.description, tool.parameters] for tool in tools]})
        while True:
            call = calls.get()
            _send(connection, answer(functions[call["name"]], call["arguments"], characters))


def load(file: Path) -> ModuleType:
    """The module in `file`; its neighbours can be imported by it."""
    sys.path.insert(0, str(file.resolve().parent))
    spec = importlib.util.spec_from_file_location(MODULE, file)
    if spec is None or spec.loader is None:
        raise SignatureError("expected a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    spec.loader.exec_module(module)
    return module


def functions_of(module: ModuleType, file: Path) -> list[Function]:
    """Those in `TOOLS`, or else the public functions that the file defines.

    Raises:
        SignatureError: there are none, two of a name, or something else is in `TOOLS`.
    """
    named = getattr(module, ATTRIBUTE, None)
    if named is None:
        found = list(
            dict.fromkeys(  # one that has another name too is one
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
    """`{"result": JSON}` of a call, text that is cut where it is longer than `characters`, or `{"error": why}`."""
    try:
        readers = adapters(function)
        given = {name: readers[name].validate_json(json.dumps(value)) for name, value in arguments.items()}
        result = to_jsonable_python(function(**given))
        json_text.write(result, "the result")  # refuses what a conversation cannot hold
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


def _listen(connection: socket.socket, calls: "queue.Queue[dict[str, Any]]") -> None:
    """Hand on calls; when the parent is gone, so are we, whatever a function does."""
    with connection.makefile("rb") as lines:
        for line in lines:
            calls.put(json.loads(line))
    os._exit(0)


def _send(connection: socket.socket, value: dict[str, Any]) -> None:
    connection.sendall(json.dumps(value).encode() + b"\n")


if __name__ == "__main__":
    main()
