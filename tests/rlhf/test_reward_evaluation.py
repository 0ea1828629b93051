"""Held-out figures of a reward model: those of a plain count, by source and by number of completions."""

import math

import numpy as np
import pytest

from dist_lm.rlhf.reward_evaluation import ScoredRanking, mean_loss, reward_metrics


def ranked(source: str, scores: list[float], ranks: list[int]) -> ScoredRanking:
    return ScoredRanking(source, np.array(scores, np.float32), np.array(ranks, np.uint8), None)


def judged(source: str, better: float, worse: float, margin: float = 0.0) -> ScoredRanking:
    return ScoredRanking(source, np.array([better, worse], np.float32), np.array([0, 1], np.uint8), margin)


SCORED = [
    ranked("people", [3.0, 2.0, 1.0], [0, 1, 2]),  # all right
    ranked("people", [1.0, 2.0], [0, 1]),  # wrong
    judged("others", 2.0, 0.0, margin=1.0),  # right
]


def test_figures_of_all_of_sources_and_of_sizes() -> None:
    found = reward_metrics(SCORED)
    assert found["reward/accuracy"] == pytest.approx(4 / 5)
    assert found["reward/kendall_tau"] == pytest.approx((1 - 1 + 1) / 3)
    assert found["reward/top1"] == pytest.approx(2 / 3)
    assert found["reward/accuracy_people"] == pytest.approx(3 / 4)
    assert found["reward/accuracy_others"] == 1
    assert found["reward/accuracy_k3"] == 1
    assert found["reward/accuracy_k2"] == pytest.approx(1 / 2)
    assert found["reward/kendall_tau_k2"] == 0
    assert {
        "reward/calibration_error",
        "reward/calibration_error_k3",
        "reward/calibration_error_people",
    } <= found.keys()


def test_the_loss_is_a_mean_over_choices_with_margins() -> None:
    def pair(lead: float) -> float:
        return math.log1p(math.exp(-lead))

    three = math.log(1 + math.exp(-1) + math.exp(-2)) + pair(1.0)
    assert mean_loss(SCORED[:1]) == pytest.approx(three / 2)
    assert mean_loss(SCORED) == pytest.approx((three + pair(-1.0) + pair(2.0 - 1.0)) / 4)
    assert reward_metrics(SCORED)["val/loss_others"] == pytest.approx(pair(1.0))
