"""Runs SQL (SQLite) and judges tests of it.

The database is the judge's. It executes the code before the program, sends the database to the program, and looks at
the one that comes back: an answer of SQL has no process of its own, only statements, and those are limited by an
authorizer. What would hide a table from the test is refused: temporary objects, further databases, pragmas that change
the schema. Tables that were there before stay as they were, except those that the test says the program writes
(`writes`), or the only one that its query reads: then what else could the program have done?

This module runs inside the sandbox. Only the standard library is imported, and little of it.
"""

from __future__ import annotations

import os
import sys

from dist_lm.sandbox.frames import read_exactly, write_frame

TYPE_CHECKING = False  # `typing` itself would take a third of a cold start
if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterable
    from typing import NoReturn

MAX_DATABASE = 16 << 20  # bytes
PASSED = b"passed"
# Pragmas that tell, and those whose setting changes no table that a test can see.
PRAGMAS = frozenset(
    (
        *("table_info", "table_xinfo", "table_list", "index_list", "index_info", "index_xinfo", "database_list"),
        *("foreign_key_list", "foreign_key_check", "integrity_check", "quick_check", "collation_list"),
        *("foreign_keys", "defer_foreign_keys", "recursive_triggers", "case_sensitive_like", "user_version"),
        *("application_id", "synchronous", "journal_mode", "optimize"),
    )
)


class RefusedError(Exception):
    """Raised for what a program may not do."""


# --- the program ---


def run(before: str, source: str, writes: str, channel: int) -> NoReturn:
    """Runs SQLite in memory, prints the rows of the last query that has any columns, with `|` between values, and ends
    the process with exit code 0; an error gives exit code 1, and its reason on standard error.

    Args:
        before: statements that make the database, if there is no judge.
        writes: names of tables that the program may change, if there is no judge; others stay as `before` made them.
        channel: socket to the judge, which sends the database and gets it back; -1: none.
    """
    import sqlite3

    refusals: list[str] = []
    try:
        connection = sqlite3.connect(":memory:", isolation_level=None)
        if channel >= 0:
            _load(connection, _receive(channel))
            protected: set[str] = set()
        else:
            connection.executescript(before)
            protected = {*_names(connection)} - _words(writes)
        connection.set_authorizer(_authorizer(sqlite3, protected, refusals))

        rows: list[tuple] = []
        for statement in split_statements(source):
            cursor = connection.execute(statement)
            if cursor.description is not None:
                rows = cursor.fetchall()

        connection.set_authorizer(None)
        lines = ["|".join(_text(connection, value) for value in row) + "\n" for row in rows]
        sys.stdout.write("".join(lines))
        sys.stdout.flush()
        if channel >= 0:
            _send(channel, connection.serialize())
    except (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError, OSError) as error:
        reason = refusals[0] if refusals else error
        os.write(2, f"{type(error).__name__}: {reason}\n".encode(errors="replace"))
        os._exit(1)
    os._exit(0)


def _authorizer(sqlite3, protected: set[str], refusals: list[str]) -> Callable[..., int]:
    """Returns an authorizer of SQLite that refuses what a program may not do, and adds the reason to `refusals`.

    Refused are temporary objects, other databases, pragmas that are not in PRAGMAS, and changes of protected tables.

    Args:
        sqlite3: the module.
        protected: names in lower case.
    """
    temporary = {
        getattr(sqlite3, f"SQLITE_{verb}_TEMP_{kind}")
        for verb in ("CREATE", "DROP")
        for kind in ("INDEX", "TABLE", "TRIGGER", "VIEW")
    }
    changes = {sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE}
    drops = {sqlite3.SQLITE_DROP_TABLE, sqlite3.SQLITE_DROP_VIEW, sqlite3.SQLITE_DROP_TRIGGER}

    def allow(action: int, first: str | None, second: str | None, *_: str | None) -> int:
        reason = ""
        if action in temporary:
            reason = "temporary tables, views and triggers are refused: they would hide those of the test"
        elif action in (sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH):
            reason = "other databases are refused"
        elif action == sqlite3.SQLITE_PRAGMA and (first or "").lower() not in PRAGMAS:
            reason = f"PRAGMA {first} is refused"
        elif action in changes or action in drops:
            changed = (first or "").lower()
            if changed in protected:
                reason = f"{first} is changed, and the test does not name it in `writes`"
        elif action == sqlite3.SQLITE_ALTER_TABLE and (second or "").lower() in protected:
            reason = f"{second} is altered, and the test does not name it in `writes`"

        if reason:
            refusals.append(reason)
            return sqlite3.SQLITE_DENY
        return sqlite3.SQLITE_OK

    return allow


# --- the judge ---


