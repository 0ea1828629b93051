"""Schemas for the generated SQL: tables of one trade with some of their columns, and values that fit."""

import random
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

QUANTITIES = {"int", "money", "ratio", "measure"}  # kinds of columns that can be summed
NUMBERS = QUANTITIES | {"year", "coordinate"}
TEXTS = {"person", "email", "city", "country", "title", "unit", "word", "address", "note", "phone", "code"}
DATES = {"date", "moment"}


@dataclass(frozen=True, slots=True)
class Column:
    """A column and the kind of its values."""

    name: str
    kind: str
    arguments: tuple[str, ...] = ()  # bounds of a number, or the options of a choice
    nullable: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table: its primary key, its foreign keys as `(column, table)`, its other columns."""

    name: str
    key: str
    parents: tuple[tuple[str, str], ...]
    columns: tuple[Column, ...]

    def of(self, kinds: set[str]) -> list[Column]:
        """Returns the columns of some kinds, without foreign keys."""
        return [column for column in self.columns if column.kind in kinds]


def singular(name: str) -> str:
    """Returns the singular of a regular plural: `order_items` -> `order_item`. A name that does not end in s stays."""
    for plural, ending in (
        ("ies", "y"),
        ("sses", "ss"),
        ("ches", "ch"),
        ("shes", "sh"),
        ("ss", "ss"),
        ("s", ""),
    ):
        if name.endswith(plural):
            return name.removesuffix(plural) + ending
    return name


@cache
def words() -> dict[str, list[str]]:
    """Returns the word lists of `sql_words.txt`, by name."""
    lines = [line.split(": ", 1) for line in _lines("sql_words.txt") if line]
    return {name: word_list.split("; ") for name, word_list in lines}


@cache
def trades() -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """Returns `(trade, [(table, column definitions), ...])` for every trade in `sql_trades.txt`, which is read once in
    a process."""
    parsed = []
    for paragraph in "\n".join(_lines("sql_trades.txt")).strip().split("\n\n"):
        name, *lines = paragraph.splitlines()
        tables = [line.split(": ", 1) for line in lines]
        parsed.append((name, [(table, definitions.split(", ")) for table, definitions in tables]))
    return parsed


def _lines(name: str) -> list[str]:
    text = files(__package__ or "").joinpath(name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if not line.startswith("#")]


def random_schema(rng: random.Random) -> tuple[str, list[Table]]:
    """Returns a trade and two to four of its tables, with at least three of their columns (all, if there are fewer) and
    the keys between the tables chosen. Parents come before children."""
    name, tables = rng.choice(trades())
    chosen_tables = set(rng.sample([table for table, _ in tables], rng.randint(2, min(4, len(tables)))))
    # Keys of some schemas are called `book_id` instead of `id`, in all tables alike.
    own_key = rng.random() < 0.5

    schema: list[Table] = []
    for table, definitions in tables:
        if table not in chosen_tables:
            continue

        # `>table` refers to a table that may be missing, `>>name` to the table itself.
        parents = []
        columns = []
        for definition in definitions:
            name_or_reference, *rest = definition.split()
            if name_or_reference.startswith(">>"):
                parents.append((f"{name_or_reference[2:]}_id", table))
            elif name_or_reference.startswith(">"):
                # A table that was not chosen cannot be referred to.
                if name_or_reference[1:] in chosen_tables:
                    parents.append((f"{singular(name_or_reference[1:])}_id", name_or_reference[1:]))
            else:
                kind = rest[0].removesuffix("?")
                columns.append(Column(name_or_reference, kind, tuple(rest[1:]), nullable=rest[0].endswith("?")))

        # Columns keep the order of the trade, as people list them.
        positions = sorted(rng.sample(range(len(columns)), rng.randint(min(3, len(columns)), len(columns))))
        key = f"{singular(table)}_id" if own_key else "id"
        schema.append(Table(table, key, tuple(parents), tuple(columns[position] for position in positions)))
    return name, schema


def quoted(text: str) -> str:
    """Returns a string literal."""
    return "'" + text.replace("'", "''") + "'"


def literal(rng: random.Random, column: Column, serial: int | None = None) -> str:
    """Returns a random value for `column` as SQL, text in quotes.

    Args:
        serial: number of the row, by which codes and e-mail addresses differ; then a nullable column may get NULL.
            None: a value for a condition, never NULL.
    """
    if column.nullable and serial is not None and rng.random() < 0.3:
        return "NULL"
    if column.kind in NUMBERS or column.kind == "flag":
        return _number(rng, column)
    # A condition has no row, so it gets the code of any.
    if serial is None:
        serial = rng.randint(1, 900)
    return quoted(_text(rng, column, serial))


def _number(rng: random.Random, column: Column) -> str:
    """Returns a random number of the column's kind as SQL; 0 or 1 for a flag."""
    # Only whole numbers and amounts of money have bounds.
    low, high = map(int, column.arguments or ("0", "0"))
    match column.kind:
        case "int":
            return str(rng.randint(low, high))
        case "money":
            return f"{rng.uniform(low, high):.2f}"
        case "ratio":
            return f"{rng.random():.2f}"
        case "measure":
            return f"{rng.uniform(0.1, 500):.1f}"
        case "coordinate":
            return f"{rng.uniform(-80, 80):.4f}"
        case "year":
            return str(rng.randint(1900, 2024))
        case _:
            return str(rng.randint(0, 1))


def _text(rng: random.Random, column: Column, serial: int) -> str:
    """Returns a random text, date or option of the column's kind, without quotes."""

    def pick(name: str) -> str:
        return rng.choice(words()[name])

    match column.kind:
        case "person":
            return f"{pick('first_names')} {pick('last_names')}"
        case "email":
            host = rng.choice(["example.com", "example.org", "mail.test"])
            return f"{pick('first_names')}.{pick('last_names')}{serial}@{host}".lower()
        case "city":
            return pick("cities")
        case "country":
            return pick("countries")
        case "title":
            return f"{rng.choice(['The ', 'A ', ''])}{pick('adjectives')} {pick('nouns')}"
        case "unit":
            return f"{pick(rng.choice(['cities', 'adjectives']))} {pick('nouns')}"
        case "word":
            return f"{pick('adjectives')}{rng.choice(['-', '_', ''])}{pick('nouns')}".lower()
        case "code":
            return f"{''.join(rng.choices('ABCDEFGHKLMNPRSTUVWXYZ', k=2))}-{serial}{rng.randint(100, 999)}"
        case "phone":
            return f"+{rng.randint(1, 98)} {rng.randint(100, 999)} {rng.randint(1000, 9999)}"
        case "address":
            kind = rng.choice(["Street", "Road", "Lane", "Avenue"])
            return f"{rng.randint(1, 240)} {pick('streets')} {kind}"
        case "note":
            return pick("notes")
        case "choice":
            return rng.choice(column.arguments[0].split("|"))
        case "date":
            return _date(rng)
        case "moment":
            return f"{_date(rng)} {rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}:00"
        case kind:
            raise AssertionError(f"no value for a column of kind {kind!r}")


def _date(rng: random.Random) -> str:
    return f"{rng.randint(2015, 2024)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
