"""How often a run starts again, on how many nodes, and what is said of it."""

import io
from types import SimpleNamespace
from typing import Any

import pytest

from dist_lm.cluster.gang import GangStatus
from dist_lm.launcher.process import Interrupt
from dist_lm.launcher.stage_run import Attempts, Outcome, Restarts
from dist_lm.prepare.compose import compose_config
from dist_lm.prepare.layout import largest, on_nodes, sizes
from dist_lm.tracking.console import Console
from dist_lm.training import checkpoint_files
from tests.conftest import TINY
from tests.prepare.planned import make_run, plan_of


def test_failures_count_until_there_is_a_new_checkpoint():
    restarts = Restarts(limit=2, step=0)
    for left in (1, 0, -1):
        restarts = restarts.after_failure(step=0, address="10.0.0.1")
        assert restarts.left == left
    restarts = restarts.after_failure(step=5, address="10.0.0.1")
    assert restarts.left == 1
    assert restarts.after_failure(step=5, address="10.0.0.1").left == 0
    restarts = restarts.after_failure(step=3, address="10.0.0.1")  # the checkpoint of step 5 was damaged
    assert restarts.after_failure(step=4, address="10.0.0.1").left == 1


def test_a_node_that_fails_again_and_again_is_suspect_until_there_is_progress():
    restarts = Restarts(limit=9, step=0)
    for address in ("10.0.0.1", "10.0.0.2", "10.0.0.1"):
        restarts = restarts.after_failure(0, address)
    assert restarts.suspects == {"10.0.0.1"}
    assert restarts.after_failure(5, "10.0.0.1").suspects == frozenset()


def config(*overrides: str):
    cluster = ("cluster=ray", "cluster.address=127.0.0.2:6400", "cluster.nodes=4")
    return compose_config(
        ["stage=language", *TINY, *cluster, "stage.global_batch=8", "stage.micro_batch=1", *overrides]
    )


@pytest.mark.heavy
def test_a_run_shrinks_to_what_its_layout_and_batch_fit():
    assert sizes(config(), 1) == [4]
    assert sizes(config("cluster.min_nodes=1"), 1) == [4, 2, 1]  # a batch of 8 is not cut in three
    assert sizes(config("cluster.min_nodes=2"), 1) == [4, 2]
    assert sizes(config("cluster.min_nodes=1", "parallel.tp=2", "model.n_heads=4"), 1) == [4, 2]
    assert sizes(config("cluster.min_nodes=1", "parallel.dp_shard=4"), 1) == [4]


def test_the_largest_number_that_there_are_nodes_for():
    assert [largest([8, 4, 2], nodes) for nodes in (9, 8, 7, 3, 1)] == [8, 8, 4, 2, None]


def test_a_smaller_run_is_a_valid_configuration():
    smaller = on_nodes(config("cluster.min_nodes=3"), 2).cluster
    assert (smaller.nodes, smaller.min_nodes) == (2, 2)


@pytest.mark.parametrize("forced", [False, True])
def test_growth_is_said_by_name_and_a_stop_by_force_too(work, monkeypatch, forced: bool):
    """The ranks wrote a checkpoint because the launcher asked them to."""
    planned = plan_of(work, target="language").target
    run = make_run(work, "language")
    interrupt, output, errors = Interrupt(), io.StringIO(), io.StringIO()
    musters: Any = SimpleNamespace(call=lambda suspects, target: SimpleNamespace(hosts=("a",) * (target or 1)))
    console = Console(output=output, errors=errors)
    attempts = Attempts(planned, planned.config, 1, musters, SimpleNamespace(), console, interrupt)  # type: ignore[arg-type]

    def attempt(config: Any, crew: Any) -> Outcome:
        if len(crew.hosts) == 2:
            run.result.touch()
            return Outcome(GangStatus("finished"), 5)
        (run.checkpoints / checkpoint_files.step_name(5)).mkdir()
        return Outcome(GangStatus("stopped" if forced else "finished"), 0, grow_to=2)

    monkeypatch.setattr(attempts, "attempt", attempt)
    assert attempts.until_done({1: planned.config, 2: planned.config})
    assert "growing to 2 nodes; continuing from step_00000005" in output.getvalue()
    assert ("were ended" in errors.getvalue()) == forced
    assert "another process" not in errors.getvalue()
