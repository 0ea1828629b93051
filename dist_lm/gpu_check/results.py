"""The outcomes of checks: a JSON file that is written after each check, and the table of docs/gpu.md made from it.

    {"machine": {"device": ..., "torch": ..., "cuda": ..., "gpus": 1, "rehearsal": false},
     "checks": {"varlen": {"status": "passed", "seconds": 6.1, "reason": "", "facts": {...}, "date": "2026-12-01"}}}

The last word of a fact's name is its unit: `compiled 4x4096 tokens/s`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dist_lm.errors import ArtefactError
from dist_lm.gpu_check.checks import Check
from dist_lm.storage import durable
from dist_lm.tracking.readable import four_digits

BEGIN, END = "<!-- gpu check: begin -->", "<!-- gpu check: end -->"
NOTHING = "Nothing has run on a card yet."

Machine = Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """The outcome of one check."""

    status: Literal["passed", "failed", "over budget"]
    seconds: float
    date: str  # YYYY-MM-DD
    reason: str = ""  # reason of a failure, one line
    facts: Mapping[str, float] = field(default_factory=dict)  # figures; also those measured before a failure

    @property
    def passed(self) -> bool:
        return self.status == "passed"

    def __str__(self) -> str:
        facts = facts_in_words(self.facts)
        if self.passed:
            return facts

        failure = f"{self.status}: {self.reason}"
        return "; before that: ".join(text for text in (failure, facts) if text)


@dataclass
class Results:
    """Results of one machine, by name of the check."""

    machine: Machine
    checks: dict[str, Result] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Writes the results to `path`, replacing an earlier file."""
        # Facts keep their order.
        durable.write_text(path, json.dumps(asdict(self), indent=2) + "\n")


def read_results(path: Path) -> Results | None:
    """Returns the results in a file; None without a file, or if it is empty JSON.

    Raises:
        ArtefactError: the file holds no JSON, or was not written by `Results.write`.
        OSError: a file cannot be read.
    """
    content = durable.read_json(path)
    if not content:
        return None

    try:
        return Results(content["machine"], {name: Result(**fields) for name, fields in content["checks"].items()})
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(f"{path}: not written by `dist-lm gpu check` ({error}); move it away") from error


def facts_in_words(facts: Mapping[str, float]) -> str:
    """Returns facts such as `compiled 4x4096: 31,240 tokens/s; ...`."""
    texts = []
    for name, value in facts.items():
        label, _, unit = name.rpartition(" ")
        texts.append(f"{label}: {four_digits(value)} {unit}")
    return "; ".join(texts)


def table(checks: Sequence[Check], results: Results | None) -> str:
    """Returns Markdown: a line on the machine, then a row for each check; a check without result has an empty cell."""
    lines = [_header(results), "", "| `--only` | check | result |", "| --- | --- | --- |"]

    for check in checks:
        cell = ""
        if results and check.name in results.checks:
            result = results.checks[check.name]
            cell = f"{result.date}: {_cell(result)} "
        lines.append(f"| `{check.name}` | {check.shows} | {cell}|")

    return "\n".join(lines) + "\n"


def _cell(result: Result) -> str:
    words = str(result).replace("|", "\\|")
    if result.passed:
        return f"passed. {words}".removesuffix(". ")
    return f"**{words}**"


def _header(results: Results | None) -> str:
    """Returns the line on the machine; for a rehearsal, or without results, that there is no measurement."""
    if results is None:
        return NOTHING

    machine = results.machine
    if machine["rehearsal"]:
        return f"A rehearsal on a CPU, torch {machine['torch']}. {NOTHING}"

    return f"{machine['gpus']} x {machine['device']}, torch {machine['torch']}, CUDA {machine['cuda']}."


def rewrite(page: Path, content: str) -> None:
    """Replaces the text between the lines BEGIN and END of a page, which stay, and writes the file.

    Args:
        content: whole lines, the last with its line break.

    Raises:
        ArtefactError: the page is missing, or does not have both markers, in order.
        OSError: the page cannot be read or written.
    """
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, begin, after_begin = text.partition(BEGIN)
    _, end, after = after_begin.partition(END)

    if not (begin and end):
        raise ArtefactError(f"{page}: expected the lines {BEGIN} and {END}, between which the table goes")

    durable.write_text(page, f"{before}{BEGIN}\n{content}{END}{after}")
