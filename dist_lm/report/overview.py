"""The results of a run: a card with its state and main figures, its samples, its scores. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dist_lm.evaluation.comparison import comparison_text, rows_of
from dist_lm.report.charts import HEADLINES, NUM_VISIBLE, registered_metric
from dist_lm.report.facts import EMPTY, RunFacts
from dist_lm.tracking.readable import counted, duration, four_digits, passes_in_words, readable_count, visible

LONGEST = 1600  # most characters of a text
EPOCHS = "train/epochs"
NUM_MIXED = 3  # corpora of a mix that a card names
# A key of a sample that holds a judgement -> the words for true and for false.
VERDICTS = {"right": ("right", "wrong"), "parses": ("parses", "does not parse")}
ANSWERS = ("completion", "found", "text")
PLACED = (*VERDICTS, "prompt", *ANSWERS, "kind", "language", "expected", "checkpoint", "id", "index")


@dataclass(frozen=True)
class Entry:
    """The newest value of a metric, formatted."""

    name: str
    value: str
    unit: str
    before: str  # the first value; empty if a comparison says nothing
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
    """Returns the card of a run."""
    figures = [figure for name in HEADLINES if (figure := _entry(run, name))]
    return Card(run.label, run.stage, run.state, _words(run), tuple(figures[:NUM_VISIBLE]))


def _entry(run: RunFacts, name: str) -> Entry | None:
    """Returns the newest finite value of a metric, with the first finite one where a comparison says something; None if
    the run has none."""
    metric = registered_metric(name)
    series = run.series.get(name, EMPTY)
    finite = np.flatnonzero(np.isfinite(series.values))
    if not len(finite):
        return None

    # Speeds do not improve with training, so their first value says nothing.
    learned = metric.better and not name.startswith("perf/") and len(series.values) > 1
    before = four_digits(float(series.values[finite[0]])) if learned else ""

    # A metric that is measured seldom has an older value than the others.
    step = int(series.steps[finite[-1]])
    value = four_digits(float(series.values[finite[-1]]))
    return Entry(name, value, metric.unit, before, f"{step:,}" if step < run.step else "")


def _words(run: RunFacts) -> str:
    """Returns what is known of step or answers, size of the model, ranks and duration of a run, in one line."""
    facts = []
    if run.steps:
        facts.append(f"step {run.step:,} of {run.steps:,}")
    elif "answers" in run.result:
        facts.append(f"{run.result['answers']:,} answers")

    if epochs := _epochs(run):
        facts.append(epochs)

    if parameters := run.result.get("parameters"):
        facts.append(f"{readable_count(parameters)} parameters")
    elif run.config.get("model", {}).get("name"):
        facts.append(f"model {run.config['model']['name']}")

    if run.layout:
        facts.append(counted(run.layout.world_size, "rank"))

    if seconds := run.result.get("seconds"):
        facts.append(duration(seconds))
    elif len(run.clock.values) > 1:
        facts.append(duration(float(run.clock.values.max() - run.clock.values.min())))

    return " · ".join(fact.replace(" ", "\u00a0") for fact in facts)


def _epochs(run: RunFacts) -> str:
    """Returns the passes over the corpora, that of the stage first: `3.0 epochs, 0.20 of language`; empty if they are
    not known."""
    newest = {
        name.removeprefix(EPOCHS): float(series.values[-1])
        for name, series in sorted(run.series.items())
        if name.startswith(EPOCHS) and len(series.values)
    }
    if "" not in newest:
        return ""
    passes_of_stage = newest.pop("")
    passes_of_mixed = [f"{passes_in_words(number)} of {suffix.removeprefix('_')}" for suffix, number in newest.items()]
    return ", ".join([f"{passes_in_words(passes_of_stage)} epochs", *passes_of_mixed[:NUM_MIXED]])


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
    """Returns a row of a file of samples, of any stage, in the form of the page. Missing keys give empty texts; texts
    of more than LONGEST characters are cut, a prompt at its beginning."""
    # Stages judge their samples differently: by a right answer, by syntax, or by an error.
    judgements = [key for key in VERDICTS if isinstance(row.get(key), bool)]
    verdict = ""
    words = ""

    if judgements:
        verdict = "good"
        words, bad_words = VERDICTS[judgements[0]]
        if not row[judgements[0]]:
            verdict, words = "bad", bad_words
    elif "error" in row:
        verdict = "bad"
        words = str(row["error"])

    answer = next((str(row[key]) for key in ANSWERS if row.get(key) is not None), "")

    return Sample(
        kind=str(row.get("kind") or row.get("language") or row.get("id") or ""),
        verdict=verdict,
        verdict_words=words,
        prompt=_cut(str(row.get("prompt", "")), tail=True),
        answer=_cut(answer),
        expected=_cut(str(row.get("expected", ""))),
        facts=tuple(_facts({key: field for key, field in row.items() if key not in PLACED and key != "error"})),
    )


def _facts(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns (name, text) of the flags, numbers and texts of up to 40 characters in a row, those of nested objects
    too; longer texts and lists are left out."""
    facts = []
    for key, field in row.items():
        if isinstance(field, Mapping):
            facts += _facts(field)
        elif isinstance(field, bool):
            facts.append((key.replace("_", " "), "yes" if field else "no"))
        elif isinstance(field, float):
            facts.append((key.replace("_", " "), four_digits(field)))
        elif isinstance(field, int | str) and len(str(field)) <= 40:
            facts.append((key.replace("_", " "), str(field)))

    return facts


def _cut(text: str, tail: bool = False) -> str:
    """Returns `text` with symbols for control characters.

    A text of more than LONGEST characters is cut to its first LONGEST ones, or with `tail` to its last; a further line
    says how many are missing.
    """
    text = visible(text)
    if len(text) <= LONGEST:
        return text

    num_missing = len(text) - LONGEST
    if tail:
        return f"[{num_missing:,} characters before]\n{text[-LONGEST:]}"
    return f"{text[:LONGEST]}\n[{num_missing:,} characters more]"


@dataclass(frozen=True)
class Scores:
    """The results of a run of stage `evaluate`."""

    rows: tuple[tuple[str, str, str, str, str, str], ...]  # model, task, figure, value, interval, items
    comparisons: tuple[str, ...]


def scores_of(run: RunFacts) -> Scores | None:
    """Returns the scores of each model, as texts to show: three decimals, an interval `LOW to HIGH`, empty if there is
    none.

    None for a run of another stage, or one that is not finished.
    """
    if run.stage != "evaluate" or not run.result:
        return None

    rows = []
    for row in [row for model in run.result["models"] for row in rows_of(model)]:
        interval = "" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
        rows.append((row["model"], row["task"], row["figure"], f"{row['value']:.3f}", interval, f"{row['items']:,}"))

    return Scores(tuple(rows), tuple(comparison_text(comparison) for comparison in run.result["comparisons"]))
