"""Turns questions into requests, answers into records, and the records of a task into figures."""

import hashlib
from collections import Counter
from collections.abc import Callable
from typing import Any

from dist_lm.evaluation.statistics import Estimate, estimate, pass_at_k, ratio_estimate
from dist_lm.evaluation.tasks import BITS, Item, Record
from dist_lm.generation.request import Answer, Request
from dist_lm.model.keyed_random import hash_words, signed


def request_of(number: int, task: str, question: Item, seed: int) -> Request:
    """Returns the request of a question. Its random numbers are keyed by (seed, task, question).

    Args:
        number: id of the request.
        seed: seed of the run.
    """
    digest = hashlib.sha256(f"{task}/{question.id}".encode()).digest()
    request_seed = signed(hash_words(seed, int.from_bytes(digest[:8], "big")))
    return Request(
        str(number), question.prompt, question.params, request_seed, question.n, constraint=question.constraint
    )


def refused(question: Item, error: str) -> Record:
    """Returns the record of a question that could not be asked, or not be answered, in place of all its answers, with
    index 0; it counts as failed."""
    return {
        "id": question.id,
        "group": question.group,
        "index": 0,
        "passed": False,
        "outcome": "refused",
        "error": error,
    }


def recorded(question: Item, answer: Answer, judged: Callable[[], Record]) -> Callable[[], Record]:
    """Returns a function that waits for the judgement of an answer (`judged`) and returns its record; it raises what
    `judged` raises."""

    def record() -> Record:
        identity = {"id": question.id, "group": question.group, "index": answer.index}
        return identity | judged() | {"text": answer.text, "tokens": len(answer.tokens), "finish": answer.finish}

    return record


def task_figures(records: list[Record], ks: list[int]) -> dict[str, Any]:
    """Returns pass@k over questions with intervals, pass@1 of groups, and the pass@1 of each question (ids, values).

    pass@1 is always among the figures. `groups` are (name, share, questions), without the questions that have none;
    `outcomes` counts records by their outcome.

    Args:
        records: at least one; those of a question may have any order.
        ks: largest numbers of samples; a question with fewer answers counts the missing ones as failed.
    """
    passed_of: dict[str, list[bool]] = {}  # question -> whether each of its answers passed
    group_of: dict[str, str] = {}
    for record in records:
        passed_of.setdefault(record["id"], []).append(record["passed"])
        group_of[record["id"]] = record["group"]

    # A refused question has one record whatever n is, so it counts as k samples that fail.
    pass_rates = {
        k: [pass_at_k(max(k, len(passed)), sum(passed), k) for passed in passed_of.values()] for k in sorted({1, *ks})
    }
    pass_at_1 = dict(zip(passed_of, pass_rates[1], strict=True))

    groups = {}
    for group in sorted({*group_of.values()} - {""}):
        rates = [rate for question, rate in pass_at_1.items() if group_of[question] == group]
        groups[group] = ("pass@1", sum(rates) / len(rates), len(rates))
    return {
        "figures": {f"pass@{k}": _figure(estimate(rates)) for k, rates in pass_rates.items()},
        "groups": groups,
        "outcomes": _outcomes(records),
        "ids": list(passed_of),
        "values": pass_rates[1],
    }


def bits_figures(records: list[Record]) -> dict[str, Any]:
    """Returns bits per byte over all documents, and of each source, with intervals; `values` are per document.

    Args:
        records: as returned by `document_bits`, at least one.
    """

    def bits_per_byte(part: list[Record]) -> dict[str, Any]:
        return _figure(ratio_estimate([record["bits"] for record in part], [record["bytes"] for record in part]))

    figures = {BITS: bits_per_byte(records)}
    for source in sorted({record["group"] for record in records}):
        figures[f"{BITS}, {source}"] = bits_per_byte([record for record in records if record["group"] == source])

    mean_bytes = sum(record["bytes"] for record in records) / len(records)
    return {
        "figures": figures,
        "groups": {},
        "outcomes": {},
        "ids": [record["id"] for record in records],
        "values": [record["bits"] / mean_bytes for record in records],  # their mean is the figure
    }


def reward_figures(records: list[Record]) -> dict[str, Any]:
    """Returns the mean score of the answers that have one, with its interval, and the score of each question (ids,
    values); its unit is that of the reward model. Without scores: no figure.

    Args:
        records: one for each question.
    """
    scores = {record["id"]: record["score"] for record in records if "score" in record}
    return {
        "figures": {"score": _figure(estimate([*scores.values()]))} if scores else {},
        "groups": {},
        "outcomes": _outcomes(records),
        "ids": [*scores],
        "values": [*scores.values()],
    }


def _outcomes(records: list[Record]) -> dict[str, int]:
    """Returns the number of records of each outcome; scores of older runs have no outcome."""
    return dict(sorted(Counter(record.get("outcome", "scored") for record in records).items()))


def _figure(interval: Estimate) -> dict[str, Any]:
    return {"value": interval.value, "low": interval.low, "high": interval.high, "items": interval.tasks}
