"""When ranks count as hung, and who is blamed."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_lm.cluster.heartbeat import Patience, Pulse, find_hang
from dist_lm.training.heartbeat import Phase

PATIENCE = Patience(steps=20.0, least_s=10.0, otherwise_s=1000.0)
STEP = Pulse(rank=0, phase=Phase.STEP, step=7, age_s=0.1, median_step_s=1.0)


def pulses(*changes: dict) -> list[Pulse]:
    return [replace(STEP, **({"rank": rank} | change)) for rank, change in enumerate(changes)]


@pytest.mark.parametrize(
    ("pulse", "limit"),
    [
        (STEP, 20.0),
        (replace(STEP, phase=Phase.DATA), 20.0),
        (replace(STEP, median_step_s=0.1), 10.0),  # fast steps: the least
        (replace(STEP, median_step_s=0.0), 1000.0),  # the first step may compile
        (replace(STEP, phase=Phase.EVALUATING), 1000.0),
        (replace(STEP, phase=Phase.GENERATING), 1000.0),  # as long as the longest answer takes
        (replace(STEP, phase=Phase.STARTING, median_step_s=0.0), 1000.0),
    ],
)
def test_patience_follows_what_the_last_rank_does(pulse, limit):
    assert PATIENCE.limit_s(pulse) == limit
    assert find_hang([replace(pulse, age_s=limit - 0.1)], PATIENCE) is None
    assert find_hang([replace(pulse, age_s=limit + 0.1)], PATIENCE) is not None


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=9), st.integers(0, 8))
def test_one_rank_that_gets_on_is_enough(ages, alive):
    found = [replace(STEP, rank=rank, age_s=age) for rank, age in enumerate(ages)]
    found[alive % len(found)] = replace(STEP, age_s=1.0)
    assert find_hang(found, PATIENCE) is None


def test_a_stopped_process_is_to_blame():
    hang = find_hang(pulses({"age_s": 30}, {"age_s": 31, "state": "T"}, {"age_s": 30}), PATIENCE)
    assert hang is not None
    assert hang.rank == 1
    assert "its process is stopped" in hang.message


def test_the_one_that_is_behind_is_to_blame():
    hang = find_hang(pulses({"age_s": 30}, {"age_s": 30}, {"age_s": 32, "phase": Phase.DATA}), PATIENCE)
    assert hang is not None
    assert hang.rank == 2
    assert "waiting for data at step 7" in hang.message


def test_nobody_is_blamed_when_all_stand_at_the_same_place():
    hang = find_hang(pulses({"age_s": 30}, {"age_s": 40}), PATIENCE)
    assert hang is not None
    assert hang.rank is None
    assert "all are in a step at step 7" in hang.message
    assert "limit 20 s" in hang.message


def test_without_ranks_nothing_hangs():
    assert find_hang([], PATIENCE) is None
