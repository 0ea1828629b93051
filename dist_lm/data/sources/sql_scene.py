"""What a statement of generated SQL is written about: picks of tables, columns, relations and conditions."""

import random
from dataclasses import dataclass

from dist_lm.data.sources.sql_schema import DATES, NUMBERS, Column, Table, literal, quoted
from dist_lm.data.sources.sql_style import Style

Statement = tuple[str, str]


@dataclass(frozen=True)
class Scene:
    """What a statement is written about, and by whom."""

    rng: random.Random
    tables: list[Table]
    style: Style

    def table(self, name: str) -> Table:
        return next(table for table in self.tables if table.name == name)

    def relation(self) -> tuple[Table, str, Table] | None:
        """`(child, foreign key column, parent)` of two different tables."""
        relations = [
            (child, column, self.table(parent))
            for child in self.tables
            for column, parent in child.parents
            if parent != child.name
        ]
        return self.rng.choice(relations) if relations else None

    def table_with(self, kinds: set[str]) -> tuple[Table, Column] | None:
        """A table and one of its columns of these kinds."""
        pairs = [(table, column) for table in self.tables for column in table.of(kinds)]
        return self.rng.choice(pairs) if pairs else None

    def alias(self, table: Table) -> str:
        """How columns of `table` are prefixed in a join."""
        if self.style.alias == "none":
            return table.name
        for short in (_initials, _beginning):
            others = [short(other.name) for other in self.tables if other.name != table.name]
            if short(table.name) not in others:
                return short(table.name)
        return table.name

    def named(self, table: Table) -> str:
        """`table` in a FROM clause, with its alias."""
        if self.style.alias == "none":
            return table.name
        return f"{table.name} {'AS ' if self.style.alias == 'as' else ''}{self.alias(table)}"

    def some(self, table: Table, at_most: int, prefix: str = "") -> list[str]:
        """Names of some columns, in the order of the table."""
        names = [column.name for column in table.columns]
        count = self.rng.randint(1, min(at_most, len(names)))
        return [prefix + names[i] for i in sorted(self.rng.sample(range(len(names)), count))]

    def predicate(self, table: Table, prefix: str = "") -> tuple[str, str]:
        """`(condition, the condition in words)` on one column."""
        rng = self.rng
        column = rng.choice(table.columns)
        name, words = prefix + column.name, column.name.replace("_", " ")
        value = literal(rng, column)
        if column.nullable and rng.random() < 0.5:
            negated = rng.random() < 0.5
            return f"{name} IS {'NOT ' if negated else ''}NULL", f"{'with' if negated else 'without'} {words}"
        if column.kind == "flag":
            return f"{name} = {value}", f"where {words} is {'true' if value == '1' else 'false'}"
        if column.kind in NUMBERS:
            if rng.random() < 0.25:
                low, high = sorted((value, literal(rng, column)), key=float)
                return f"{name} BETWEEN {low} AND {high}", f"with {words} from {low} to {high}"
            operator, spoken = rng.choice([(">", "above"), (">=", "at least"), ("<", "below"), ("<=", "at most")])
            return f"{name} {operator} {value}", f"with {words} {spoken} {value}"
        if column.kind in DATES:
            operator, spoken = rng.choice([(">=", "since"), ("<", "before"), (">", "after")])
            return f"{name} {operator} {value}", f"with {words} {spoken} {value.strip(chr(39))}"
        if column.kind == "choice":
            options = column.arguments[0].split("|")
            picked = rng.sample(options, rng.randint(1, min(3, len(options))))
            if len(picked) > 1:
                return (
                    f"{name} IN ({', '.join(map(quoted, picked))})",
                    f"whose {words} is {' or '.join(picked)}",
                )
            operator = rng.choice(["=", "=", "<>"])
            return (
                f"{name} {operator} {quoted(picked[0])}",
                f"whose {words} is {'' if operator == '=' else 'not '}{picked[0]}",
            )
        if rng.random() < 0.5:
            part = value.strip("'").split(" ")[-1].replace("'", "")[:4]
            pattern = rng.choice([f"{part}%", f"%{part}%", f"%{part}"])
            return f"{name} LIKE {quoted(pattern)}", f"whose {words} looks like {part}"
        return f"{name} = {value}", f"whose {words} is {value.strip(chr(39))}"


def _initials(name: str) -> str:
    return "".join(part[0] for part in name.split("_"))


def _beginning(name: str) -> str:
    return name[:3].strip("_")


def spoken(name: str) -> str:
    """A name in words."""
    return name.replace("_", " ")
