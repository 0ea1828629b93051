"""The learning rate: warm-up, peak, cosine, floor."""

import pytest

from dist_lm.config.stage import LeadConfig, StageConfig
from dist_lm.training.schedule import learning_rate, stage_rate

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


def test_what_leads_a_stage_has_rates_of_its_own():
    plain = StageConfig(name="test", lr=1e-3, warmup_steps=10, steps=100, min_lr_ratio=0.1)
    leads = [LeadConfig("copying", steps=30, lr_ratio=2.5), LeadConfig("lists", steps=20, lr_ratio=0.5)]
    led = StageConfig(**{**vars(plain), "lead": leads})
    for step, ratio in ((0, 2.5), (9, 2.5), (29, 2.5), (30, 0.5), (49, 0.5), (50, 1), (99, 1)):
        assert stage_rate(plain, step) == learning_rate(step, **PLAN)
        assert stage_rate(led, step) == pytest.approx(ratio * learning_rate(step, **PLAN))
