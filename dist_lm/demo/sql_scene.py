"""The schema of generated SQL and the style of its author: picks of tables, columns and conditions."""

import random
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

from dist_lm.demo.sql_schema import DATES, NUMBERS, TEXTS, Column, Table, literal, quoted

Statement = tuple[str, str]  # (description, SQL)
Write = Callable[["Scene"], Statement | None]  # None: the schema has no table or column for it
Clause = tuple[str, list[str], str]  # (keyword, items, separator between the items)
FUNCTIONS = {
    *("AVG", "COUNT", "LAG", "MAX", "MIN", "RANK", "ROW_NUMBER", "SUM"),
    *("COALESCE", "DATE", "LENGTH", "LOWER", "REPLACE", "ROUND", "STRFTIME", "SUBSTR", "TRIM", "UPPER"),
}

# Literals and comments keep their case; only words written in capitals are keywords.
TOKEN = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|--[^\n]*|/\*.*?\*/|\b[A-Z][A-Z_]+\b", re.S)


@dataclass(frozen=True, slots=True)
class Style:
    """The habits of one author, which apply to all of a document."""

    keywords: str  # upper | lower | mixed (only functions are lower case)
    layout: str  # line | clauses | lists | leading (comma)
    indent: str
    alias: str  # as | bare | none (full table names)
    comments: str  # line | block | none
    key: str  # declaration of a primary key
    types: dict[str, str]  # kind of column -> SQL type
    named_constraints: bool
    not_null: bool
    final_semicolon_line: bool

    @classmethod
    def random(cls, rng: random.Random) -> "Style":
        """Returns an author with habits drawn from `rng`."""
        text = rng.choice(["TEXT", "VARCHAR(255)", "VARCHAR(100)", "TEXT"])
        types: dict[str, str] = dict.fromkeys(sorted(TEXTS | {"choice"}), text)

        # An author whose texts have a bound gives some columns a type that fits them better.
        if text == "VARCHAR(255)":
            types |= {
                "note": "TEXT",
                "phone": "VARCHAR(30)",
                "choice": "VARCHAR(20)",
                "country": "VARCHAR(80)",
            }

        types |= {
            "code": rng.choice(["TEXT", "CHAR(12)", "VARCHAR(20)"]),
            "int": rng.choice(["INTEGER", "INT", "INTEGER", "BIGINT"]),
            "year": rng.choice(["INTEGER", "SMALLINT"]),
            "money": rng.choice(["REAL", "NUMERIC(10, 2)", "DECIMAL(12, 2)"]),
            "flag": rng.choice(["BOOLEAN", "INTEGER"]),
            "date": rng.choice(["DATE", "TEXT", "DATE"]),
            "moment": rng.choice(["TIMESTAMP", "DATETIME", "TEXT"]),
        }
        # One author writes all fractions with one type.
        types |= dict.fromkeys(["ratio", "measure", "coordinate"], rng.choice(["REAL", "DOUBLE PRECISION", "FLOAT"]))

        return cls(
            keywords=rng.choice(["upper", "upper", "lower", "mixed"]),
            layout=rng.choice(["line", "clauses", "clauses", "lists", "lists", "leading"]),
            indent=rng.choice(["  ", "    ", "    ", "\t"]),
            alias=rng.choice(["as", "bare", "bare", "none"]),
            comments=rng.choice(["line", "line", "block", "none"]),
            key=rng.choice(
                ["INTEGER PRIMARY KEY", "INTEGER PRIMARY KEY AUTOINCREMENT", "INTEGER NOT NULL PRIMARY KEY"]
            ),
            types=types,
            named_constraints=rng.random() < 0.3,
            not_null=rng.random() < 0.6,
            final_semicolon_line=rng.random() < 0.1,
        )

    def render(self, clauses: list[Clause]) -> str:
        """Returns a statement without its semicolon, on several lines if the author does so."""
        # Nobody breaks a short statement into lines.
        flat = self.flat(clauses)
        if self.layout == "line" or len(flat) < 50:
            return flat
        return "\n".join(self._clause(*clause) for clause in clauses)

    def flat(self, clauses: list[Clause]) -> str:
        """Returns a statement without its semicolon, on one line."""
        return " ".join(f"{keyword} {separator.join(items)}".strip() for keyword, items, separator in clauses)

    def block(self, clauses: list[Clause]) -> str:
        """Returns a subquery with its parentheses."""
        text = self.render(clauses)
        if "\n" in text:
            return f"(\n{self.indented(text)}\n)"
        return f"({text})"

    def indented(self, text: str) -> str:
        """Returns lines with one more indentation; empty lines stay empty."""
        return textwrap.indent(text, self.indent)

    def comment(self, text: str) -> str:
        """Returns a comment line before a statement; an empty text for an author without comments."""
        if self.comments == "none":
            return ""
        if self.comments == "block":
            return f"/* {text} */\n"
        return f"-- {text}\n"

    def finish(self, text: str) -> str:
        """Returns a statement with keywords in this author's case, and with its semicolon."""

        def recase(match: re.Match[str]) -> str:
            token = match.group()
            # Names of the schema and literals keep their case.
            if not token[0].isupper() or self.keywords == "upper":
                return token
            # In the mixed style, functions are lower case: names before a parenthesis.
            is_call = token in FUNCTIONS and match.string.startswith("(", match.end())
            if self.keywords == "lower" or is_call:
                return token.lower()
            return token

        return TOKEN.sub(recase, text) + ("\n;" if self.final_semicolon_line else ";")

    def _clause(self, keyword: str, items: list[str], separator: str) -> str:
        """Returns a clause on one line, or its conditions or list over several, as the author does."""
        if len(items) < 2 or self.layout == "clauses":
            return f"{keyword} {separator.join(items)}".strip()

        # Only conditions and lists are split over lines.
        if separator == " AND ":
            return f"{keyword} " + f"\n{self.indent}AND ".join(items)
        if separator != ", ":
            return f"{keyword} {separator.join(items)}".strip()
        if self.layout == "leading":
            return f"{keyword} {items[0]}" + "".join(f"\n{self.indent}, {item}" for item in items[1:])
        return f"{keyword}\n" + ",\n".join(self.indented(item) for item in items)


