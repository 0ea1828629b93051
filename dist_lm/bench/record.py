"""A result: one JSON object a line for programs, one row of a table for people."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dist_lm.bench.case import Case, Comparison
from dist_lm.bench.rounds import spread


@dataclass(frozen=True)
class Record:
    """What one comparison gave. A peer without a value is one that could not run; its name says why."""

    bench: str
    case: str
    value: float  # median over the rounds
    unit: str
    peer: str | None
    peer_value: float | None
    ratio: float | None  # value / peer_value
    ceiling: float | None
    ceiling_fraction: float | None  # value / ceiling
    rounds: int
    spread: float  # distance between the quartiles of the value, as a fraction of it

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)


def records_of(
    bench: str, case: Case, seconds: Mapping[str, Sequence[float]], facts: Mapping[str, Mapping[str, float]]
) -> list[Record]:
    """The records of a case.

    Args:
        seconds: of a step, way -> one figure a round.
        facts: what the trials say about themselves, way -> name (`peak MiB`: the last word is the unit) -> value.
    """
    return [_record(bench, case, comparison, seconds, facts) for comparison in case.comparisons]


def _record(
    bench: str,
    case: Case,
    comparison: Comparison,
    seconds: Mapping[str, Sequence[float]],
    facts: Mapping[str, Mapping[str, float]],
) -> Record:
    measured, _, unit = (comparison.fact or f"speed {case.unit}").rpartition(" ")

    def value_of(way: str) -> float:
        if comparison.fact:
            return facts[way][comparison.fact]
        return case.a_step / statistics.median(seconds[way])

    value = value_of(comparison.own)
    peer = value_of(comparison.peer) if comparison.peer else None
    ceiling = value_of(comparison.ceiling) if comparison.ceiling else None
    return Record(
        bench=bench,
        case=f"{case.name}: {comparison.own}" + (f", {measured}" if comparison.fact else ""),
        value=value,
        unit=unit,
        peer=comparison.peer_name or comparison.peer,
        peer_value=peer,
        ratio=None if peer is None else value / peer,
        ceiling=ceiling,
        ceiling_fraction=None if ceiling is None else value / ceiling,
        rounds=1 if comparison.fact else len(seconds[comparison.own]),
        spread=0.0 if comparison.fact else spread(seconds[comparison.own]),
    )


def table_of(title: str, records: Iterable[Record]) -> Table:
    """The records for people."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("case")
    for column in ("value", "peer", "ratio", "ceiling", "spread"):
        # the longest word of a peer's name in one piece
        table.add_column(column, justify="right", overflow="fold", min_width=18 if column == "peer" else None)
    for record in records:
        table.add_row(
            record.case,
            f"{_number(record.value)} {record.unit}",
            f"{_number(record.peer_value)} {record.peer}" if record.peer else "-",
            "-" if record.ratio is None else f"{record.ratio:.2f}",
            "-" if record.ceiling is None else f"{_number(record.ceiling)} ({record.ceiling_fraction:.0%})",
            f"{record.spread:.0%}",
        )
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.{1 if value < 1000 else 0}f}"
