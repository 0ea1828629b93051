"""Samples of every stage in one form: what was asked, what came, what it was worth. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dist_lm.tracking.readable import four_digits

LONGEST = 1600  # characters of a text
VERDICTS = ("right", "parses")
BEGINNING = ("prompt",)
ANSWERS = ("completion", "found", "text")
KNOWN = (*VERDICTS, *BEGINNING, *ANSWERS, "kind", "language", "expected", "checkpoint", "id", "index")


@dataclass(frozen=True)
class Sample:
    """One card of the page."""

    kind: str
    verdict: Literal["good", "bad", ""]
    verdict_words: str
    prompt: str
    answer: str
    expected: str
    facts: tuple[tuple[str, str], ...]


def sample_of(row: Mapping[str, Any]) -> Sample:
    """A row of a file of samples, whichever stage wrote it."""
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
    """The beginning of a long text, or its end, with a word on what is missing."""
    if len(text) <= LONGEST:
        return text
    more = len(text) - LONGEST
    return (
        f"[{more:,} characters before]\n{text[-LONGEST:]}" if tail else f"{text[:LONGEST]}\n[{more:,} characters more]"
    )
