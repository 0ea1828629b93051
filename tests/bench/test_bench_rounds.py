"""Rounds: every way once in each, none always first, and as many steps as fill the time."""

from collections import Counter

import pytest

from dist_lm.bench.rounds import LONGEST_ROUND, order_of_round, seconds_per_step, spread

WAYS = ["a", "b", "c"]


def test_every_way_takes_every_place_equally_often():
    rounds = [order_of_round(WAYS, index) for index in range(2 * len(WAYS))]
    assert all(sorted(order) == WAYS for order in rounds)
    for place in range(len(WAYS)):
        assert Counter(order[place] for order in rounds) == dict.fromkeys(WAYS, 2)


def test_ways_are_interleaved_and_a_figure_is_a_step():
    speed = {"a": 0.1, "b": 0.003, "c": 9.0}
    calls = []

    def time_steps(way: str, steps: int) -> float:
        calls.append((way, steps))
        return speed[way] * steps

    seconds = seconds_per_step(WAYS, 4, time_steps, round_s=0.5)
    assert seconds == {way: pytest.approx([speed[way]] * 4) for way in WAYS}
    timed = calls[len(WAYS) :]
    assert [way for way, _ in timed] == [way for index in range(4) for way in order_of_round(WAYS, index)]
    assert dict(timed) == {"a": 5, "b": LONGEST_ROUND, "c": 1}


def test_spread_is_that_of_the_middle_half():
    assert spread([2.0]) == 0
    assert spread([3.0] * 5) == 0
    assert spread([1.0, 2.0, 3.0, 4.0, 100.0]) == pytest.approx(2 / 3)