def judge(test: dict[str, str], channel: int, verdict: int) -> NoReturn:
    """Judges a test of SQL and ends the process; the test passes if the first value of its query is true, and the
    program changed no protected table: none that was there before, unless `writes` names it or the query reads only
    such tables.

    Then PASSED is written to `verdict`; else the reason to standard error, with exit code 1.

    Args:
        channel: socket to the program, which gets the database and sends it back.
        verdict: descriptor of a pipe.
    """
    import sqlite3

    try:
        database = sqlite3.connect(":memory:", isolation_level=None)
        database.executescript(test["before"])
        _send(channel, database.serialize())
        answer = sqlite3.connect(":memory:", isolation_level=None)
        _load(answer, _receive(channel))

        row, read = _first_row(answer, test["code"])
        if not (row and row[0]):
            raise RefusedError(f"the test returned {row!r:.500}")

        names, tables = ({*_names(database, *kinds)} for kinds in ((), ("table",)))
        protected = names - _words(test["writes"])
        # With two tables, a program could make the one that a test compares with equal to the other one.
        if read <= names and len(read & tables) == 1:
            protected -= read & tables
        _refuse_changes(database, answer, protected)
    except (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError, OSError, RefusedError) as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode(errors="replace"))
        os._exit(1)
    os.write(verdict, PASSED)
    os._exit(0)


def _first_row(database: sqlite3.Connection, code: str) -> tuple[tuple | None, set[str]]:
    """Returns the first row of a query (None: it has none), and the names of tables and views that it reads, in lower
    case.

    Raises:
        sqlite3.Error: the query fails.
        ValueError: `code` is not one statement.
    """
    import sqlite3

    # SQLite does not tell of every view that it looks through, so a name in the text counts, too.
    text = code.lower()
    read = {name for name in _names(database, "table", "view") if name in text}

    def note(action: int, table: str | None, *_: str | None) -> int:
        if action == sqlite3.SQLITE_READ and table:
            read.add(table.lower())
        return sqlite3.SQLITE_OK

    [query] = split_statements(code)
    database.set_authorizer(note)
    cursor = database.execute(query)
    database.set_authorizer(None)
    return cursor.fetchone(), read


def _refuse_changes(database: sqlite3.Connection, answer: sqlite3.Connection, names: Iterable[str]) -> None:
    """Compares tables, views and triggers of these names in two databases: definitions, and rows of tables.

    Raises:
        RefusedError: one of them differs.
    """
    for name in sorted(names):
        before, after = (_contents(connection, name) for connection in (database, answer))
        if before != after:
            raise RefusedError(f"the program changed {name}, and the test does not name it in `writes`")


def _contents(connection: sqlite3.Connection, name: str) -> tuple:
    definition = connection.execute("SELECT type, sql FROM sqlite_master WHERE lower(name) = ?", (name,)).fetchall()
    if not any(kind == "table" for kind, _ in definition):
        return definition, None
    quoted = name.replace('"', '""')
    rows = connection.execute(f'SELECT * FROM "{quoted}"').fetchall()  # noqa: S608 quoted
    return definition, [[(type(value), value) for value in row] for row in rows]


# --- databases ---


def _names(connection: sqlite3.Connection, *kinds: str) -> list[str]:
    """Returns the names of tables, views and triggers, or those of `kinds` only, in lower case."""
    rows = connection.execute(
        "SELECT type, lower(name) FROM sqlite_master WHERE lower(substr(name, 1, 7)) <> 'sqlite_'"
    )
    return [name for kind, name in rows if kind in (kinds or ("table", "view", "trigger"))]


def _words(names: str) -> set[str]:
    return {*names.lower().replace(",", " ").split()}


def _load(connection: sqlite3.Connection, content: bytes) -> None:
    """Makes `content` the database of a connection, and does not rely on what it says.

    Raises:
        sqlite3.Error: it is no database.
    """
    connection.deserialize(content)
    connection.execute("PRAGMA trusted_schema = OFF")


def _send(channel: int, content: bytes) -> None:
    """Writes a database to the other side.

    Raises:
        OSError: the other side has ended.
        ValueError: the database is too large.
    """
    if len(content) > MAX_DATABASE:
        raise ValueError(f"a database of more than {MAX_DATABASE} bytes")
    write_frame(channel, content)


def _receive(channel: int) -> bytes:
    """Waits for a database from the other side and returns it.

    Raises:
        OSError: the other side has ended.
        ValueError: the database is too large.
    """
    length = int.from_bytes(read_exactly(channel, 4), "big")
    if length > MAX_DATABASE:
        raise ValueError(f"a database of more than {MAX_DATABASE} bytes")
    return read_exactly(channel, length)


# --- statements and values ---


def split_statements(text: str) -> list[str]:
    """Returns the SQL statements of `text` without leading comments; includes an unfinished last statement."""
    import sqlite3

    statements: list[str] = []
    statement = ""
    for part in text.split(";"):
        statement += part
        # A semicolon in a text, a comment or a trigger ends no statement.
        if sqlite3.complete_statement(statement + ";"):
            statements.append(statement)
            statement = ""
        else:
            statement += ";"
    statements.append(statement.removesuffix(";"))
    return [stripped for statement in statements if (stripped := _without_leading_comments(statement))]


def _without_leading_comments(statement: str) -> str:
    text = statement.strip()
    while text.startswith("--") or text.startswith("/*"):
        end = "\n" if text.startswith("--") else "*/"
        _, _, text = text.partition(end)
        text = text.strip()
    return text


def _text(connection: sqlite3.Connection, value: object) -> str:
    """Returns a value as sqlite3's list mode prints it: no text after a NUL, and SQLite's own digits of reals."""
    if value is None:
        return ""
    if isinstance(value, float):  # Python's digits differ from SQLite's, and so do those of SQLite's versions
        [value] = connection.execute("select cast(? as text)", (value,)).fetchone()
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return text.partition("\0")[0]
