"""The learning rate: warm-up, peak, cosine, floor."""

import pytest

from dist_lm.training.optimizer import learning_rate

PLAN = {"peak": 1e-3, "warmup_steps": 10, "steps": 100, "min_ratio": 0.1}


def test_the_warmup_is_linear_and_starts_above_zero():
    rates = [learning_rate(step, **PLAN) for step in range(10)]
    assert rates == pytest.approx([1e-4 * (step + 1) for step in range(10)])


def test_the_peak_follows_the_warmup_and_the_floor_is_the_last_step():
    assert learning_rate(10, **PLAN) == pytest.approx(1e-3)
    assert learning_rate(99, **PLAN) == pytest.approx(1e-4)
    rates = [learning_rate(step, **PLAN) for step in range(10, 100)]
    assert rates == sorted(rates, reverse=True)


def test_without_warmup_and_with_a_single_step_it_is_the_peak():
    assert learning_rate(0, peak=1.0, warmup_steps=0, steps=1, min_ratio=0.1) == 1.0
