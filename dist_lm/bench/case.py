"""Values of a benchmark: the cases it compares, and the records it writes.

A record is one JSON object per line for programs and one row of a table for people.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.machinery import PathFinder
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dist_lm.config.root import Config
from dist_lm.prepare.compose import compose_config
from dist_lm.stages.registry import stage_named
from dist_lm.stages.text import TextStage

TOKENS_A_SECOND = "tokens/s"
# Without randomness and regularisation all variants of a case have the same losses, so that these can be compared.
BASE = (
    "tracking=none",
    "parallel.compute_dtype=fp32",
    "parallel.compile=never",
    "stage.dropout=0",
    "stage.rates.embedding=1",  # one rate, as peers have
    "model.residual_init=depth",
)
OF_TEXT = ("stage.label_smoothing=0", "stage.document_mask=false")  # stages that read rankings have no such keys
AS_USED = "parallel.compute_dtype=auto"  # overrides BASE: a user's arithmetic, bf16 on CUDA and fp32 on a CPU


@dataclass(frozen=True)
class GroupSize:
    """Size of a group of rank processes. Variants of the same size and label share the same processes."""

    ranks: int
    threads: int = 1  # threads of each rank, on the CPU
    label: str = ""  # sets variants apart that would disturb each other in one process


@dataclass(frozen=True)
class Comparison:
    """One row of the table: a variant of doing the work, and the variants that it is measured against."""

    variant: str
    peer: str | None = None  # a variant; None: there is no peer, or it cannot run here
    peer_name: str = ""  # text for people; without a `peer` it names the peer and says why it cannot run
    ceiling: str | None = None  # a variant that does strictly less work
    fact: str | None = None  # compare this fact of the trials, in its own unit; None: compare speed


def against(variant: str, peer: str, why_not: str | None, ceiling: str) -> Comparison:
    """Returns the comparison of `variant` with `peer`; a peer that cannot run is named with the reason `why_not`."""
    # The row stays in the table, so that a reader sees which peer is missing and why.
    if why_not:
        return Comparison(variant, peer_name=f"{peer}: {why_not}", ceiling=ceiling)
    return Comparison(variant, peer, ceiling=ceiling)


def why_absent(packages: Iterable[str], modules: Mapping[str, str] | None = None) -> str | None:
    """Returns the reason why a peer cannot run; None if it can. No package is imported.

    Args:
        packages: the packages that the peer imports.
        modules: submodules that not every release has -> requirement that names a release with it.
    """
    missing = [package for package in packages if not importlib.util.find_spec(package)]
    if missing:
        return f"{', '.join(missing)} not installed"

    for module, requirement in (modules or {}).items():
        package = module.partition(".")[0]
        if not _has(package, module):
            return f"{package} {importlib.metadata.version(package)} has no {module} ({requirement} has)"
    return None


def _has(package: str, module: str) -> bool:
    """Returns whether an installed package has a submodule, without importing anything; `find_spec` of the whole name
    would import its parents."""
    # Each part of the name is looked for in the folder of the part before, which imports nothing.
    spec = importlib.util.find_spec(package)
    names = module.split(".")
    for end in range(2, len(names) + 1):
        if spec is None:
            return False
        spec = PathFinder.find_spec(".".join(names[:end]), spec.submodule_search_locations)
    return spec is not None


@dataclass(frozen=True)
class Case:
    """One workload and the variants to do it, all timed in the same rounds."""

    name: str
    config: Config
    variants: Mapping[str, GroupSize]
    comparisons: Sequence[Comparison]
    same_losses: frozenset[str] = frozenset()  # variants whose losses in the first steps must be equal
    rounds: int = 15
    amount: int = 0  # work of a step, in `unit` without the `/s`; 0: the tokens of the step
    unit: str = TOKENS_A_SECOND

    @property
    def a_step(self) -> int:
        """Work of a step; divided by the seconds of the step it gives a speed in `unit`."""
        return self.amount or self.config.stage.global_batch * self.config.stage.seq_len


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: its cases, and the function that builds one variant of a case in each rank."""

    cases: Callable[[Sequence[str], bool], list[Case]]  # (overrides of a user, quick) -> the cases
    build: Callable  # (variant, config, world) -> Trial


def benchmark_at(import_path: str) -> Benchmark:
    """Imports the benchmark at 'package.module' (which has `cases` and `build` itself) or 'package.module:OBJECT'."""
    module_name, _, name = import_path.partition(":")
    module = importlib.import_module(module_name)
    return getattr(module, name) if name else module  # type: ignore[return-value]


