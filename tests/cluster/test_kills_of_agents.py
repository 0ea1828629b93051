"""Runs of conversations in the sandbox of which everything is killed in turn, the launcher too: no number changes."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.metrics import read_metrics
from tests.cluster.launched import assert_gone, family, ranks_on, steps_of, wait_until
from tests.cluster.test_asynchronous_run import SETTINGS as ASYNCHRONOUS
from tests.cluster.test_asynchronous_run import assert_a_function_of_its_schedule
from tests.cluster.test_controller_run import assert_equal_runs, controllers_of
from tests.cluster.test_environment_run import overrides_of, prepared, started_work
from tests.cluster.test_rlhf_run import actors_of
from tests.training_run import DEADLINE_S, numbers, train

pytestmark = [pytest.mark.cluster, pytest.mark.heavy]
__all__ = ["started_work"]  # a fixture

Victims = Callable[[subprocess.Popen, RunDirectory], list[psutil.Process]]
ENVIRONMENT = f"rlhf.environment={Path(__file__).with_name('bash_agent.py')}:BashAgent"
EVERY = 3  # iterations from kill to kill
SERVED = "dist_lm.environments.served"


def environments_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes of the environment's class."""
    found = []
    for candidate in family(process):
        with suppress(psutil.NoSuchProcess):
            if SERVED in candidate.cmdline():
                found.append(candidate)
    return found


def sandbox_processes(process: subprocess.Popen, depth: int) -> list[psutil.Process]:
    """Processes of sandboxes: at depth 0 bubblewrap, at 2 the server inside, at 3 the first one of a session."""
    found = []
    for environment in environments_of(process):
        with suppress(psutil.NoSuchProcess):
            level = [child for child in environment.children() if child.name() == "bwrap"]
            for _ in range(depth):
                level = [child for parent in level for child in parent.children()]
            found += level
    return found


VICTIMS: dict[str, Victims] = {
    "controller": lambda process, run: controllers_of(run),
    "rank": lambda process, run: ranks_on(run),
    "actor": lambda process, run: actors_of(process),
    "environment": lambda process, run: environments_of(process),
    "sandbox": lambda process, run: sandbox_processes(process, 0),
    "session": lambda process, run: sandbox_processes(process, 3),
    "driver": lambda process, run: [psutil.Process(process.pid)],
}


def order_of(controller: str, kills: int, seed: int, victims: Collection[str] = tuple(VICTIMS)) -> list[str]:
    """Returns what is killed: each kind in turn, in an order of the seed, again until there are enough."""
    kinds = [kind for kind in victims if controller == "process" or kind != "controller"]
    draw = random.Random(seed)
    order: list[str] = []
    while len(order) < kills:
        order += draw.sample(kinds, len(kinds))
    return order[:kills]


def launched(command: Sequence[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "dist_lm.launch", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )


def kill_in_order(
    command: Sequence[str], run: RunDirectory, order: Sequence[str], victims: Mapping[str, Victims] = VICTIMS
) -> None:
    """Runs a command, kills one process of each kind every few iterations, and waits for the end of the run. A killed
    launcher is started again by the same command.

    Args:
        order: kinds of `victims`; an entry finds the processes of its kind that live now.
    """
    process = launched(command)
    try:
        for number, kind in enumerate(order):
            goal = EVERY * number + 1
            wait_until(lambda goal=goal: max(steps_of(run), default=0) >= goal, process, f"iteration {goal}")
            victims_now = partial(victims[kind], process, run)
            wait_until(lambda victims_now=victims_now: bool(victims_now()), process, f"a process to kill: {kind}")
            with suppress(psutil.NoSuchProcess):
                victim = victims_now()[-1]
                below = victim.children(recursive=True)
                victim.send_signal(signal.SIGKILL)
                if kind == "driver":
                    process.communicate()
                assert_gone([victim, *below])
            if kind == "driver":
                process = launched(command)
        _, err = process.communicate(timeout=DEADLINE_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err


def held_again(run: RunDirectory) -> float:
    return sum(line.get("perf/held_again", 0) for line in read_metrics(run.metrics))


def command_of(work, folder: Path, controller: str, kills: int, *more: str) -> list[str]:
    return overrides_of(
        work,
        folder,
        ENVIRONMENT,
        f"rlhf.controller={controller}",
        "rlhf.pool.actors=1",
        f"stage.steps={EVERY * kills + 2}",
        f"cluster.max_restarts={kills}",
        "cluster.connect_timeout_s=120",
        *more,
    )


KILLS = [
    pytest.param("rank", 10, marks=pytest.mark.bars),
    pytest.param("process", 10, marks=pytest.mark.bars),
]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("controller", "kills"), KILLS)
def test_kills_of_everything_change_no_number_of_conversations(controller, kills, started_work, tmp_path):
    """Finds a conversation that leaves its group because its environment, its sandbox or a session was killed, and a
    launcher whose command goes on with other conversations."""
    steps = f"stage.steps={EVERY * kills + 2}"
    expected = prepared(started_work, tmp_path, ENVIRONMENT, steps, f"run_id=expected_{controller}")
    train(expected, ranks=1)
    assert held_again(expected) == 0

    run_id = f"killed_{controller}"
    command = command_of(started_work, tmp_path, controller, kills, f"run_id={run_id}")
    run = started_work.run("rlhf", run_id)
    kill_in_order(command, run, order_of(controller, kills, seed=0))
    assert_equal_runs(run, expected)
    assert held_again(run) > 0
    assert not any("rollout/invalid_" in name for line in numbers(run).values() for name in line)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("controller", "kills"), [("rank", 2), *KILLS])
def test_kills_of_everything_leave_a_schedule_that_gives_the_run_again(controller, kills, started_work, tmp_path):
    """Finds a restart that takes other groups than before, and a conversation that was held again and cannot be
    replayed: the schedule gives the same numbers in one rank without actors."""
    run_id = f"asynchronous_{controller}"
    command = command_of(started_work, tmp_path, controller, kills, *ASYNCHRONOUS, f"run_id={run_id}")
    # Iterations go on while a process is killed, and these do not wait for the slowest conversation.
    iterations = 2 * EVERY * kills
    command.append(f"stage.steps={iterations}")
    run = started_work.run("rlhf", run_id)
    kill_in_order(command, run, order_of(controller, kills, seed=13))

    assert_a_function_of_its_schedule(run, iterations, tmp_path)
    # The environment's process that is killed may be an idle one. Of the many of ten kills, one is not.
    if kills == 10:
        assert held_again(run) > 0
