"""Checks whether a text parses, without running it.

Python is compiled, Bash is read by `bash -n`. SQL is compiled by SQLite against the tables that the text creates.
"""

import re
import shutil
import sqlite3
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import closing

from dist_lm.sandbox.languages import PATH, split_statements

TIMEOUT_S = 10.0
MAX_SQL_OPERATIONS = 1_000_000
MAX_SQL_BYTES = 1_000_000


def parses_python(text: str) -> bool:
    """Whether `text` is a Python module."""
    return not python_error(text)


def python_error(text: str) -> str:
    """Returns why `text` is no Python module; empty: it is one. Nothing is executed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            compile(text, "test", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # ValueError: NUL, lone surrogate
        return str(error) or type(error).__name__
    return ""


def parses_bash(text: str) -> bool | None:
    """Whether `bash -n` (read, do not execute) accepts `text`; None without bash or after a timeout."""
    error = bash_error(text)
    if error is None:
        return None
    return not error


def bash_error(text: str) -> str | None:
    """Returns why `bash -n` does not accept `text`; empty: it does; None without bash or after a timeout of 10 s.

    Extended patterns are accepted: a command turns them on, which is not executed here.
    """
    if reason := _not_passable(text):
        return reason
    if shutil.which("bash", path=PATH) is None:
        return None
    try:
        message = _bash_message(text)
        if message and not _bash_message(text, "-O", "extglob"):
            return ""
        return message
    except subprocess.TimeoutExpired:
        return None


def _bash_message(text: str, *options: str) -> str:
    """Returns the error of `bash -n`; empty: there is none. An open here-document counts as an error.

    Args:
        options: options of bash.

    Raises:
        TimeoutExpired: bash takes longer than `TIMEOUT_S`.
    """
    process = subprocess.run(
        ["bash", "--norc", "--noprofile", *options, "-n"],
        input=text.encode(),
        capture_output=True,
        timeout=TIMEOUT_S,
        env={"PATH": PATH, "LC_ALL": "C"},
        check=False,
    )
    message = process.stderr.decode(errors="replace").strip()
    if process.returncode:
        return message or f"exit code {process.returncode}"

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


def parses_sql(text: str) -> bool:
    """Whether SQLite compiles every statement, given the tables that earlier statements create.

    CREATE, ALTER and DROP are executed in an empty database in memory, because later statements refer to their tables.
    All other statements are only compiled (EXPLAIN).
    """
    return not any(_sql_errors(text))


def sql_error(text: str) -> str:
    """Returns why SQLite cannot read a statement of `text`, whatever tables there are; empty: it can."""
    grammar_error = re.compile('near ".*": syntax error|incomplete input|unrecognized token: .*', re.DOTALL)
    return _not_passable(text) or next(filter(grammar_error.fullmatch, _sql_errors(text)), "")


def sql_test_error(text: str) -> str:
    """Returns the `sql_error` of `text`, or why it is not a single statement; empty: it is one."""
    if reason := sql_error(text):
        return reason
    count = len(split_statements(text))
    if count == 1:
        return ""
    return f"expected one statement, found {count}"


def _sql_errors(text: str) -> Iterator[str]:
    """Yields SQLite's error for each statement of `text`, empty where there is none, or one reason why it cannot be
    read.

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
            except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
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


BEFORE_ERRORS = {"python": python_error, "bash": bash_error, "sql": sql_error}
TEST_ERRORS = BEFORE_ERRORS | {"sql": sql_test_error}
PARSERS = {"python": parses_python, "bash": parses_bash, "sql": parses_sql}


def parses(language: str, text: str) -> bool | None:
    """Whether `text` parses as `language`; None for a language without a parser."""
    if language in PARSERS:
        return PARSERS[language](text)
    return None


def parses_continued(language: str, prompt: str, completion: str, finished: bool) -> bool | None:
    """Whether prompt and completion parse as one text. A last line that was cut off is removed first.

    False for a completion that was cut off in its first line: only the prompt would be left.
    """
    if language in PARSERS and not finished and "\n" not in completion:
        return False
    return parses(language, whole_lines(prompt + completion, finished))


def whole_lines(text: str, finished: bool) -> str:
    """Returns `text` without its last line, if generation was cut off in that line (`finished` is False)."""
    if finished or "\n" not in text:
        return text
    return text[: text.rindex("\n") + 1]
