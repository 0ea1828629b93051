"""Prompts without a signal are replaced, in a bounded number of rounds, and by the same ones after an interruption."""

from dataclasses import replace

import numpy as np
import pytest

from dist_lm.rlhf.config import RewardPartConfig, RlhfConfig
from dist_lm.rlhf.rollouts import Rollouts, ScoredRollouts
from dist_lm.rlhf.schedule import SamplingAgain, positions_with_signal
from tests.rlhf.toy import assert_ends_alike, rollouts_with, run_from, saving, toy

PARTS = {"own": RewardPartConfig(kind="length", target=4, weight=2.0)}


def again(scores: dict[int, list[float]], prompts: int, rounds: int) -> tuple[SamplingAgain, list[tuple[int, int]]]:
    """Sampling where the rollouts of a position have these scores; and what it asks for."""
    asked: list[tuple[int, int]] = []

    def draw(position: int, count: int) -> Rollouts:
        asked.append((position, count))
        own = [place for place in range(position, position + count) for _ in scores[place]]
        return rollouts_with([2] * len(own), [1 + place % 3 for place in own], positions=own, seed=position)

    def judge(rollouts: Rollouts) -> ScoredRollouts:
        places = list(dict.fromkeys(rollouts.position_B.tolist()))
        return ScoredRollouts(rollouts, {"own": np.array([score for place in places for score in scores[place]])})

    return SamplingAgain(draw, judge, PARTS, prompts, rounds), asked


NAN = float("nan")
SCORES = {7: [1, 1], 8: [1, 0], 9: [NAN, 1], 10: [0, 0], 11: [2, 3], 12: [0, 1], 13: [1, 1]}


def test_groups_without_a_signal_are_replaced_by_the_next_prompts():
    sampling, asked = again(SCORES, prompts=3, rounds=5)
    found = sampling(7)
    assert asked == [(7, 3), (10, 2), (12, 1)]  # 8 has a signal; then 11; then 12
    assert found.rollouts.position_B.tolist() == [8, 8, 11, 11, 12, 12]
    assert found.scores["own"].tolist() == [1, 0, 2, 3, 0, 1]
    assert (found.replaced, found.prompts) == (3, 6)
    expected = {place: rollouts_with([2] * 2, [1 + place % 3] * 2, positions=[place] * 2) for place in (8, 11, 12)}
    for one in found.rollouts:
        assert len(one.completion) == expected[one.position].new_tokens_B[0]


def test_after_the_last_round_the_earliest_groups_without_a_signal_fill_up():
    sampling, asked = again(SCORES, prompts=3, rounds=2)
    found = sampling(7)
    assert asked == [(7, 3), (10, 2)]
    assert found.rollouts.position_B.tolist() == [7, 7, 8, 8, 11, 11]
    assert (found.replaced, found.prompts) == (2, 5)
    once, asked = again(SCORES, prompts=3, rounds=1)
    assert once(7).rollouts.position_B.tolist() == [7, 7, 8, 8, 9, 9]
    assert asked == [(7, 3)]


def test_with_a_reward_model_every_group_has_a_signal():
    sampling, _ = again(SCORES, prompts=3, rounds=1)
    judged = sampling(7)
    assert positions_with_signal(judged, PARTS) == [8]
    assert positions_with_signal(judged, PARTS | {"model": RewardPartConfig(kind="reward_model")}) == [7, 8, 9]


# --- a run ---

DAPO = RlhfConfig(
    algorithm="dapo",
    prompts=4,
    samples=2,
    max_new_tokens=8,
    epochs=2,
    lr=1e-3,
    rewards={"length": RewardPartConfig(kind="length", target=1)},  # 1 for one token, 0 for all others
)
STOPS = tuple(range(1, 14))


@pytest.mark.heavy
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("staleness", [0, 1])
def test_an_interrupted_run_draws_the_same_prompts_and_ends_with_the_same_bits(staleness: int):
    config = replace(DAPO, max_staleness=staleness)
    whole = toy(config, 4, stop_tokens=STOPS)
    saved = saving(whole)
    end = whole.run()
    drawn = whole.metric("rollout/prompts")
    assert max(drawn) > config.prompts
    assert end.prompt_position == sum(drawn)
    assert min(whole.metric("rlhf/groups_without_signal")) == 0
    assert all(len(report.rollouts) == 8 for report in whole.reports)
    for stopped in (1, 2):
        resumed = toy(config, 4, stop_tokens=STOPS)
        assert replace(run_from(resumed, saved[stopped]), pending={}) == replace(end, pending={})
        assert_ends_alike(resumed, whole, saved, stopped)
        for again_, report in zip(resumed.reports, whole.reports[stopped:], strict=True):
            assert again_.rollouts.position_B.tolist() == report.rollouts.position_B.tolist()
            assert again_.metrics["rollout/prompts"] == report.metrics["rollout/prompts"]
