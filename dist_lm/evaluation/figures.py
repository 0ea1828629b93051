"""From answers to figures: the request of a question, the record of an answer, the figures of a task's records."""

import hashlib
from collections import Counter
from collections.abc import Callable
from typing import Any

from dist_lm.evaluation.statistics import Estimate, estimate, pass_at_k, ratio_estimate
from dist_lm.evaluation.tasks import BITS, Item, Record
from dist_lm.generation.request import Answer, Request
from dist_lm.model.keyed_random import hash_words, signed


def request_of(number: int, task: str, item: Item, seed: int) -> Request:
    """The request of a question. Its random numbers are keyed by (seed, task, question).

    Args:
        number: its id.
        seed: of the run.
    """
    digest = hashlib.sha256(f"{task}/{item.id}".encode()).digest()
    own = signed(hash_words(seed, int.from_bytes(digest[:8], "big")))
    return Request(str(number), item.prompt, item.params, own, item.n)


def refused(item: Item, error: str) -> Record:
    """The record of a question that could not be asked; it counts as failed."""
    return {"id": item.id, "group": item.group, "index": 0, "passed": False, "outcome": "refused", "error": error}


def recorded(item: Item, answer: Answer, judged: Callable[[], Record]) -> Callable[[], Record]:
    """A function that waits for the judgement of an answer; returns its record."""

    def record() -> Record:
        known = {"id": item.id, "group": item.group, "index": answer.index}
        return known | judged() | {"text": answer.text, "tokens": len(answer.tokens), "finish": answer.finish}

    return record


def task_figures(records: list[Record], ks: list[int]) -> dict[str, Any]:
    """pass@k over questions with intervals, shares of groups, and the values of each question."""
    passed: dict[str, list[bool]] = {}
    group: dict[str, str] = {}
    for record in records:
        passed.setdefault(record["id"], []).append(record["passed"])
        group[record["id"]] = record["group"]
    values = {k: [pass_at_k(max(k, len(own)), sum(own), k) for own in passed.values()] for k in sorted({1, *ks})}
    first = dict(zip(passed, values[1], strict=True))
    groups = {}
    for name in sorted({*group.values()} - {""}):
        own = [value for one, value in first.items() if group[one] == name]
        groups[name] = ("pass@1", sum(own) / len(own), len(own))
    return {
        "figures": {f"pass@{k}": _shown(estimate(values[k])) for k in sorted({1, *ks})},
        "groups": groups,
        "outcomes": _outcomes(records),
        "ids": list(passed),
        "values": values[1],
    }


def bits_figures(records: list[Record]) -> dict[str, Any]:
    """Bits per byte over all documents, and of each source."""

    def of(part: list[Record]) -> Estimate:
        return ratio_estimate([one["bits"] for one in part], [one["bytes"] for one in part])

    mean_bytes = sum(record["bytes"] for record in records) / len(records)
    sources = sorted({record["group"] for record in records})
    parts = {source: [record for record in records if record["group"] == source] for source in sources}
    return {
        "figures": {BITS: _shown(of(records))}
        | {f"{BITS}, {source}": _shown(of(part)) for source, part in parts.items()},
        "groups": {},
        "outcomes": {},
        "ids": [record["id"] for record in records],
        "values": [record["bits"] / mean_bytes for record in records],  # their mean is the figure
    }


def reward_figures(records: list[Record]) -> dict[str, Any]:
    """The mean score of the answers that have one; its unit is that of the reward model."""
    scores = {record["id"]: record["score"] for record in records if "score" in record}
    return {
        "figures": {"score": _shown(estimate([*scores.values()]))} if scores else {},
        "groups": {},
        "outcomes": _outcomes(records),
        "ids": [*scores],
        "values": [*scores.values()],
    }


def _outcomes(records: list[Record]) -> dict[str, int]:
    """The number of records of each outcome; scores of older runs have none."""
    return dict(sorted(Counter(record.get("outcome", "scored") for record in records).items()))


def _shown(found: Estimate) -> dict[str, Any]:
    return {"value": found.value, "low": found.low, "high": found.high, "items": found.tasks}
