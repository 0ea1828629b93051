"""Who is to blame when a gang is over: from what ranks left, how they ended, and which nodes are gone."""

import json
import signal
from pathlib import Path

import pytest

from dist_lm.cluster.agent import RankExit
from dist_lm.cluster.events import NODE_LOST, SILENT, Crowd, GangFailure, explain, read_failures
from dist_lm.storage.run_directory import RunDirectory

CROWD = Crowd(hosts=("n1", "n2", "n3"), ranks_per_node=2, device="cuda")
ECHO = ("RuntimeError", "Connection closed by peer [127.0.0.3]:4711")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "work/runs/language/r")
    run.create()
    return run


def leave(run: RunDirectory, rank: int, time: float, kind: str, message: str, user_error: bool = False) -> None:
    record = {"rank": rank, "node": "n", "time": time, "type": kind, "message": message, "traceback": "t"}
    run.rank_failure(rank).write_text(json.dumps(record | {"user_error": user_error}))


def cause(run: RunDirectory, exits: tuple[RankExit, ...] = (), lost: dict[int, str] | None = None) -> GangFailure:
    return explain(run, CROWD, exits, lost or {}, [1, 1, 1])


def test_the_first_failure_that_has_its_cause_in_itself_is_named_with_node_and_gpu(run):
    leave(run, 0, 1.0, *ECHO)
    leave(run, 3, 2.0, "ValueError", "loss is nan")
    leave(run, 4, 3.0, "OSError", "no such file")
    assert str(cause(run)).startswith("rank 3 (GPU 1) on node 1 (n2): ValueError: loss is nan")


def test_a_killed_rank_comes_before_those_that_only_lost_it(run):
    leave(run, 0, 1.0, *ECHO)
    found = cause(run, (RankExit(5, -signal.SIGKILL, 2.0), RankExit(1, -signal.SIGTERM, 0.5)))
    assert (found.rank, found.node, found.type) == (5, 2, "killed")


def test_a_real_time_signal_is_named_by_its_number(run):
    """Finds a traceback in place of the failure: `signal.Signals` knows no name for most real-time signals."""
    number = signal.SIGRTMIN + 3
    assert f"killed by signal {int(number)}" in str(cause(run, (RankExit(5, -number, 2.0),)))


@pytest.mark.parametrize("left", ["an echo", "an abort of NCCL's watchdog"])
def test_a_lost_node_is_the_cause_of_what_healthy_ranks_then_do(run, left):
    exits = ()
    if left == "an echo":
        leave(run, 0, 1.0, *ECHO)
    else:
        exits = (RankExit(0, -signal.SIGABRT, 1.0),)
    found = cause(run, exits, {1: SILENT, 2: "the actor is dead because its node has died"})
    assert (found.node, found.rank, found.type) == (2, None, NODE_LOST)
    assert "its node has died" in str(found)


def test_an_error_of_its_own_is_not_put_down_to_a_lost_node(run):
    leave(run, 0, 1.0, "ArtefactError", "connection closed, says the user's disk", user_error=True)
    found = cause(run, (), {1: SILENT})
    assert (found.rank, found.user_error) == (0, True)


def test_where_nothing_else_is_known_torchrun_itself_is_named(run):
    run.node_log(1).write_text("torchrun: address already in use\n")
    found = explain(run, CROWD, (), {}, [None, 1, None])
    assert (found.node, found.rank) == (1, None)
    assert "address already in use" in found.traceback


@pytest.mark.parametrize("damaged", [b"", b"null", b"\xff", b'{"rank": 1}', b"{" * 9999])
def test_a_damaged_record_of_a_failed_rank_is_none(run, damaged, caplog):
    """Finds a launcher that ends in a traceback where a rank has ended."""
    leave(run, 0, 1.0, "ValueError", "boom")
    run.rank_failure(1).write_bytes(damaged)
    (failure,) = read_failures(run, 2)
    assert (failure.rank, failure.type) == (0, "ValueError")
    assert str(run.rank_failure(1)) in caplog.text


def test_a_failure_that_nobody_is_to_blame_for_names_nobody(run):
    found = GangFailure(None, None, "hung", "no sign of life", run.logs)
    assert str(found) == f"all nodes: hung: no sign of life (log: {run.logs})"