def configurations(shapes: Sequence[Sequence[str]], overrides: Sequence[str], quick: bool) -> list[Config]:
    """Returns one configuration composed from the user's `overrides`; without any, one from each shape (`quick`: the
    first). BASE comes before all of them.

    Raises:
        ConfigError, ArtefactError, UserError: as `compose_config`.
        OSError: a file cannot be read.
    """
    if overrides:
        shapes = [overrides]
    elif quick:
        shapes = shapes[:1]
    return [compose_config([*_default_stage(shape), *BASE, *shape]) for shape in shapes]


def _default_stage(overrides: Sequence[str]) -> list[str]:
    """Returns `stage=language` unless the overrides name a stage, and what a stage of text adds to `BASE`."""
    named = [text.partition("=")[2] for text in overrides if text.startswith("stage=")]
    if not named:
        return ["stage=language", *OF_TEXT]
    return [*OF_TEXT] if isinstance(stage_named(named[-1]), TextStage) else []


def describe(config: Config) -> str:
    """Returns the name of a case, such as `nano 160 wide 4 heads 2x64` (sequences x tokens)."""
    model, stage = config.model, config.stage

    heads = f"{model.n_heads}"
    # Grouped-query attention is other work, so the name of the case must say it.
    if model.kv_heads != model.n_heads:
        heads += f"/{model.kv_heads}"
    return f"{model.name} {model.d_model} wide {heads} heads {stage.global_batch}x{stage.seq_len}"


# --- records ---


@dataclass(frozen=True, kw_only=True)
class Record:
    """The result of one comparison. A peer without a value could not run here; its name says why."""

    bench: str
    case: str
    value: float  # median over the rounds
    unit: str
    peer: str | None = None
    peer_value: float | None = None
    ratio: float | None = None  # value / peer_value
    ceiling: float | None = None
    ceiling_fraction: float | None = None  # value / ceiling
    rounds: int
    spread: float  # interquartile range of the value / its median

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)


def records_of(
    bench: str, case: Case, seconds: Mapping[str, Sequence[float]], facts: Mapping[str, Mapping[str, float]]
) -> list[Record]:
    """Returns the records of a case, one for each comparison, in that order; speeds are medians over the rounds.

    Args:
        seconds: variant -> seconds of a step, one value per round.
        facts: variant -> name -> value, as its trial reports them. The last word of a name is its unit: `peak MiB`.
    """
    return [_record(bench, case, comparison, seconds, facts) for comparison in case.comparisons]


def _record(
    bench: str,
    case: Case,
    comparison: Comparison,
    seconds: Mapping[str, Sequence[float]],
    facts: Mapping[str, Mapping[str, float]],
) -> Record:
    """Returns the record of one comparison: of speed, the median over the rounds, or of a fact, which is measured once.
    Other arguments are those of `records_of`."""
    # The last word is the unit, of a fact as of a speed.
    quantity, _, unit = (comparison.fact or f"speed {case.unit}").rpartition(" ")

    def value_of(variant: str) -> float:
        if comparison.fact:
            return facts[variant][comparison.fact]
        # Medians, because a busy moment of the machine spoils single rounds.
        return case.a_step / statistics.median(seconds[variant])

    value = value_of(comparison.variant)
    name, measured = f"{case.name}: {comparison.variant}", seconds[comparison.variant]
    # A fact is reported once; a speed is measured in every round.
    if comparison.fact:
        name, measured = f"{name}, {quantity}", [value]

    record = Record(
        bench=bench,
        case=name,
        value=value,
        unit=unit,
        peer=comparison.peer_name or comparison.peer,
        rounds=len(measured),
        spread=spread(measured),
    )
    if comparison.peer:
        peer_value = value_of(comparison.peer)
        record = replace(record, peer_value=peer_value, ratio=value / peer_value)
    if comparison.ceiling:
        ceiling = value_of(comparison.ceiling)
        record = replace(record, ceiling=ceiling, ceiling_fraction=value / ceiling)
    return record


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Writes a file of JSON lines, one for each record."""
    path.write_text("".join(record.to_json() + "\n" for record in records), encoding="utf-8")


def spread(values: Sequence[float]) -> float:
    """Returns interquartile range / median; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return (upper - lower) / median


def table_of(title: str, records: Iterable[Record]) -> Table:
    """Returns the records as a table for people, a row for each; missing figures are `-`."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("case")
    for column in ("value", "peer", "ratio", "ceiling", "spread"):
        # The minimum width keeps the longest word of a peer's name on one line.
        table.add_column(column, justify="right", overflow="fold", min_width={"peer": 18}.get(column))

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
    if value is None:
        return "-"
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
