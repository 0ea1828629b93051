"""The Python interpreter of a session: it executes turn after turn in one `__main__`, so variables stay.

This module runs inside the sandbox, in the process of the program, already confined. Only the standard library is
imported, and little of it. The code of a turn owns this process: what it does here harms only its own session.
"""

from __future__ import annotations

import _ast  # `ast` itself takes long to import
import os
import struct
import sys
import types

from dist_lm.sandbox.frames import read_exactly
from dist_lm.sandbox.languages import CHANNEL, exit_status, prepare_python, print_error

TYPE_CHECKING = False  # `typing` itself would take a third of a cold start
if TYPE_CHECKING:
    from typing import Any, NoReturn

ANSWER = struct.Struct("!IB")
_ONLY_TREE = 0x400  # ast.PyCF_ONLY_AST


def serve() -> NoReturn:
    """Reads code from CHANNEL, executes it and answers with the number of the turn and its exit status (`ANSWER`).

    Does so until the other side ends.
    """
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    prepare_python()
    # Output and errors share a pipe, as in a terminal: they keep their order only if lines are written at once.
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]

    own_pid = os.getpid()
    number = 0
    while True:
        os.set_blocking(CHANNEL, True)  # the code may have changed that
        try:
            code = read_exactly(CHANNEL, int.from_bytes(read_exactly(CHANNEL, 4), "big"))
        except OSError:
            os._exit(0)
        number += 1
        status = _execute(code.decode(errors="replace"), f"turn_{number}.py", module.__dict__)
        if os.getpid() != own_pid:
            os._exit(status)  # a copy that the code has forked
        os.write(CHANNEL, ANSWER.pack(number, status))


def _execute(code: str, name: str, names: dict[str, Any]) -> int:
    """Executes the code of a turn and returns its exit status; prints the value of a last expression that is not None,
    as a notebook does. An exception is printed and gives 1, SystemExit its own status."""
    status = 0
    try:
        tree: Any = compile(code, name, "exec", _ONLY_TREE, dont_inherit=True)
        last = None
        if tree.body and type(tree.body[-1]) is _ast.Expr:
            last = compile(_ast.Expression(tree.body.pop().value), name, "eval", dont_inherit=True)

        exec(compile(tree, name, "exec", dont_inherit=True), names)
        if last is not None:
            value = eval(last, names)  # noqa: S307
            if value is not None:
                print(repr(value))
    except SystemExit as end:
        status = exit_status(end.code)
    except BaseException as error:
        print_error(error)
        status = 1

    # The code may have put anything in the place of the streams.
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: the stream cannot be flushed\n".encode())
    return status
