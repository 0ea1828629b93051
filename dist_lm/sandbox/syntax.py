"""Checks whether a text parses, without running it.

Python is parsed by `ast.parse`, Bash by `bash -n`. SQL is compiled by SQLite against the tables that the text creates.
"""

import ast
import re
import shutil
import sqlite3
import subprocess
import warnings

from dist_lm.sandbox.languages import split_statements

PATH = "/usr/local/bin:/usr/bin:/bin:/opt/homebrew/bin"
TIMEOUT_S = 10.0
MAX_SQL_OPERATIONS = 1_000_000
MAX_SQL_BYTES = 1_000_000


def parses_python(text: str) -> bool:
    """Whether `text` is a Python module."""
    return not python_error(text)


def python_error(text: str) -> str:
    """Why `text` is no Python module; empty: it is one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # ValueError: NUL bytes
        return str(error) or type(error).__name__
    return ""


def parses_bash(text: str) -> bool | None:
    """Whether `bash -n` (read, do not execute) accepts `text`; None without bash or after a timeout."""
    error = bash_error(text)
    return None if error is None else not error


def bash_error(text: str) -> str | None:
    """Why `bash -n` does not accept `text`; empty: it does; None without bash or after a timeout."""
    if shutil.which("bash", path=PATH) is None:
        return None
    try:
        done = subprocess.run(
            ["bash", "--norc", "--noprofile", "-n"],
            input=text.encode(),
            capture_output=True,
            timeout=TIMEOUT_S,
            env={"PATH": PATH, "LC_ALL": "C.UTF-8"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    # for an unterminated here-document bash only warns, with exit code 0
    said = done.stderr.decode(errors="replace").strip()
    return said or ("" if done.returncode == 0 else f"exit code {done.returncode}")


def parses_sql(text: str) -> bool:
    """Whether SQLite compiles every statement, given the tables that earlier statements create.

    CREATE, ALTER and DROP are executed in an empty database in memory, because later statements refer to their tables.
    All other statements are only compiled (EXPLAIN).
    """
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.set_authorizer(_allow_schema_only)
    connection.set_progress_handler(lambda: 1, MAX_SQL_OPERATIONS)  # a result other than 0 interrupts
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_SQL_BYTES)
    try:
        for statement in split_statements(text):
            if re.match(r"(explain|query)\b", statement, re.IGNORECASE):  # would be read as part of our EXPLAIN
                return False
            connection.execute(f"EXPLAIN {statement}")
            if re.match(r"(create|alter|drop)\b", statement, re.IGNORECASE):
                connection.execute(statement)
    except (sqlite3.Error, sqlite3.Warning, ValueError):
        return False
    finally:
        connection.close()
    return True


def sql_error(text: str) -> str:
    """Why SQLite cannot read a statement of `text`, whatever tables there are; empty: it can."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.set_authorizer(_allow_schema_only)
    try:
        for statement in split_statements(text):
            own = re.match(r"explain\b", statement, re.IGNORECASE)
            try:
                connection.execute(statement if own else f"EXPLAIN {statement}")
            except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
                if re.search(r"syntax error|incomplete input|unrecognized token", str(error)):
                    return str(error)
    finally:
        connection.close()
    return ""


def _allow_schema_only(action: int, *arguments: str | None) -> int:
    """SQLite authorizer: denies attached files, extensions and pragmas."""
    if action in (sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH, sqlite3.SQLITE_PRAGMA):
        return sqlite3.SQLITE_DENY
    if action == sqlite3.SQLITE_FUNCTION and "load_extension" in arguments:
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


SYNTAX_ERRORS = {"python": python_error, "bash": bash_error, "sql": sql_error}
PARSERS = {"python": parses_python, "bash": parses_bash, "sql": parses_sql}


def parses(language: str, text: str) -> bool | None:
    """Whether `text` parses as `language`; None for a language without a parser."""
    return PARSERS[language](text) if language in PARSERS else None


def parses_continued(language: str, prompt: str, completion: str, finished: bool) -> bool | None:
    """Whether prompt and completion parse as one text. A last line that was cut off is removed first.

    False for a completion that was cut off in its first line: only the prompt would be left.
    """
    if language in PARSERS and not finished and "\n" not in completion:
        return False
    return parses(language, whole_lines(prompt + completion, finished))


def whole_lines(text: str, finished: bool) -> str:
    """`text` without its last line, if generation was cut off in that line."""
    return text if finished or "\n" not in text else text[: text.rindex("\n") + 1]
