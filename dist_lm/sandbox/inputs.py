"""Typed inputs of hidden tests, as the field `hidden` of a line in a file of prompts describes them:

{"solution": "def f(x): return sum(x)", "call": "f", "arguments": [{"list": {"int": [0, 9]}, "length": [1, 5]}]}
{"solution": "SELECT name FROM items WHERE price > 4",
 "tables": {"items": {"rows": [3, 6], "columns": {"name": {"one_of": ["ink", "pen"]}, "price": {"int": [1, 9]}}}}}

| value | drawn |
| --- | --- |
| {"int": [LOW, HIGH]} | a whole number, both ends included |
| {"one_of": [...]} | one of these numbers, texts, true, false or null |
| {"words": [...], "length": [LOW, HIGH]} | so many of these words, joined by blanks |
| {"list": VALUE, "length": [LOW, HIGH]} | a list, for Python only |

A value of a list or a column may name values that always occur in it: `"with": [...]`.
"""

import random
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_lm.errors import UserError
from dist_lm.sandbox.hidden import Case, Hidden

Value = Mapping[str, Any]
"""Describes one value, as above."""
MOST_VALUES = 1000  # in a list, a text or a table


@dataclass(frozen=True)
class Arguments:
    """Draws the arguments of a call in Python or Bash."""

    language: str
    call: str
    values: Sequence[Value]

    def __call__(self, rng: random.Random) -> Case:
        drawn = [draw_value(value, rng) for value in self.values]
        if self.language == "python":
            return Case(f"{self.call}({', '.join(map(repr, drawn))})")
        return Case(" ".join([self.call, *(shlex.quote(str(argument)) for argument in drawn)]))


@dataclass(frozen=True)
class Tables:
    """Draws the rows of tables in SQL."""

    tables: Mapping[str, Mapping[str, Any]]  # name -> {"rows": [LOW, HIGH], "columns": {name: value}}

    def __call__(self, rng: random.Random) -> Case:
        statements = []
        for name, table in self.tables.items():
            columns, n_rows = table["columns"], rng.randint(*table["rows"])
            drawn = [draw_values(value, n_rows, rng) for value in columns.values()]
            statements.append(table_of(name, ", ".join(columns), [*zip(*drawn, strict=True)]))
        return Case(before="\n".join(statements))


def draw_value(value: Value, rng: random.Random) -> Any:
    """Returns a value as described."""
    if "int" in value:
        return rng.randint(*value["int"])
    if "one_of" in value:
        return rng.choice(value["one_of"])
    length = rng.randint(*value["length"])
    if "words" in value:
        return " ".join(rng.choice(value["words"]) for _ in range(length))
    return draw_values(value["list"], length, rng)


def draw_values(value: Value, count: int, rng: random.Random) -> list[Any]:
    """Returns `count` values in any order, those that always occur among them."""
    always = value.get("with", ())[:count]
    values = [*always, *(draw_value(value, rng) for _ in range(count - len(always)))]
    rng.shuffle(values)
    return values


def table_of(name: str, columns: str, rows: Sequence[Sequence[Any]]) -> str:
    """Returns statements of SQL that make a table with rows, at least one.

    Args:
        columns: as in CREATE TABLE.
    """
    rows_text = ", ".join(f"({', '.join(map(_literal, row))})" for row in rows)
    return f"CREATE TABLE {name}({columns});\nINSERT INTO {name} VALUES {rows_text};"


