"""Heartbeats: what a rank says is what its agent reads, across processes."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dist_lm.cluster.heartbeat import VARIABLE, HeartbeatBoard, RankHeartbeat, own_heartbeat
from dist_lm.training.heartbeat import Phase, Unheard

RANK = """
import os
from dist_lm.cluster.heartbeat import own_heartbeat
from dist_lm.training.heartbeat import Phase
own_heartbeat(os.environ).beat(Phase.EVALUATING, 1234567890123)
"""


def test_another_process_is_read():
    board = HeartbeatBoard(3)
    environ = os.environ | {VARIABLE: board.path, "LOCAL_RANK": "2"}
    subprocess.run([sys.executable, "-c", RANK], env=environ, check=True, timeout=60)
    silent, _, heard = board.read(first_rank=6, states={2: "D"})
    assert (heard.rank, heard.phase, heard.step, heard.state) == (8, Phase.EVALUATING, 1234567890123, "D")
    assert heard.age_s < 60
    assert (silent.rank, silent.phase, silent.median_step_s) == (6, Phase.STARTING, 0.0)


def test_a_step_lasts_until_what_follows_it(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr("dist_lm.cluster.heartbeat.time.monotonic", lambda: now[0])
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
    assert at(605, Phase.SAVING, 3) == 5  # of 5, 3 and 5: what is generated for a step belongs to it
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
