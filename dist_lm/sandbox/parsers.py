"""The process that parses texts of models: `python -m dist_lm.sandbox.parsers SOCKET`.

Parsers have no limits of their own: 900 characters of nested `try` and `finally` took Python's compiler a minute and 4
GiB. So they run here, with limits of time and memory, and without rights: no files but the system's, no network. The
process answers one request a line, `{"check": name, "text": text}` with `{"error": text or null}`.
`dist_lm.sandbox.syntax` starts it and asks.

Python is compiled, Bash is read by `bash -n`. SQL is compiled by SQLite against the tables that the text creates.
Nothing of Python or Bash is executed.
"""

import json
import os
import re
import resource
import shutil
import signal
import socket
import sqlite3
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing
from functools import cache

from dist_lm.sandbox.environment import PATH
from dist_lm.sandbox.limited_program import confine_process, most_memory
from dist_lm.sandbox.sql import split_statements

CPU_S = 0.5  # limit for a text, beside that for each of its characters:
CPU_S_OF_CHARACTER = 1e-5  # a slow core needs a fifth
BASH_CPU_S = 2  # whole seconds, as the kernel counts them for another program
MEMORY_BYTES = 512 << 20  # address space of the process, and of bash
LARGEST_FILE = 64 << 20  # bytes of a script
FRESH_BYTES = 64 << 20  # a process that has used so much more than at its start is replaced: memory stays in pieces
MAX_SQL_OPERATIONS = 1_000_000
MAX_SQL_BYTES = 1_000_000


def main() -> None:
    """Confines this process, writes `{}`, and answers requests until the parent closes the socket.

    A text that exceeds `cpu_limit_s` ends it by SIGPROF; one that took much memory ends it after the answer. The last
    answer before the process ends by itself has `"ends": true`.

    Raises:
        OSError: the kernel refuses a limit, or the parent has gone.
    """
    with socket.socket(fileno=int(sys.argv[1])) as connection, connection.makefile("rb") as requests:
        connection.set_inheritable(False)
        status = os.open("/proc/self/status", os.O_RDONLY)
        at_start = most_memory(status)
        _files_of_bash()  # before the filter, which knows no files in memory
        _confine()
        warnings.simplefilter("ignore", SyntaxWarning)
        connection.sendall(b"{}\n")

        for line in requests:
            request = json.loads(line)
            # The kernel ends the process then, whatever it does: a parser cannot be interrupted.
            signal.setitimer(signal.ITIMER_PROF, cpu_limit_s(request["text"]))
            error = CHECKS[request["check"]](request["text"])
            signal.setitimer(signal.ITIMER_PROF, 0)

            ends = most_memory(status) > at_start + FRESH_BYTES
            connection.sendall(json.dumps({"error": error, "ends": ends}).encode() + b"\n")
            if ends:
                return


def cpu_limit_s(text: str) -> float:
    """Returns the CPU seconds within which a text must be parsed."""
    return CPU_S + CPU_S_OF_CHARACTER * len(text)


