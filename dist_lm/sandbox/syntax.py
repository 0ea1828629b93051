"""Does a text parse? Nothing here runs what it reads.

Python goes through `ast.parse`, Bash through `bash -n`, SQL is compiled by SQLite against the tables that the text
itself creates.
"""

import ast
import re
import shutil
import sqlite3
import subprocess
import warnings

PATH = "/usr/local/bin:/usr/bin:/bin:/opt/homebrew/bin"
TIMEOUT_S = 10.0
MAX_SQL_OPERATIONS = 1_000_000
MAX_SQL_BYTES = 1_000_000


def parses_python(text: str) -> bool:
    """Whether `text` is a Python module."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # ValueError: NUL bytes
        return False
    return True


def parses_bash(text: str) -> bool | None:
    """Whether `bash -n` (read, do not execute) accepts `text`; None without bash, or if it takes too long."""
    if shutil.which("bash", path=PATH) is None:
        return None
    try:
        done = _bash_reads(text)
    except subprocess.TimeoutExpired:
        return None
    # a here-document that never ends is only a warning, with exit code 0
    return done.returncode == 0 and not done.stderr


def _bash_reads(text: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["bash", "--norc", "--noprofile", "-n"],
        input=text.encode(),
        capture_output=True,
        timeout=TIMEOUT_S,
        env={"PATH": PATH, "LC_ALL": "C.UTF-8"},
        check=False,
    )


def parses_sql(text: str) -> bool:
    """Whether SQLite compiles every statement, the tables created before it in the text being known.

    CREATE, ALTER and DROP are executed in an empty database in memory, since later statements are compiled against
    them; everything else is compiled only (EXPLAIN).
    """
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.set_authorizer(_allow_schema_only)
    connection.set_progress_handler(lambda: 1, MAX_SQL_OPERATIONS)  # a result other than 0 interrupts
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_SQL_BYTES)
    try:
        for statement in split_statements(text):
            if re.match(r"(explain|query)\b", statement, re.IGNORECASE):  # would join our own EXPLAIN
                return False
            connection.execute(f"EXPLAIN {statement}")
            if re.match(r"(create|alter|drop)\b", statement, re.IGNORECASE):
                connection.execute(statement)
    except (sqlite3.Error, sqlite3.Warning, ValueError):
        return False
    finally:
        connection.close()
    return True


def split_statements(text: str) -> list[str]:
    """The SQL statements of `text`, comments before one kept out; an unfinished last one is included."""
    statements, current = [], ""
    for piece in text.split(";"):
        current += piece
        if sqlite3.complete_statement(current + ";"):
            statements.append(current)
            current = ""
        else:
            current += ";"
    statements.append(current.removesuffix(";"))
    return [stripped for statement in statements if (stripped := _without_leading_comments(statement))]


def _without_leading_comments(statement: str) -> str:
    text = statement.strip()
    while text.startswith("--") or text.startswith("/*"):
        end = "\n" if text.startswith("--") else "*/"
        _, _, text = text.partition(end)
        text = text.strip()
    return text


def _allow_schema_only(action: int, *arguments: str | None) -> int:
    """SQLite authorizer: no file is attached, no extension loaded, no pragma set."""
    if action in (sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH, sqlite3.SQLITE_PRAGMA):
        return sqlite3.SQLITE_DENY
    if action == sqlite3.SQLITE_FUNCTION and "load_extension" in arguments:
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


PARSERS = {"python": parses_python, "bash": parses_bash, "sql": parses_sql}


def parses(language: str, text: str) -> bool | None:
    """Whether `text` parses as `language`; None for a language without a parser here."""
    return PARSERS[language](text) if language in PARSERS else None


def parses_continued(language: str, prompt: str, completion: str, finished: bool) -> bool | None:
    """Whether prompt and completion parse as one text, without a last line that was cut off.

    A completion that was cut off in its first line has no line to show for it, and does not: its prompt alone would.
    """
    if language in PARSERS and not finished and "\n" not in completion:
        return False
    return parses(language, whole_lines(prompt + completion, finished))


def whole_lines(text: str, finished: bool) -> str:
    """`text` without its last line when generation was cut off in it: half a line says nothing about syntax."""
    return text if finished or "\n" not in text else text[: text.rindex("\n") + 1]
