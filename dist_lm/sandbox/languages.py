"""How a program of each language runs, and how the code of its test says that it passed.

Runs inside the sandbox, in the process of one test, already confined. Each function ends the process. Once the code of
the test has passed it writes `token`, which nobody can guess, to stdout: a program that leaves early, with whatever
exit code, has passed nothing. (Python that reads its interpreter's memory could find the token; it stays shut in.)
"""

from __future__ import annotations

import os
import random  # seeded for every program, so it must be imported before
import sys
import types

TYPE_CHECKING = False  # `typing` itself would take a third of a cold start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

PATH = "/usr/local/bin:/usr/bin:/bin"
BASH_ENVIRONMENT = {"PATH": PATH, "HOME": "/tmp", "LC_ALL": "C.UTF-8", "TZ": "UTC", "TMPDIR": "/tmp"}


def _python(before: str, source: str, code: str, token: bytes) -> NoReturn:
    """All parts in one `__main__`; the code of a test passes if it raises nothing."""
    module = types.ModuleType("__main__")
    names = module.__dict__
    sys.modules["__main__"] = module
    sys.argv[:] = ["program.py"]
    sys.path[:] = [path for path in sys.path if path.startswith(sys.base_prefix)]
    random.seed(0)
    site = __import__("site")  # only for what the interpreter itself adds to the built-in names
    site.setquit()
    status = 0
    try:
        parts = [compile(part, name, "exec") for part, name in ((before, "before"), (source, "program.py")) if part]
        test = compile(code, "test", "exec") if code else None
        for part in parts:
            exec(part, names)
        if test is not None:
            exec(test, names)
    except SystemExit as end:
        status = _exit_status(end.code)
        token = b""
    except BaseException as error:
        inner = error.__traceback__.tb_next if error.__traceback__ else None  # without this frame
        sys.__excepthook__(type(error), error, inner)
        status = 1
    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()  # waits for threads, as at the end of a program
        __import__("atexit")._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except BaseException as error:
        os.write(2, repr(error).encode(errors="replace")[:500])
        status = status or 1
    if status == 0 and code:
        os.write(1, token)
    os._exit(status)


def _exit_status(code: object) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)
    return 1


def _bash(before: str, source: str, code: str, token: bytes) -> NoReturn:
    """One script; the code of a test passes if its last command returns 0."""
    script = f"{before}\n{source}\n" if before else f"{source}\n"
    if code:
        script += f"{code}\n[ $? -eq 0 ] && printf %s%s {token[:16].decode()} {token[16:].decode()}\n"
    import signal

    for name in (signal.SIGPIPE, signal.SIGXFSZ):  # ignored by Python, and what is ignored stays so
        signal.signal(name, signal.SIG_DFL)
    bash = next(path for folder in PATH.split(":") if os.access(path := f"{folder}/bash", os.X_OK))
    try:
        os.execve(bash, ["bash", "--norc", "--noprofile", "-c", script, "program"], BASH_ENVIRONMENT)
    except OSError as error:  # longer than an argument may be
        os.write(2, f"bash: {error}\n".encode())
    os._exit(126)


def _sql(before: str, source: str, code: str, token: bytes) -> NoReturn:
    """SQLite in memory. Prints the rows of the last query; the code of a test passes if its first value is true."""
    import sqlite3

    from dist_lm.sandbox.syntax import split_statements

    try:
        connection = sqlite3.connect(":memory:", isolation_level=None)
        connection.executescript(before)
        rows: list[tuple] = []
        for statement in split_statements(source):
            cursor = connection.execute(statement)
            if cursor.description is not None:
                rows = cursor.fetchall()
        sys.stdout.write("".join("|".join(map(_sql_text, row)) + "\n" for row in rows))
        if code:
            row = connection.execute(code).fetchone()
            if not (row and row[0]):
                raise sqlite3.Error(f"the test returned {row!r}")
        sys.stdout.flush()
    except (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError, OSError) as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode(errors="replace"))
        os._exit(1)
    if code:
        os.write(1, token)
    os._exit(0)


def _sql_text(value: object) -> str:
    """As sqlite3's list mode prints a value."""
    if value is None:
        return ""
    if isinstance(value, float):
        text = f"{value:.15g}"
        return text if any(c in text for c in ".einf") else f"{text}.0"
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


RUN: dict[str, Callable[[str, str, str, bytes], NoReturn]] = {"python": _python, "bash": _bash, "sql": _sql}
"""Language -> (code before, source, code of the test, token)."""
