"""Runs a program of each language, as what it is without any test: see `dist_lm.sandbox.judge` for these.

This module runs inside the sandbox, in the process of one program, already confined. Each function ends the process.
"""

from __future__ import annotations

import _signal  # pyright: ignore[reportMissingImports]
import atexit  # importing it in each program would take longer
import builtins
import gc
import os
import sys
import types

from dist_lm.sandbox import bash, confine, sql

TYPE_CHECKING = False  # `typing` itself would take a third of a cold start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from dist_lm.sandbox.fenced import Fenced

CHANNEL = 3  # descriptor of the socket to the judge, in a program that has one
MAX_NAMES = 100  # functions and classes that a judge is told of at once


def be_program(
    fenced: Fenced, folder: str, limits: dict[str, Any], files: tuple[int, ...], run: Callable[[], NoReturn]
) -> NoReturn:
    """Confines this process, then becomes the program and ends with it. An earlier failure is written to the last
    file.

    Args:
        folder: working directory.
        limits: those of the request.
        files: standard input, standard output, standard error, socket to the judge or the session (-1: there is none),
            and the pipe for failures.
        run: the program; it ends the process.
    """
    *files_of_program, channel, trouble = files
    try:
        # A group of its own: a signal to the program's group reaches no process of ours.
        os.setsid()
        for descriptor, file in enumerate(files_of_program):
            os.dup2(file, descriptor)
        os.dup2(trouble, CHANNEL + 1, inheritable=False)
        if channel >= 0:
            os.dup2(channel, CHANNEL, inheritable=False)
        else:
            os.close(CHANNEL)
        confine.dumpable(True)  # else not even the program itself may open its /dev/stdin
        fenced.confine(folder, limits)
        os.closerange(CHANNEL + 2, 1 << 20)
    except BaseException as error:
        os.write(trouble, f"{type(error).__name__}: {error}".encode())
        os._exit(1)

    os.close(CHANNEL + 1)
    gc.unfreeze()
    _signal.signal(_signal.SIGINT, _signal.default_int_handler)
    try:
        run()
    finally:
        os._exit(1)


def _python(test: dict[str, str], source: str, judged: bool) -> NoReturn:
    """Runs the code `before` of the test and a program in `__main__` and ends the process. If it is judged, it answers
    its judge before it ends.

    An exception gives exit code 1, SystemExit its own. A program whose judge was not satisfied ends with 1.
    """
    module = types.ModuleType("__main__")
    names = module.__dict__
    sys.modules["__main__"] = module
    prepare_python()

    def run() -> None:
        # All parts are compiled first: a program with a syntax error must not run halfway.
        parts = ((test["before"], "before"), (source, "program.py"))
        compiled = [compile(text, name, "exec", dont_inherit=True) for text, name in parts if text]
        for part in compiled:
            exec(part, names)
        if judged:
            _answer(names)

    os._exit(run_python(run))


def _answer(names: dict[str, Any]) -> None:
    """Answers the judge of a program of Python until it ends; returns if the judge is satisfied, else it raises what
    the last call raised, or SystemExit(1).

    Args:
        names: the global names of the program.
    """
    from dist_lm.sandbox.calls import Peer, program_operations

    peer = Peer(CHANNEL, program_operations(names))
    # Imported names are no part of a program.
    defined = {name: value for name, value in names.items() if getattr(value, "__module__", "") == "__main__"}
    functions = {name: value for name, value in defined.items() if type(value) in (types.FunctionType, type)}
    if not peer.serve(dict([*functions.items()][:MAX_NAMES])):
        raise peer.last_error or SystemExit(1)


def prepare_python() -> None:
    """Gives this process the look of an interpreter that has just started, with a fixed seed of `random`."""
    sys.argv[:] = ["program.py"]
    sys.path[:] = [path for path in sys.path if path.startswith(sys.base_prefix)]
    _seed_random()
    if not hasattr(builtins, "quit"):
        add_site_names()


def run_python(run: Callable[[], None]) -> int:
    """Calls `run`, then does what an interpreter does at its end; returns its exit code and never raises.

    An exception is printed to stderr, without the frames of the sandbox, and gives 1; SystemExit gives its own code.
    Waits for threads, calls the functions of `atexit` and flushes the streams.
    """
    status = 0
    try:
        run()
    except SystemExit as end:
        status = exit_status(end.code)
    except BaseException as error:
        print_error(error)
        status = 1

    # Work of the interpreter at the end of a program, which may fail too.
    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()  # waits for threads, as at the end of a program
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except BaseException as error:
        os.write(2, repr(error).encode(errors="replace")[:500])
        status = status or 1
    return status


def print_error(error: BaseException) -> None:
    """Prints an exception of a program to stderr, without the frames of the sandbox."""
    error.__traceback__ = _without_our_frames(error.__traceback__)
    sys.__excepthook__(type(error), error, error.__traceback__)


def _without_our_frames(traceback: types.TracebackType | None) -> types.TracebackType | None:
    """Returns a traceback of the same frames, without those of the sandbox's own modules."""
    frames = []
    while traceback:
        if not traceback.tb_frame.f_code.co_filename.startswith("<dist_lm."):
            frames.append((traceback.tb_frame, traceback.tb_lasti, traceback.tb_lineno))
        traceback = traceback.tb_next
    for frame in reversed(frames):
        traceback = types.TracebackType(traceback, *frame)
    return traceback


def add_site_names() -> None:
    """Adds the built-in names that the interpreter itself adds at its start: `quit` and `exit`."""
    __import__("site").setquit()


def _seed_random() -> None:
    """Gives `random` the same seed in every program, without importing it for programs that do not use it."""
    if "random" in sys.modules:
        sys.modules["random"].seed(0)
    elif not any(type(finder) is _SeededRandom for finder in sys.meta_path):
        sys.meta_path.insert(0, _SeededRandom())


class _SeededRandom:
    """A finder that lets the usual one import `random`, and seeds it."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        """Returns the usual spec of `random`, whose execution also seeds it; None for other modules.

        This finder is removed then: it works once.
        """
        if name != "random":
            return None
        sys.meta_path.remove(self)
        spec = __import__("_frozen_importlib_external").PathFinder.find_spec(name)
        exec_module = spec.loader.exec_module

        def exec_and_seed(module: types.ModuleType) -> None:
            exec_module(module)
            module.seed(0)

        spec.loader.exec_module = exec_and_seed
        return spec


def exit_status(code: object) -> int:
    """Returns the exit code that SystemExit with this code gives; prints a code that is no number."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)
    return 1


def _bash(test: dict[str, str], source: str, judged: bool) -> NoReturn:
    """Runs a script in place of this process; with a judge, beside this process, which answers the judge's calls."""
    bash.run(test, source, CHANNEL if judged else -1)


def _sql(test: dict[str, str], source: str, judged: bool) -> NoReturn:
    """Runs SQLite in memory, prints the rows of the last query and ends the process; an error gives exit code 1."""
    sql.run(test["before"], source, test["writes"], CHANNEL if judged else -1)


RUN: dict[str, Callable[[dict[str, str], str, bool], NoReturn]] = {"python": _python, "bash": _bash, "sql": _sql}
"""Language -> function that runs a program and ends the process.

Its arguments are the test, without what a program must not see, the source, and whether there is a judge. Then the
program answers on `CHANNEL`.
"""
