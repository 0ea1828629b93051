"""Spikes of the loss: found where they are, never early, and the same after a resume."""

import json
import random
import statistics
from dataclasses import asdict

import pytest

from dist_lm.training.state import SEEN_ENOUGH, WINDOW, LossTrend, TrainState


def losses(count: int) -> list[float]:
    noise = random.Random(1)
    return [3 + noise.gauss(0, 0.1) for _ in range(count)]


def trend_of(seen: list[float]) -> LossTrend:
    trend = LossTrend()
    for loss in seen:
        trend = trend.after(loss)
    return trend


def test_the_first_losses_have_the_plain_mean_and_variance():
    seen = losses(WINDOW)
    trend = trend_of(seen)
    assert trend.mean == pytest.approx(statistics.fmean(seen))
    assert trend.variance == pytest.approx(statistics.pvariance(seen))


def test_old_losses_are_forgotten():
    trend = trend_of([9.0] * WINDOW + losses(10 * WINDOW))
    assert trend.mean == pytest.approx(3, abs=0.05)
    assert trend.variance**0.5 == pytest.approx(0.1, rel=0.5)


def test_noise_and_falling_losses_are_no_spikes_and_a_jump_is_one():
    falling = [5 * 0.99**step + loss for step, loss in enumerate(losses(1000))]
    trend, spikes = LossTrend(), 0
    for loss in falling:
        spikes += trend.is_spike(loss)
        trend = trend.after(loss)
    assert spikes == 0
    assert trend.is_spike(trend.mean + 1)
    assert not trend.is_spike(trend.mean - 1)


def test_nothing_is_judged_before_enough_was_seen():
    assert not trend_of(losses(SEEN_ENOUGH - 1)).is_spike(1e9)
    assert trend_of(losses(SEEN_ENOUGH)).is_spike(1e9)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_leaves_the_trend_alone(loss):
    trend = trend_of(losses(100))
    assert trend.after(loss) == trend
    assert not trend.is_spike(loss)


def test_a_state_comes_back_from_json_to_the_bit():
    state = TrainState(step=100, loss_spikes=2, loss_trend=trend_of(losses(100)), best_val_loss=1 / 3)
    assert TrainState.from_json(json.loads(json.dumps(asdict(state)))) == state


def test_a_state_of_an_older_version_can_be_read():
    assert TrainState.from_json({"step": 3, "tokens": 4}) == TrainState(step=3, tokens=4)
