"""Samples of a run as a table: what a stage left in a file of JSON lines, a row an object."""

import json
from collections.abc import Iterable
from typing import Any

from dist_lm.tracking.redact import redact_text

ROWS = 200
CHARACTERS = 4000  # of a cell
NUMBERS = ("tokens", "logprobs", "raw_logprobs")  # a number a token: of a program, not of a person
NAMES = {"tools": "samples/tool_calls", "rlhf": "samples/rollouts"}


def table_name(stage: str) -> str:
    """What the table of a stage's samples is called."""
    return NAMES.get(stage, "samples/generations")


def table_of(samples: Iterable[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """(columns, rows) of the first `ROWS` samples; long texts are cut, and what is no single value is JSON.

    The columns are the keys of all samples in the order of their appearance, without those of a number a token; a row
    without one has None there.
    """
    kept = [sample for _, sample in zip(range(ROWS), samples, strict=False)]
    columns = [key for key in dict.fromkeys(key for sample in kept for key in sample) if key not in NUMBERS]
    return columns, [[_cell(sample.get(column)) for column in columns] for sample in kept]


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    text = redact_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} ... ({len(text)} characters)"
