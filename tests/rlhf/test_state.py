"""State survives JSON and arrays; the KL controller steers."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dist_lm.rlhf.reward_model import RewardScale
from dist_lm.rlhf.rollouts import ScoredRollouts
from dist_lm.rlhf.state import KlController, RlhfState
from tests.rlhf.toy import rollouts_with

STATE = RlhfState(
    KlController(0.1, 6.0, 1000),
    iteration=3,
    prompt_position=192,
    policy_updates=12,
    value_updates=11,
    nonfinite_updates=1,
    reward_scale=RewardScale(0.3, 1.7),
    best_reward=0.1 + 0.2,
    best_iteration=2,
)


def through_json(state: RlhfState) -> RlhfState:
    return RlhfState.from_dict(json.loads(json.dumps(state.to_dict())), state.arrays())


def test_a_state_comes_back_as_it_was():
    assert through_json(STATE) == STATE
    fresh = RlhfState(KlController(0.1))
    assert through_json(fresh) == fresh


@pytest.mark.parametrize("void", [float("nan"), float("inf")])
def test_a_best_reward_that_is_no_number_is_forgotten(void):
    """Older releases kept it, and then no iteration was better."""
    found = through_json(replace(STATE, best_reward=void))
    assert found == replace(STATE, best_reward=None, best_iteration=0)


def test_pending_rollouts_come_back_to_the_bit():
    drawn = {4: rollouts_with([1, 2], [3, 1], version=2), 11: rollouts_with([2], [5], version=3, seed=1)}
    scores = {4: {"mine": np.array([0.1, np.nan]), "a.b": np.array([1.0, 2.0])}, 11: {}}
    marks = {4: {"forged": np.array([True, False])}, 11: {}}
    skipped = {4: {"a.b": np.array([False, True])}, 11: {}}
    pending = {
        n: ScoredRollouts(rollouts, scores[n], marks=marks[n], skipped=skipped[n]) for n, rollouts in drawn.items()
    }
    found = through_json(replace(STATE, pending=pending)).pending
    assert list(found) == [4, 11]
    for iteration, judged in pending.items():
        for name, value in vars(judged.rollouts).items():
            assert np.array_equal(getattr(found[iteration].rollouts, name), value), name
        assert found[iteration].scores.keys() == judged.scores.keys()
        for name, value in judged.scores.items():
            assert np.array_equal(found[iteration].scores[name], value, equal_nan=True), name
        assert found[iteration].marks.keys() == judged.marks.keys()
        for name, value in judged.marks.items():
            assert np.array_equal(found[iteration].marks[name], value), name
        assert found[iteration].skipped.keys() == judged.skipped.keys()
        for name, value in judged.skipped.items():
            assert np.array_equal(found[iteration].skipped[name], value), name


def test_an_adaptive_coefficient_goes_after_its_target_and_a_fixed_one_stays():
    assert KlController(0.1).after(kl=50.0, sequences=1000) == KlController(0.1)
    held = KlController(0.1, target=6.0, horizon=1000)
    assert held.after(6.0, 100).coefficient == pytest.approx(0.1)
    assert held.after(60.0, 100).coefficient == pytest.approx(0.1 * 1.02)  # the error is clipped to 0.2
    assert held.after(0.0, 100).coefficient == pytest.approx(0.1 * 0.98)
    assert held.after(6.6, 100).coefficient == pytest.approx(0.1 * 1.01)
