"""A card for each run: how it stands and the figures that matter most. Pure."""

from dataclasses import dataclass

import numpy as np

from dist_lm.report.charts import known
from dist_lm.report.facts import RunFacts
from dist_lm.tracking.readable import counted, duration, four_digits, readable_count

FIGURES = (  # the first four that a run has
    "tools/call_exact",
    "reward/accuracy",
    "rlhf/win_rate",
    "rlhf/reward_mean",
    "rlhf/kl",
    "generate/prompts",
    "generate/refused",
    "generate/tokens",
    "generate/tokens_per_s",
    "val/bits_per_byte",
    "val/loss",
    "train/loss",
    "perf/tokens_per_s",
    "perf/memory_gib",
)
SHOWN = 4


@dataclass(frozen=True)
class Entry:
    """A figure, and what it was at first; `before` is empty where that says nothing."""

    name: str
    value: str
    unit: str
    before: str


@dataclass(frozen=True)
class Card:
    """One run."""

    label: str
    stage: str
    state: str
    words: str
    figures: tuple[Entry, ...]


def card_of(run: RunFacts) -> Card:
    """The card of a run."""
    entries = [entry for name in FIGURES if (entry := _entry(run, name))]
    return Card(run.label, run.stage, run.state, _words(run), tuple(entries[:SHOWN]))


def _entry(run: RunFacts, name: str) -> Entry | None:
    value = run.last(name)
    if value is None:
        return None
    metric = known(name)
    values = run.series[name].values
    first = values[np.isfinite(values)][0]
    learned = metric.better and not name.startswith("perf/") and len(values) > 1
    return Entry(name, four_digits(value), metric.unit, four_digits(float(first)) if learned else "")


def _words(run: RunFacts) -> str:
    parts = []
    if run.steps:
        parts.append(f"step {run.step:,} of {run.steps:,}")
    elif "answers" in run.result:
        parts.append(f"{run.result['answers']:,} answers")
    if parameters := run.result.get("parameters"):
        parts.append(f"{readable_count(parameters)} parameters")
    elif run.config.get("model", {}).get("name"):
        parts.append(f"model {run.config['model']['name']}")
    if run.layout:
        parts.append(counted(run.layout.world_size, "rank"))
    if seconds := run.result.get("seconds"):
        parts.append(duration(seconds))
    elif len(run.clock.values) > 1:
        parts.append(duration(float(run.clock.values.max() - run.clock.values.min())))
    return " · ".join(part.replace(" ", "\u00a0") for part in parts)