def _confine() -> None:
    """Limits this process and those below it for good (`confine_process`), and the CPU time of bash.

    Raises:
        OSError: the kernel refuses.
    """
    # Bash inherits this limit and ends by it, but not that this process ignores the signal.
    resource.setrlimit(resource.RLIMIT_CPU, (BASH_CPU_S, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXCPU, signal.SIG_IGN)
    confine_process(MEMORY_BYTES, (sys.prefix,), LARGEST_FILE)


# --- Python ---


def python_error(text: str) -> str:
    """Returns why `text` is no Python module; empty: it is one."""
    try:
        compile(text, "test", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # ValueError: NUL, lone surrogate
        return str(error) or type(error).__name__
    return ""


# --- Bash ---


def bash_error(text: str) -> str | None:
    """Returns why `bash -n` does not accept `text`; empty: it does; None without bash. Nothing of it is executed.

    Extended patterns are accepted: a command turns them on, which is not executed here.
    """
    if reason := _not_passable(text):
        return reason
    bash = shutil.which("bash", path=PATH)
    if bash is None:
        return None

    message = _bash_message(bash, text)
    if message and not _bash_message(bash, text, "-O", "extglob"):
        return ""
    return message


@cache
def _files_of_bash() -> tuple[int, int]:
    """Returns descriptors of two files in memory, for the standard input of bash and for what it says.

    Bash reads a pipe byte by byte, and a process with pipes takes twice as long to start.
    """
    return os.memfd_create("stdin"), os.memfd_create("stderr")


def _bash_message(bash: str, text: str, *options: str) -> str:
    """Returns the error of `bash -n`; empty: there is none. An open here-document counts as an error.

    Args:
        bash: path of the program.
        options: options of bash.
    """
    stdin, stderr = _files_of_bash()
    for file, content in ((stdin, text.encode()), (stderr, b"")):
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
        os.write(file, content)
    os.lseek(stdin, 0, os.SEEK_SET)

    process = os.posix_spawn(
        bash,
        ["bash", "--norc", "--noprofile", *options, "-n"],
        {"PATH": PATH, "LC_ALL": "C"},
        file_actions=[(os.POSIX_SPAWN_DUP2, stdin, 0), (os.POSIX_SPAWN_DUP2, stderr, 2)],
        setsigdef=[signal.SIGXCPU, signal.SIGPIPE],
    )
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    message = os.pread(stderr, LARGEST_FILE, 0).decode(errors="replace").strip()
    if code == -signal.SIGXCPU:
        return f"bash needs more than {BASH_CPU_S} s of CPU time for it"
    if code:
        return message or f"exit code {code}"

    # Bash only warns of a here-document without its end, but it swallows the code behind it.
    if "here-document" in message:
        return message
    return ""


def _not_passable(text: str) -> str:
    """Returns why `text` cannot be passed to a program; empty: it can."""
    if "\0" in text:
        return "it has a NUL"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return str(error)
    return ""


# --- SQL ---


def sql_error(text: str) -> str:
    """Returns why SQLite does not compile a statement of `text`, given the tables that earlier ones create; empty: it
    compiles all.

    CREATE, ALTER and DROP are executed in an empty database in memory, because later statements refer to their tables.
    All other statements are only compiled (EXPLAIN).
    """
    return next(filter(None, _sql_errors(text)), "")


def sql_grammar_error(text: str) -> str:
    """Returns why SQLite cannot read a statement of `text`, whatever tables there are; empty: it can."""
    grammar_error = re.compile('near ".*": syntax error|incomplete input|unrecognized token: .*', re.DOTALL)
    return _not_passable(text) or next(filter(grammar_error.fullmatch, _sql_errors(text)), "")


def sql_test_error(text: str) -> str:
    """Returns the `sql_grammar_error` of `text`, or why it is not a single statement; empty: it is one."""
    if reason := sql_grammar_error(text):
        return reason
    count = len(split_statements(text))
    if count == 1:
        return ""
    return f"expected one statement, found {count}"


def _sql_errors(text: str) -> Iterator[str]:
    """Yields SQLite's error for each statement of `text`, empty where there is none; for a text that cannot be passed
    to SQLite one reason instead.

    Statements that change the schema are executed in an empty database in memory, others only compiled.
    """
    if reason := _not_passable(text):
        yield reason
        return

    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.set_authorizer(_allow_schema_only)
        connection.set_progress_handler(lambda: 1, MAX_SQL_OPERATIONS)  # a result other than 0 interrupts
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_SQL_BYTES)

        for statement in split_statements(text):
            try:
                # Before these words our EXPLAIN would be read as a part of the statement.
                is_explained = re.match(r"(explain|query)\b", statement, re.IGNORECASE)
                connection.execute(statement if is_explained else f"EXPLAIN {statement}")
                if re.match(r"(create|alter|drop)\b", statement, re.IGNORECASE):
                    connection.execute(statement)
            except (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError) as error:
                yield str(error) or type(error).__name__
            else:
                yield ""


def _allow_schema_only(action: int, *arguments: str | None) -> int:
    """Denies attached files, extensions and pragmas; an authorizer of SQLite."""
    if action in (sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH, sqlite3.SQLITE_PRAGMA):
        return sqlite3.SQLITE_DENY
    if action == sqlite3.SQLITE_FUNCTION and "load_extension" in arguments:
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


CHECKS = {
    "python_error": python_error,
    "bash_error": bash_error,
    "sql_error": sql_error,
    "sql_grammar_error": sql_grammar_error,
    "sql_test_error": sql_test_error,
}

if __name__ == "__main__":
    main()
