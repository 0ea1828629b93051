"""Agreement of scores with rankings."""

import itertools
import math
import random

import pytest
import torch

from dist_lm.rlhf.ranking_metrics import Agreement, agreement, calibration_error


def tau_b(scores: list[float], ranks: list[int]) -> float:
    """From the definition."""
    pairs = list(itertools.combinations(range(len(scores)), 2))
    signs = [((scores[a] > scores[b]) - (scores[a] < scores[b]), (ranks[a] < ranks[b]) - (ranks[a] > ranks[b]))
             for a, b in pairs]  # fmt: skip
    untied = math.prod(sum(1 for sign in signs if sign[side]) for side in (0, 1))
    return sum(one * other for one, other in signs) / math.sqrt(untied) if untied else 0.0


def test_agreement_is_what_its_definition_says_in_whatever_parts_it_is_counted():
    dice = random.Random(0)
    rows = [
        [(dice.choice([0.0, 1.0, 2.5, 3.0, -1.0]), dice.randrange(4)) for _ in range(dice.randint(2, 6))]
        for _ in range(60)
    ]
    width = max(map(len, rows))
    score = torch.tensor([[s for s, _ in row] + [9e9] * (width - len(row)) for row in rows])
    rank = torch.tensor([[r for _, r in row] + [-7] * (width - len(row)) for row in rows])
    there = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    pairs = [(a, b) for row in rows for a, b in itertools.combinations(row, 2) if a[1] != b[1]]
    right = sum(0.5 if a[0] == b[0] else (a[0] > b[0]) == (a[1] < b[1]) for a, b in pairs)
    ranked = [row for row in rows if len({r for _, r in row}) > 1]
    tau = sum(tau_b([s for s, _ in row], [r for _, r in row]) for row in ranked) / len(ranked)

    found = agreement(score, rank, there)
    assert found.metrics()["accuracy"] == pytest.approx(right / len(pairs))
    assert found.metrics()["kendall_tau"] == pytest.approx(tau, abs=1e-5)
    parts = sum((agreement(*(x[i : i + 7] for x in (score, rank, there))) for i in range(0, 60, 7)), Agreement())
    assert parts.metrics() == pytest.approx(found.metrics(), abs=1e-5)


def test_the_best_is_found_where_one_of_the_best_has_the_largest_score():
    there = torch.ones(3, 3, dtype=torch.bool)
    rank = torch.tensor([[0, 0, 1], [2, 1, 0], [1, 1, 1]])
    score = torch.tensor([[0.0, 5.0, 1.0], [0.0, 5.0, 1.0], [0.0, 1.0, 2.0]])
    assert agreement(score, rank, there).metrics()["top1"] == 0.5
    assert agreement(score[2:], rank[2:], there[2:]).metrics() == {}


def test_scores_that_are_true_utilities_are_calibrated_and_doubled_ones_are_not():
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(20000, 2, generator=generator) * 1.5
    first = torch.rand(20000, generator=generator) < (score[:, 0] - score[:, 1]).sigmoid()
    rank = torch.stack([~first, first], dim=1).long()
    there = torch.ones(20000, 2, dtype=torch.bool)
    assert calibration_error(score, rank, there) < 0.01
    assert calibration_error(score * 3, rank, there) > 0.05
    assert calibration_error(score[:0], rank[:0], there[:0]) == 0.0