def _literal(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return repr(value)


# --- the field of a line ---


def hidden_of(language: str, field: Any) -> Hidden:
    """Returns the hidden tests that the field `hidden` of a task describes.

    Raises:
        UserError: says which part is missing or wrong.
    """
    if not isinstance(field, dict):
        raise UserError("`hidden`: expected an object with solution, and call and arguments or (SQL) tables")
    parts = ("tables",) if language == "sql" else ("call", "arguments")
    count = field.get("tests", 3)
    if type(count) is not int or count < 1:
        raise UserError(f"`hidden`: tests is {count!r}; expected their number, at least 1")
    if unknown := [name for name in field if name not in ("solution", "tests", *parts)]:
        raise UserError(f"`hidden`: unknown {', '.join(unknown)}; expected solution, tests, {', '.join(parts)}")
    solution = field.get("solution")
    if not isinstance(solution, str) or not solution.strip():
        raise UserError("`hidden`: expected solution, a program that passes the tests")

    if language == "sql":
        tables = field.get("tables")
        if not isinstance(tables, dict) or not tables:
            raise UserError("`hidden`: expected tables, an object with rows and columns of each")
        for name, table in tables.items():
            _check_table(name, table)
        return Hidden(language, solution, Tables(tables), count=count)

    call, values = field.get("call"), field.get("arguments")
    if not isinstance(call, str) or not call.isidentifier():
        raise UserError(f"`hidden`: call is {call!r}; expected the name of a function")
    if not isinstance(values, list):
        raise UserError("`hidden`: expected arguments, a list of values")
    for value in values:
        _check_value(value)
        if language == "bash" and "list" in value:
            raise UserError("`hidden`: a list is no argument in Bash; expected int, one_of or words")
    entry = call if language == "bash" else ""
    return Hidden(language, solution, Arguments(language, call, values), entry, count)


def _check_table(name: str, table: Any) -> None:
    """Raises: UserError: the description of a table is not valid."""
    columns = table.get("columns") if isinstance(table, dict) else None
    if not name.isidentifier() or not isinstance(columns, dict) or not columns:
        raise UserError(f"`hidden`: tables.{name}: expected rows and columns")
    _check_range(table.get("rows"), f"tables.{name}.rows", least=1, most=MOST_VALUES)
    for column, value in columns.items():
        _check_value(value)
        if not column.isidentifier() or "list" in value:
            raise UserError(f"`hidden`: tables.{name}.{column}: expected a name with int, one_of or words")


def _check_value(value: Any) -> None:
    """Raises: UserError: the description of a value is not valid."""
    kinds = [kind for kind in ("int", "one_of", "words", "list") if isinstance(value, dict) and kind in value]
    if len(kinds) != 1:
        raise UserError(f"`hidden`: {value!r:.100}: expected an object with one of int, one_of, words and list")
    [kind] = kinds
    if unknown := [name for name in value if name not in (kind, "length", "with")]:
        raise UserError(f"`hidden`: {value!r:.100}: unknown {', '.join(unknown)}")

    if kind == "int":
        _check_range(value[kind], kind)
    elif kind == "list":
        _check_value(value[kind])
    elif not isinstance(value[kind], list) or not value[kind] or not all(map(_is_plain, value[kind])):
        raise UserError(f"`hidden`: {kind} is {value[kind]!r:.100}; expected a list of plain values")
    if kind == "words" and not all(isinstance(word, str) for word in value[kind]):
        raise UserError(f"`hidden`: words are {value[kind]!r:.100}; expected texts")
    if kind in ("words", "list"):
        _check_range(value.get("length"), "length", least=0, most=MOST_VALUES)
    always = value.get("with", [])
    if not isinstance(always, list) or not all(map(_is_plain, always)):
        raise UserError(f"`hidden`: with is {always!r:.100}; expected a list of plain values")


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _check_range(bounds: Any, name: str, least: int | None = None, most: int | None = None) -> None:
    """Raises: UserError: `bounds` are not two ascending whole numbers within the limits."""
    is_pair = isinstance(bounds, list) and len(bounds) == 2 and all(type(bound) is int for bound in bounds)
    if not is_pair or bounds[0] > bounds[1] or (least is not None and bounds[0] < least):
        at_least = "" if least is None else f", at least {least}"
        raise UserError(f"`hidden`: {name} is {bounds!r:.100}; expected [LOW, HIGH]{at_least}")
    if most is not None and bounds[1] > most:
        raise UserError(f"`hidden`: {name} is {bounds!r:.100}; expected at most {most}")
