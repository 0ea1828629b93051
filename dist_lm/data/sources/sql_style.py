"""How generated SQL is written down: the habits of one author, kept through a whole document."""

import random
import re
from dataclasses import dataclass

from dist_lm.data.sources.sql_schema import TEXTS

Clause = tuple[str, list[str], str]  # keyword, items, what stands between the items
FUNCTIONS = {
    *("AVG", "COUNT", "LAG", "MAX", "MIN", "RANK", "ROW_NUMBER", "SUM"),
    *("COALESCE", "DATE", "LENGTH", "LOWER", "REPLACE", "ROUND", "STRFTIME", "SUBSTR", "TRIM", "UPPER"),
}
# Literals and comments keep their letters; only words written in capitals are keywords.
TOKEN = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|--[^\n]*|/\*.*?\*/|\b[A-Z][A-Z_]+\b", re.S)


@dataclass(frozen=True, slots=True)
class Style:
    """One author's habits."""

    keywords: str  # upper | lower | mixed (functions in small letters)
    layout: str  # line | clauses | lists | leading (comma)
    indent: str
    alias: str  # as | bare | none (whole table names)
    comments: str  # line | block | none
    key: str  # how a primary key is declared
    types: dict[str, str]  # kind of column -> SQL type
    named_constraints: bool
    not_null: bool
    final_semicolon_line: bool

    @classmethod
    def random(cls, rng: random.Random) -> "Style":
        text = rng.choice(["TEXT", "VARCHAR(255)", "VARCHAR(100)", "TEXT"])
        types: dict[str, str] = dict.fromkeys(sorted(TEXTS | {"choice"}), text)
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
        """The clauses of a statement, without its semicolon."""
        flat = self.flat(clauses)
        if self.layout == "line" or len(flat) < 50:
            return flat
        return "\n".join(self._clause(*clause) for clause in clauses)

    def flat(self, clauses: list[Clause]) -> str:
        """The clauses on one line."""
        return " ".join(f"{keyword} {separator.join(items)}".strip() for keyword, items, separator in clauses)

    def block(self, clauses: list[Clause]) -> str:
        """A subquery with its parentheses."""
        text = self.render(clauses)
        return f"({text})" if "\n" not in text else f"(\n{self.indented(text)}\n)"

    def indented(self, text: str) -> str:
        return "\n".join(self.indent + line if line else line for line in text.split("\n"))

    def comment(self, text: str) -> str:
        """A line of comment before a statement, or nothing."""
        if self.comments == "none":
            return ""
        return f"/* {text} */\n" if self.comments == "block" else f"-- {text}\n"

    def finish(self, text: str) -> str:
        """Put keywords into this author's letters, and end the statement."""

        def recase(match: re.Match[str]) -> str:
            token = match.group()
            if not token[0].isupper() or self.keywords == "upper":
                return token
            call = token in FUNCTIONS and match.string.startswith("(", match.end())
            return token.lower() if self.keywords == "lower" or call else token

        return TOKEN.sub(recase, text) + ("\n;" if self.final_semicolon_line else ";")

    def _clause(self, keyword: str, items: list[str], separator: str) -> str:
        if len(items) < 2 or self.layout == "clauses":
            return f"{keyword} {separator.join(items)}".strip()
        if separator == " AND ":
            return f"{keyword} " + f"\n{self.indent}AND ".join(items)
        if separator != ", ":
            return f"{keyword} {separator.join(items)}".strip()
        if self.layout == "leading":
            return f"{keyword} {items[0]}" + "".join(f"\n{self.indent}, {item}" for item in items[1:])
        return f"{keyword}\n" + ",\n".join(self.indented(item) for item in items)
