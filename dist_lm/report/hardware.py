"""What runs ran on. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dist_lm.report.facts import RunFacts
from dist_lm.tracking.readable import four_digits, gib, percent

UNKNOWN = "–"
COLUMNS = (
    "Device",
    "Nodes",
    "Ranks",
    "Layout",
    "Peak memory a rank",
    "Tokens/s, median",
    "MFU, median",
    "First all-reduce",
    "Planned for",
)
NAMED = 3  # hosts in a cell


@dataclass(frozen=True)
class Hardware:
    """A table: a row a run."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


def hardware_of(runs: Sequence[RunFacts]) -> Hardware:
    """A row for each run; a column that is unknown of all is left out."""
    cells = [(run.label, _cells(run)) for run in runs]
    kept = [number for number in range(len(COLUMNS)) if any(row[number] != UNKNOWN for _, row in cells)]
    return Hardware(
        tuple(COLUMNS[number] for number in kept),
        tuple((label, tuple(row[number] for number in kept)) for label, row in cells),
    )


def _cells(run: RunFacts) -> tuple[str, ...]:
    attempt, planned = run.attempt, run.config.get("hardware", {})
    hosts = [str(node.get("host", "")) for node in attempt.get("nodes", [])]
    more = f" and {len(hosts) - NAMED} more" if len(hosts) > NAMED else ""
    nodes = f"{len(hosts)} ({', '.join(dict.fromkeys(hosts[:NAMED]))}{more})" if hosts else UNKNOWN
    ranks = len(hosts) * int(attempt.get("ranks_per_node", 0)) or run.result.get("ranks")
    bus = run.links.get("bus_gb_per_s")
    memory, speed, mfu = (_of(run, name) for name in ("perf/memory_gib", "perf/tokens_per_s", "perf/mfu"))
    return (
        str(attempt.get("device") or run.config.get("device") or UNKNOWN),
        nodes,
        f"{ranks:,}" if ranks else UNKNOWN,
        str(run.layout) if run.layout else UNKNOWN,
        gib(memory[1] * 2**30) if memory else UNKNOWN,
        four_digits(speed[0]) if speed else UNKNOWN,
        percent(mfu[0]) if mfu else UNKNOWN,
        f"{bus:.2f} GB/s" if bus else UNKNOWN,
        f"hardware={planned['name']}: {planned['memory_gib']:g} GiB, {planned['bf16_tflops']:g} TFLOP/s in bf16"
        if {"name", "memory_gib", "bf16_tflops"} <= planned.keys()
        else UNKNOWN,
    )


def _of(run: RunFacts, name: str) -> tuple[float, float] | None:
    """(median, largest) of a metric."""
    series = run.series.get(name)
    finite = series.values[np.isfinite(series.values)] if series else np.zeros(0)
    return (float(np.median(finite)), float(finite.max())) if len(finite) else None
