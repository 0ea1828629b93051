"""Heartbeats: an agent reads what a rank writes, and finds the rank to blame for a hang."""

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_lm.cluster.heartbeat import VARIABLE, HeartbeatBoard, Patience, Pulse, RankHeartbeat, find_hang, own_heartbeat
from dist_lm.training.heartbeat import Phase, Unheard
from tests.patience import patient

RANK = """
import os
from dist_lm.cluster.heartbeat import own_heartbeat
from dist_lm.training.heartbeat import Phase
own_heartbeat(os.environ).beat(Phase.EVALUATING, 1234567890123, 0.25)
"""


def test_another_process_is_read():
    board = HeartbeatBoard(3)
    environ = os.environ | {VARIABLE: board.path, "LOCAL_RANK": "2"}
    subprocess.run([sys.executable, "-c", RANK], env=environ, check=True, timeout=patient(240))
    silent, _, heard = board.read(first_rank=6, states={2: "D"})
    assert (heard.rank, heard.phase, heard.step, heard.state) == (8, Phase.EVALUATING, 1234567890123, "D")
    assert (heard.share_done, silent.share_done) == (0.25, 0)
    assert heard.age_s < 60
    assert (silent.rank, silent.phase, silent.median_step_s) == (6, Phase.STARTING, 0.0)


def test_forward_passes_belong_to_the_step(monkeypatch: pytest.MonkeyPatch):
    """Finds a step of stage rlhf that ends where its log-probabilities are computed, so that a hang is seen too early
    or too late."""
    now = [100.0]
    monkeypatch.setattr("dist_lm.cluster.heartbeat.time", SimpleNamespace(monotonic=lambda: now[0]))
    board = HeartbeatBoard(1)
    rank = RankHeartbeat(Path(board.path), 0)
    for phase, step in ((Phase.DATA, 0), (Phase.GENERATING, 0), (Phase.SCORING, 0), (Phase.STEP, 0), (Phase.DATA, 1)):
        rank.beat(phase, step)
        now[0] += 10
    assert board.read(0, {})[0].median_step_s == 40
    assert Patience(2, 1, 1000).limit_s(Pulse(0, Phase.SCORING, 1, 0.1, 40.0)) == 80


def test_a_rank_that_still_waits_for_data_begins_no_step(monkeypatch: pytest.MonkeyPatch):
    """Finds signs of life during an outage of a store that count as steps, after which each step seems a hang."""
    now = [100.0]
    monkeypatch.setattr("dist_lm.cluster.heartbeat.time", SimpleNamespace(monotonic=lambda: now[0]))
    board = HeartbeatBoard(1)
    rank = RankHeartbeat(Path(board.path), 0)
    for phase, step in ((Phase.DATA, 0), (Phase.STEP, 0), *[(Phase.DATA, 1)] * 5, (Phase.STEP, 1), (Phase.DATA, 2)):
        rank.beat(phase, step)
        now[0] += 10
    assert board.read(0, {})[0].median_step_s == 40  # of 20 and 60


def test_a_step_lasts_until_what_follows_it(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr("dist_lm.cluster.heartbeat.time", SimpleNamespace(monotonic=lambda: now[0]))
    board = HeartbeatBoard(1)
    rank = RankHeartbeat(Path(board.path), 0)

    def at(seconds: float, phase: Phase, step: int) -> float:
        now[0] = 100.0 + seconds
        rank.beat(phase, step)
        return board.read(0, {})[0].median_step_s

    assert at(0, Phase.LOADING, 0) == 0
    assert at(1, Phase.DATA, 0) == 0
    assert at(2, Phase.STEP, 0) == 0
    assert at(6, Phase.DATA, 1) == 5  # waiting and computing
    at(7, Phase.STEP, 1)
    assert at(9, Phase.EVALUATING, 2) == 4  # of 5 and 3
    assert at(500, Phase.SAVING, 2) == 4  # the evaluation is no step
    assert at(600, Phase.DATA, 2) == 4
    at(601, Phase.GENERATING, 2)
    at(602, Phase.STEP, 2)
    assert at(605, Phase.TRACING, 3) == 5  # of 5, 3 and 5: what is generated for a step belongs to it
    assert at(800, Phase.SAVING, 3) == 5  # the trace is no step
    assert at(900, Phase.DATA, 3) == 5
    now[0] += 7
    assert board.read(0, {})[0].age_s == 7


def test_a_rank_that_beats_all_the_time_is_never_read_as_silent():
    board = HeartbeatBoard(1)
    board._started -= 3600  # an agent that has been up for an hour
    rank = RankHeartbeat(Path(board.path), 0)
    rank.beat(Phase.STEP, 1)
    done = threading.Event()

    def beat() -> None:
        while not done.is_set():
            rank.beat(Phase.STEP, 1)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        assert max(board.read(0, {})[0].age_s for _ in range(20_000)) < 60
    finally:
        done.set()
        thread.join()


def test_without_an_agent_nobody_hears():
    assert isinstance(own_heartbeat({}), Unheard)


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
        (replace(STEP, phase=Phase.TRACING), 1000.0),  # a long trace is no hang
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
    assert "all ranks are in a step at step 7" in hang.message
    assert "limit 20 s" in hang.message


def test_without_ranks_nothing_hangs():
    assert find_hang([], PATIENCE) is None