@dataclass(frozen=True)
class Scene:
    """The schema of the statements, and the style of their author."""

    rng: random.Random
    tables: list[Table]
    style: Style

    def table(self, name: str) -> Table:
        """Returns the table with this name."""
        return next(table for table in self.tables if table.name == name)

    def relations(self) -> list[tuple[Table, str, Table]]:
        """Returns `(child, foreign key column, parent)` of every key that connects two different tables."""
        return [
            (child, column, self.table(parent))
            for child in self.tables
            for column, parent in child.parents
            if parent != child.name
        ]

    def columns(self, kinds: set[str]) -> list[tuple[Table, Column]]:
        """Returns the columns of these kinds, each with its table."""
        return [(table, column) for table in self.tables for column in table.of(kinds)]

    def alias(self, table: Table) -> str:
        """Returns the prefix of the columns of `table` in a join: its initials, its first letters or its name, the
        first that no other table has; its name for an author without aliases."""
        if self.style.alias == "none":
            return table.name

        # Two tables with the same initials would get one alias, so the first letters are tried next, then the name.
        for short in (_initials, _beginning):
            used = [short(neighbour.name) for neighbour in self.tables if neighbour.name != table.name]
            if short(table.name) not in used:
                return short(table.name)
        return table.name

    def named(self, table: Table) -> str:
        """Returns `table` with its alias, for a FROM clause."""
        if self.style.alias == "none":
            return table.name
        return f"{table.name} {'AS ' if self.style.alias == 'as' else ''}{self.alias(table)}"

    def some(self, table: Table, at_most: int, prefix: str = "") -> list[str]:
        """Returns the names of one to `at_most` columns, in the order of the table."""
        names = [column.name for column in table.columns]
        num_columns = self.rng.randint(1, min(at_most, len(names)))
        return [prefix + names[index] for index in sorted(self.rng.sample(range(len(names)), num_columns))]

    def predicate(self, table: Table, prefix: str = "") -> tuple[str, str]:
        """Returns `(condition, its description)` on a random column of `table`, with values of its kind.

        Args:
            prefix: before the column's name, with its point, such as `o.`.
        """
        rng = self.rng
        column = rng.choice(table.columns)
        name = prefix + column.name
        words = spoken(column.name)
        literal_value = literal(rng, column)

        if column.nullable and rng.random() < 0.5:
            if rng.random() < 0.5:
                return f"{name} IS NOT NULL", f"with {words}"
            return f"{name} IS NULL", f"without {words}"

        if column.kind == "flag":
            return f"{name} = {literal_value}", f"where {words} is {'true' if literal_value == '1' else 'false'}"

        if column.kind in NUMBERS:
            if rng.random() < 0.25:
                low, high = sorted((literal_value, literal(rng, column)), key=float)
                return f"{name} BETWEEN {low} AND {high}", f"with {words} from {low} to {high}"
            operator, relation = rng.choice([(">", "above"), (">=", "at least"), ("<", "below"), ("<=", "at most")])
            return f"{name} {operator} {literal_value}", f"with {words} {relation} {literal_value}"

        if column.kind in DATES:
            operator, relation = rng.choice([(">=", "since"), ("<", "before"), (">", "after")])
            return f"{name} {operator} {literal_value}", f"with {words} {relation} {literal_value.strip(chr(39))}"

        if column.kind == "choice":
            options = column.arguments[0].split("|")
            chosen = rng.sample(options, rng.randint(1, min(3, len(options))))
            if len(chosen) > 1:
                return (
                    f"{name} IN ({', '.join(map(quoted, chosen))})",
                    f"whose {words} is {' or '.join(chosen)}",
                )

            operator, negation = rng.choice([("=", ""), ("=", ""), ("<>", "not ")])
            return f"{name} {operator} {quoted(chosen[0])}", f"whose {words} is {negation}{chosen[0]}"

        # A pattern has a few letters of a value, since a whole value would match one row at most.
        if rng.random() < 0.5:
            part = literal_value.strip("'").split(" ")[-1].replace("'", "")[:4]
            pattern = rng.choice([f"{part}%", f"%{part}%", f"%{part}"])
            return f"{name} LIKE {quoted(pattern)}", f"whose {words} looks like {part}"
        return f"{name} = {literal_value}", f"whose {words} is {literal_value.strip(chr(39))}"


def about_column(kinds: set[str]) -> Callable[[Callable[..., Statement | None]], Write]:
    """Decorates a function of (scene, table, column) so that it takes a scene, which draws a column of these kinds."""
    return lambda write: _about(lambda scene: scene.columns(kinds), write)


def about_relation(write: Callable[..., Statement | None]) -> Write:
    """Decorates a function of (scene, child, foreign key column, parent) so that it takes a scene, which draws them."""
    return _about(Scene.relations, write)


def _about(candidates: Callable[[Scene], list], write: Callable[..., Statement | None]) -> Write:
    """Returns `write` of a scene and one of its candidates; the statement is None if the schema has no candidate."""

    @wraps(write)
    def write_about(scene: Scene) -> Statement | None:
        drawn_from = candidates(scene)
        if not drawn_from:
            return None
        return write(scene, *scene.rng.choice(drawn_from))

    return write_about


def _initials(name: str) -> str:
    return "".join(part[0] for part in name.split("_"))


def _beginning(name: str) -> str:
    return name[:3].strip("_")


def spoken(name: str) -> str:
    """Returns a name in words."""
    return name.replace("_", " ")
