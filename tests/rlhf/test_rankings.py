"""The likelihood of rankings, and the agreement of scores with them."""

import itertools
import math
import random

import pytest
import torch

from dist_lm.rlhf.rankings import agreement, calibration_error, choices, pair_losses, ranking_losses

# --- the likelihood of rankings ---


def ranking_loss(scores, ranks) -> float:
    """Of one prompt, all of whose completions are there."""
    score = torch.tensor([scores], dtype=torch.float64)
    return float(ranking_losses(score, torch.tensor([ranks]), torch.ones_like(score, dtype=torch.bool)).sum())


def test_two_completions_are_bradley_and_terry():
    torch.manual_seed(0)
    score = torch.randn(50, 2) * 3
    rank = torch.tensor([[0, 1], [1, 0]]).repeat(25, 1)
    losses = ranking_losses(score, rank, torch.ones(50, 2, dtype=torch.bool)).sum(-1)
    winner, loser = score.gather(1, rank.argsort(1)).unbind(1)
    torch.testing.assert_close(losses, pair_losses(winner, loser))


def test_probabilities_of_all_orders_add_up_to_one():
    scores = [0.3, -1.2, 2.0, 0.7]
    total = sum(torch.tensor(-ranking_loss(scores, list(order))).exp() for order in itertools.permutations(range(4)))
    assert total == pytest.approx(1, abs=1e-6)


def test_only_the_order_of_ranks_counts_and_not_where_a_completion_stands():
    scores, ranks = [0.3, -1.2, 2.0, 0.7, 0.1], [2, 0, 1, 1, 5]
    expected = ranking_loss(scores, ranks)
    assert ranking_loss(scores, [20, -3, 7, 7, 21]) == pytest.approx(expected, abs=1e-6)
    for order in itertools.permutations(range(5)):
        found = ranking_loss([scores[i] for i in order], [ranks[i] for i in order])
        assert found == pytest.approx(expected, abs=1e-5)


def test_a_tie_pulls_its_scores_together_and_holds_them_above_the_rest():
    score = torch.tensor([[2.0, -1.0, 0.5]], requires_grad=True)
    ranking_losses(score, torch.tensor([[0, 0, 1]]), torch.ones(1, 3, dtype=torch.bool)).sum().backward()
    assert score.grad is not None
    low, high, rest = score.grad[0, 1], score.grad[0, 0], score.grad[0, 2]
    assert low < 0 < rest
    assert low < high
    assert abs(float(low + high + rest)) < 1e-6
    equal = [ranking_loss([gap, -gap], [0, 0]) for gap in (0.0, 0.5, 1.0)]
    assert equal == sorted(equal)


def test_completions_that_are_not_there_change_nothing():
    torch.manual_seed(1)
    score, rank = torch.randn(6, 3), torch.stack([torch.randperm(3) for _ in range(6)])
    alone = ranking_losses(score, rank, torch.ones(6, 3, dtype=torch.bool))
    padded = torch.cat([score, torch.tensor([[float("nan"), float("inf")]]).expand(6, -1)], dim=1).requires_grad_()
    there = torch.tensor([True] * 3 + [False] * 2).expand(6, -1)
    losses = ranking_losses(padded, torch.cat([rank, torch.zeros(6, 2, dtype=torch.long)], dim=1), there)
    torch.testing.assert_close(losses[:, :3], alone)
    assert losses[:, 3:].eq(0).all()
    losses.sum().backward()
    assert padded.grad is not None
    assert padded.grad[:, :3].isfinite().all()
    assert padded.grad[:, 3:].eq(0).all()
    assert choices(there).tolist() == [2] * 6


def test_a_margin_asks_for_more():
    winner, loser = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0])
    plain, more = pair_losses(winner, loser), pair_losses(winner, loser, torch.tensor([0.0, 2.0]))
    assert more[0] == plain[0]
    assert more[1] == pair_losses(torch.tensor([1.0]), torch.tensor([0.0]))[0]


# --- agreement of scores with rankings ---


def tau_b(scores: list[float], ranks: list[int]) -> float:
    """From the definition."""
    pairs = list(itertools.combinations(range(len(scores)), 2))
    signs = [((scores[a] > scores[b]) - (scores[a] < scores[b]), (ranks[a] < ranks[b]) - (ranks[a] > ranks[b]))
             for a, b in pairs]  # fmt: skip
    untied = math.prod(sum(1 for sign in signs if sign[side]) for side in (0, 1))
    return sum(one * other for one, other in signs) / math.sqrt(untied) if untied else 0.0


def test_agreement_is_what_its_definition_says():
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
    assert found["accuracy"] == pytest.approx(right / len(pairs))
    assert found["kendall_tau"] == pytest.approx(tau, abs=1e-5)


def test_the_best_is_found_where_one_of_the_best_has_the_largest_score():
    there = torch.ones(3, 3, dtype=torch.bool)
    rank = torch.tensor([[0, 0, 1], [2, 1, 0], [1, 1, 1]])
    score = torch.tensor([[0.0, 5.0, 1.0], [0.0, 5.0, 1.0], [0.0, 1.0, 2.0]])
    assert agreement(score, rank, there)["top1"] == 0.5
    assert agreement(score[2:], rank[2:], there[2:]) == {}


def test_scores_that_are_true_utilities_are_calibrated_and_doubled_ones_are_not():
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(20000, 2, generator=generator) * 1.5
    first = torch.rand(20000, generator=generator) < (score[:, 0] - score[:, 1]).sigmoid()
    rank = torch.stack([~first, first], dim=1).long()
    there = torch.ones(20000, 2, dtype=torch.bool)
    assert calibration_error(score, rank, there) < 0.01
    assert calibration_error(score * 3, rank, there) > 0.05
    assert calibration_error(score[:0], rank[:0], there[:0]) == 0.0
