"""Which version draws what, whatever takes how long."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from dist_lm.generation.request import SamplingParams
from dist_lm.rlhf.rollouts import ScoredRollouts, requests_of
from dist_lm.rlhf.schedule import RolloutSchedule, draws_rollouts
from tests.patience import patient
from tests.rlhf.toy import rollouts_with

ITERATIONS = 6
DEADLINE_S = patient(20.0)


class Versions:
    """A source that remembers the version it has, and can be made to wait."""

    def __init__(self) -> None:
        self.version = -1
        self.may_draw = threading.Event()
        self.may_draw.set()

    def load_weights(self, weights, version):
        (_, value), *_ = weights
        assert int(value) == version
        self.version = version

    def hold(self, weights):
        return list(weights)

    def drew(self, iteration):
        pass

    def generate(self, requests):
        raise NotImplementedError


def weights(version: int) -> Iterator[tuple[str, torch.Tensor]]:
    yield "w", torch.tensor(version)


def by_position(rollouts) -> ScoredRollouts:
    return ScoredRollouts(rollouts, {"rule": rollouts.position_B / 8})


def schedule(source, staleness: int, judge=by_position) -> RolloutSchedule:
    def draw(iteration):  # the position of its only prompt
        assert source.may_draw.wait(DEADLINE_S)
        source.drew(iteration)
        return rollouts_with([1], [2], version=source.version, positions=[iteration])

    return RolloutSchedule(source, draw, judge, staleness=staleness, iterations=ITERATIONS, prompts=1)


def go_on(made: RolloutSchedule, staleness: int, begin: int, end: int) -> list[int]:
    """Iterations `begin` to `end` - 1: the version that drew the rollouts of each."""
    versions = []
    for iteration in range(begin, end):
        judged = made.take(iteration).scored
        rollouts = judged.rollouts
        assert judged.scores["rule"].tolist() == [iteration / 8]
        assert rollouts.position_B.tolist() == [iteration]
        versions.append(int(rollouts.version_B[0]))
        if draws_rollouts(iteration + 1, staleness, ITERATIONS):
            made.push(iteration + 1, weights(iteration + 1))
    return versions


@pytest.mark.parametrize("staleness", [0, 1, 2, 9])
def test_rollouts_are_as_stale_as_allowed_and_no_staler_also_after_a_resume(staleness):
    expected = [max(0, i - staleness) for i in range(ITERATIONS)]
    source = Versions()
    with schedule(source, staleness) as made:
        made.begin(0, weights(0), {})
        assert go_on(made, staleness, 0, ITERATIONS) == expected
    for stopped in range(1, ITERATIONS):
        with schedule(Versions(), staleness) as made:
            made.begin(0, weights(0), {})
            before = go_on(made, staleness, 0, stopped)
            pending = made.ahead(stopped)
        assert len(pending) == min(staleness, ITERATIONS - stopped)
        with schedule(Versions(), staleness) as made:
            made.begin(stopped, weights(stopped), pending, stopped)
            assert before + go_on(made, staleness, stopped, ITERATIONS) == expected


def test_the_next_rollouts_are_drawn_while_one_trains():
    source = Versions()
    with schedule(source, 1) as made:
        made.begin(0, weights(0), {})
        made.take(0)
        source.may_draw.clear()
        made.push(1, weights(1))  # does not wait for anything
        source.may_draw.set()
        assert made.take(1).scored.rollouts.version_B.tolist() == [0]


def test_rules_judge_while_the_next_rollouts_are_drawn():
    drawn, judged = ({iteration: threading.Event() for iteration in range(ITERATIONS)} for _ in range(2))

    class Telling(Versions):
        def drew(self, iteration):
            drawn[iteration].set()

    def judge(rollouts):
        iteration = int(rollouts.position_B[0])
        assert drawn[min(iteration + 1, 2)].wait(DEADLINE_S)
        judged[iteration].set()
        return by_position(rollouts)

    with schedule(Telling(), 2, judge) as made:
        made.begin(0, weights(0), {})
        assert judged[2].wait(3 * DEADLINE_S)  # before anybody takes them
        assert go_on(made, 2, 0, 3) == [0, 0, 0]


@pytest.mark.parametrize("staleness", [0, 1])
def test_what_a_source_raises_reaches_who_takes(staleness):
    class Broken(Versions):
        def load_weights(self, weights, version):
            raise RuntimeError("no such weights")

    def begin_and_take():
        with schedule(Broken(), staleness) as made:
            made.begin(0, weights(0), {})
            made.take(0)

    with pytest.raises(RuntimeError, match="no such weights"):
        begin_and_take()


@pytest.mark.parametrize("filters", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_sets_are_asked_for_with_a_filter_only(filters) -> None:
    """Of a whole distribution they would be the vocabulary."""
    for params, expected in ((SamplingParams(), False), (SamplingParams(**filters), True)):
        found = requests_of([[0], [1]], 0, 1, params, seed=0)
        assert [request.keep_sets for request in found] == [expected, expected]


def test_pending_scores_that_fp32_does_not_hold_are_judged_again():
    """An older release kept them; the function may be mended by now."""
    rollouts = rollouts_with([1], [2], positions=[2])
    for score, expected in ((1e300, 0.25), (7.0, 7.0), (np.nan, np.nan)):
        with schedule(Versions(), 1) as made:
            made.begin(2, weights(2), {2: ScoredRollouts(rollouts, {"rule": np.array([score])})}, 2)
            assert np.array_equal(made.take(2).scored.scores["rule"], [expected], equal_nan=True)
