"""Runs with `rlhf.controller=process`: same numbers as in the first rank, wherever processes are killed."""

import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress

import psutil
import pytest

from dist_lm.stages.rlhf.controller_program import PROGRAM
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.training import checkpoint_files
from tests.cluster.launched import assert_gone, is_alive, ranks_on, steps_of, wait_until
from tests.cluster.test_environment_run import overrides_of, prepared
from tests.cluster.test_rlhf_run import actors_of, launch, prepare, started_work, work_of
from tests.stages.test_eval_tasks import tasks_of
from tests.training_run import DEADLINE_S, numbers, train

pytestmark = [pytest.mark.cluster, pytest.mark.heavy]
__all__ = ["started_work"]  # a fixture

RANKS, ITERATIONS = 2, 9
SETTINGS = (f"stage.steps={ITERATIONS}", "rlhf.max_new_tokens=24")
IN_PROCESS = ("rlhf.controller=process", "rlhf.pool.actors=1", f"cluster.ranks_per_node={RANKS}")


def controllers_of(run: RunDirectory) -> list[psutil.Process]:
    """The process of the controller of a run, if it is up."""
    found = []
    for candidate in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            words = candidate.cmdline()
            if PROGRAM in words and str(run.path.resolve()) in words and is_alive(candidate):
                found.append(candidate)
    return found


def assert_equal_runs(run: RunDirectory, expected: RunDirectory) -> None:
    """Compares all metrics but times, and the bytes of the tensors of the last checkpoint."""
    assert numbers(run) == numbers(expected)
    folders = [
        one.checkpoints / str(checkpoint_files.read_pointer(one.checkpoints, "LATEST")) for one in (run, expected)
    ]
    tensors = [{path.name: path.read_bytes() for path in folder.rglob("*.safetensors")} for folder in folders]
    assert tensors[0] == tensors[1] != {}


@pytest.fixture(scope="module")
def expected(started_work: WorkDirectory, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Two ranks, of which the first draws the rollouts with its own engine, never disturbed."""
    run = prepare(work_of(started_work, tmp_path_factory.mktemp("expected")), *SETTINGS)
    train(run, ranks=RANKS)
    return run


def killed(
    process: subprocess.Popen, run: RunDirectory, victims: list[tuple[int, Callable[[], list[psutil.Process]]]]
) -> None:
    """Kills the last process of each kind, once so many iterations are finished, and waits for the run's end."""
    try:
        for iteration, victims_now in victims:
            wait_until(
                lambda iteration=iteration: max(steps_of(run), default=0) >= iteration,
                process,
                f"iteration {iteration}",
            )
            wait_until(lambda victims_now=victims_now: bool(victims_now()), process, "a process to kill")
            victim = victims_now()[-1]
            dependants = [child for child in controllers_of(run) if child.ppid() == victim.pid]
            os.kill(victim.pid, signal.SIGKILL)
            assert_gone([victim, *dependants])
        _, err = process.communicate(timeout=DEADLINE_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err


@pytest.mark.timeout(1800)
def test_kills_of_controller_rank_and_actor_change_no_number(expected, started_work, tmp_path):
    """Finds prompts drawn twice or left out after a death, and a controller that outlives its rank."""
    work = work_of(started_work, tmp_path)
    process = launch(work, *SETTINGS, *IN_PROCESS)
    run = work.run("rlhf", "default")
    victims = [
        (1, lambda: controllers_of(run)),
        (3, lambda: ranks_on(run)),
        (5, lambda: actors_of(process)),
    ]
    killed(process, run, victims)
    assert_equal_runs(run, expected)
    assert controllers_of(run) == []


def test_conversations_are_those_of_the_first_rank_after_a_death(started_work, tmp_path):
    """Finds recorded conversations that another controller does not find, and environments that outlive theirs."""
    folders = [tmp_path / name for name in ("expected", "killed")]
    works = [work_of(started_work, folder) for folder in folders]
    reference = prepared(works[0], folders[0])
    train(reference, ranks=1)

    more = ("rlhf.controller=process", "rlhf.pool.actors=1", "cluster.connect_timeout_s=120")
    process = subprocess.Popen(
        [sys.executable, "-m", "dist_lm.launch", *overrides_of(works[1], folders[1], *more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )
    run = works[1].run("rlhf", "default")
    killed(process, run, [(1, lambda: controllers_of(run))])
    assert_equal_runs(run, reference)


@pytest.mark.timeout(1800)
def test_tasks_and_rollouts_drawn_ahead_are_those_of_the_first_rank_after_a_death(started_work, tmp_path):
    """Finds tasks that the child answers by other weights, or whose answers a death loses."""
    more = ("stage.steps=5", "rlhf.max_staleness=1", "stage.eval_tasks={own_sql: 2}", "stage.eval_new_tokens=6")
    reference = prepare(work_of(started_work, tmp_path / "expected"), *more)
    train(reference, ranks=1)

    work = work_of(started_work, tmp_path / "killed")
    process = launch(work, *more, "rlhf.controller=process", "rlhf.pool.actors=1")
    run = work.run("rlhf", "default")
    killed(process, run, [(2, lambda: controllers_of(run))])
    assert_equal_runs(run, reference)
    assert tasks_of(run) == tasks_of(reference)
    assert [*tasks_of(run)] == [2, 4, 5]


@pytest.mark.bars
@pytest.mark.timeout(3600)
def test_ten_kills_change_no_number(started_work, tmp_path):
    """Finds a state that only some deaths lose: ten seeded kills of controller, rank and actor."""
    steps = "stage.steps=32"
    reference = prepare(work_of(started_work, tmp_path / "expected"), *SETTINGS, steps)
    train(reference, ranks=RANKS)

    work = work_of(started_work, tmp_path / "killed")
    process = launch(work, *SETTINGS, steps, *IN_PROCESS, "cluster.max_restarts=10")
    run = work.run("rlhf", "default")
    kinds = [lambda: controllers_of(run), lambda: ranks_on(run), lambda: actors_of(process)]
    victims = list(zip(itertools.count(1, 3), random.Random(0).sample(kinds * 4, 10), strict=False))
    killed(process, run, victims)
    assert_equal_runs(run, reference)
