"""The conditions of runs: their hardware, and how their configurations differ. Pure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, get_type_hints

import numpy as np
from omegaconf import OmegaConf

from dist_lm.config.root import Config
from dist_lm.report.facts import RunFacts
from dist_lm.stages.registry import stage_named, stage_names
from dist_lm.tracking.readable import four_digits, gib, percent

UNKNOWN = "–"  # shown for unknown figures and missing keys
NAMED = 3  # most hosts named in a cell
OPEN = "???"  # OmegaConf's missing value
NAMES = ("run_id", "work_dir")  # keys that always differ


def hardware_of(runs: Sequence[RunFacts]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Returns (columns, rows) of a table with a row (label, texts) for each run, at least one; columns unknown for all
    runs are left out."""
    cells = [(run.label, _cells(run)) for run in runs]
    columns = [name for name in cells[0][1] if any(row[name] != UNKNOWN for _, row in cells)]
    return columns, [(label, [row[name] for name in columns]) for label, row in cells]


def _cells(run: RunFacts) -> dict[str, str]:
    """Returns the row of a run as column -> text; `UNKNOWN` where a figure is not known. Speeds and MFU are medians of
    all measured values, the memory is the largest."""
    attempt = run.attempt
    planned = run.config.get("hardware", {})

    hosts = [str(node.get("host", "")) for node in attempt.get("nodes", [])]
    more_hosts = f" and {len(hosts) - NAMED} more" if len(hosts) > NAMED else ""
    nodes = UNKNOWN
    if hosts:
        nodes = f"{len(hosts)} ({', '.join(dict.fromkeys(hosts[:NAMED]))}{more_hosts})"

    # A run that torchrun started alone has no journal; its result names the ranks.
    ranks = len(hosts) * int(attempt.get("ranks_per_node", 0)) or run.result.get("ranks")
    bus = run.links.get("bus_gb_per_s")

    memory, speed, mfu = map(run.finite, ("perf/memory_gib", "perf/tokens_per_s", "perf/mfu"))
    planned_for = UNKNOWN
    if {"name", "memory_gib", "bf16_tflops"} <= planned.keys():
        planned_for = f"hardware={planned['name']}: {planned['memory_gib']:g} GiB, "
        planned_for += f"{planned['bf16_tflops']:g} TFLOP/s in bf16"

    return {
        "Device": str(attempt.get("device") or run.config.get("device") or UNKNOWN),
        "Nodes": nodes,
        "Ranks": f"{ranks:,}" if ranks else UNKNOWN,
        "Layout": str(run.layout or UNKNOWN),
        "Peak memory a rank": gib(memory.max() * 2**30) if len(memory) else UNKNOWN,
        "Tokens/s, median": _median(speed, four_digits),
        "MFU, median": _median(mfu, percent),
        "First all-reduce": f"{bus:.2f} GB/s" if bus else UNKNOWN,
        "Planned for": planned_for,
    }


def _median(numbers: np.ndarray, form: Callable[[float], str]) -> str:
    """Returns the formatted median of what was measured."""
    if not len(numbers):
        return UNKNOWN
    return form(float(np.median(numbers)))


@dataclass(frozen=True)
class Row:
    """A key and its value in each column."""

    key: str
    values: tuple[str, ...]


def flat(config: Any, prefix: str = "") -> dict[str, str]:
    """Returns dotted keys and values as text; a list is one value."""
    if isinstance(config, Mapping) and config:
        texts: dict[str, str] = {}
        for key, child in config.items():
            texts |= flat(child, f"{prefix}.{key}".removeprefix("."))
        return texts
    return {prefix: as_text(config)}


def as_text(value: Any) -> str:
    """Returns a value as it is written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.10g}"
    return str(value)


def differences(configs: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Returns the keys whose values differ between configurations, without run_id and work_dir, in the order of their
    first appearance; a missing key has the value `UNKNOWN`."""
    columns = [flat(config) for config in configs]

    # Names differ in every run and would hide the settings that differ.
    keys = dict.fromkeys(key for column in columns for key in column if key not in NAMES)
    rows = [Row(key, tuple(column.get(key, UNKNOWN) for column in columns)) for key in keys]
    return [row for row in rows if len(set(row.values)) > 1]


def from_defaults(config: Mapping[str, Any]) -> list[Row]:
    """Returns key, default and value of the keys whose value differs from the default in the code, without run_id and
    work_dir; keys without a default are left out.

    Raises:
        ConfigError: the module of an installed stage cannot be loaded.
    """
    name = str(config.get("stage", {}).get("name", ""))

    # A run whose stage is not installed any more is compared with the common keys.
    schema = Config
    if name in stage_names():
        schema = stage_named(name).schema
    defaults = defaults_of(schema)

    rows = []
    for key, value in flat(config).items():
        default = defaults.get(key, OPEN)
        if value != default != OPEN and key not in NAMES:
            rows.append(Row(key, (default, value)))
    return rows


def defaults_of(schema: type) -> dict[str, str]:
    """Returns the default of each key in the code; `OPEN` for a key without one."""
    defaults = flat(OmegaConf.to_container(OmegaConf.structured(schema)))
    for name, group in get_type_hints(schema).items():
        if is_dataclass(group):
            defaults |= flat(OmegaConf.to_container(OmegaConf.structured(group)), name)
    return defaults
