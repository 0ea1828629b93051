"""The results of a run: a card with its state and main figures, and its samples. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dist_lm.evaluation.comparison import comparison_text, rows_of
from dist_lm.report.charts import HEADLINES, SHOWN_FIRST, known
from dist_lm.report.facts import RunFacts
from dist_lm.tracking.readable import counted, duration, four_digits, readable_count

LONGEST = 1600  # characters of a text
VERDICTS = ("right", "parses")
BEGINNING = ("prompt",)
ANSWERS = ("completion", "found", "text")
KNOWN = (*VERDICTS, *BEGINNING, *ANSWERS, "kind", "language", "expected", "checkpoint", "id", "index")


@dataclass(frozen=True)
class Entry:
    """The newest value of a metric."""

    name: str
    value: str
    unit: str
    before: str  # the first value; empty where the comparison says nothing
    at: str  # the step of the value; empty for the newest step of the run


@dataclass(frozen=True)
class Card:
    """A run in the overview."""

    label: str
    stage: str
    state: str
    words: str
    figures: tuple[Entry, ...]


def card_of(run: RunFacts) -> Card:
    """The card of a run."""
    entries = [entry for name in HEADLINES if (entry := _entry(run, name))]
    return Card(run.label, run.stage, run.state, _words(run), tuple(entries[:SHOWN_FIRST]))


def _entry(run: RunFacts, name: str) -> Entry | None:
    value = run.last(name)
    if value is None:
        return None
    metric = known(name)
    series = run.series[name]
    finite = np.flatnonzero(np.isfinite(series.values))
    learned = metric.better and not name.startswith("perf/") and len(series.values) > 1
    before = four_digits(float(series.values[finite[0]])) if learned else ""
    step = int(series.steps[finite[-1]])
    return Entry(name, four_digits(value), metric.unit, before, f"{step:,}" if step < run.step else "")


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


@dataclass(frozen=True)
class Sample:
    """A sample on the page."""

    kind: str
    verdict: Literal["good", "bad", ""]
    verdict_words: str
    prompt: str
    answer: str
    expected: str
    facts: tuple[tuple[str, str], ...]


def sample_of(row: Mapping[str, Any]) -> Sample:
    """A row of a file of samples, of any stage."""
    judged = [key for key in VERDICTS if isinstance(row.get(key), bool)]
    verdict, words = "", ""
    if judged:
        good = row[judged[0]]
        verdict = "good" if good else "bad"
        words = {"right": ("right", "wrong"), "parses": ("parses", "does not parse")}[judged[0]][0 if good else 1]
    elif "error" in row:
        verdict, words = "bad", str(row["error"])
    answer = next((str(row[key]) for key in ANSWERS if row.get(key) is not None), "")
    return Sample(
        kind=str(row.get("kind") or row.get("language") or row.get("id") or ""),
        verdict=verdict,
        verdict_words=words,
        prompt=_cut(str(row.get("prompt", "")), tail=True),
        answer=_cut(answer),
        expected=_cut(str(row.get("expected", ""))),
        facts=tuple(_facts({key: value for key, value in row.items() if key not in KNOWN and key != "error"})),
    )


def _facts(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for key, value in row.items():
        if isinstance(value, Mapping):
            found += _facts(value)
        elif isinstance(value, bool):
            found.append((key.replace("_", " "), "yes" if value else "no"))
        elif isinstance(value, float):
            found.append((key.replace("_", " "), four_digits(value)))
        elif isinstance(value, int | str) and len(str(value)) <= 40:
            found.append((key.replace("_", " "), str(value)))
    return found


def _cut(text: str, tail: bool = False) -> str:
    """The beginning or the end of a long text, with the number of missing characters."""
    if len(text) <= LONGEST:
        return text
    more = len(text) - LONGEST
    return (
        f"[{more:,} characters before]\n{text[-LONGEST:]}" if tail else f"{text[:LONGEST]}\n[{more:,} characters more]"
    )


@dataclass(frozen=True)
class Scores:
    """What a run of stage `evaluate` found."""

    rows: tuple[tuple[str, str, str, str, str, str], ...]  # model, task, figure, value, interval, items
    comparisons: tuple[str, ...]


def scores_of(run: RunFacts) -> Scores | None:
    """The figures of each model; None for a run of another stage, or that is not finished."""
    if run.stage != "evaluate" or not run.result:
        return None
    rows = []
    for row in [row for model in run.result["models"] for row in rows_of(model)]:
        interval = "" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
        rows.append((row["model"], row["task"], row["figure"], f"{row['value']:.3f}", interval, f"{row['items']:,}"))
    return Scores(tuple(rows), tuple(comparison_text(one) for one in run.result["comparisons"]))
