"""Runs of programs that speak HTTP, of which everything is killed in turn, the launcher too: no number changes."""

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from dist_lm.storage.run_directory import RunDirectory
from tests.cluster.launched import family
from tests.cluster.test_asynchronous_run import SETTINGS as ASYNCHRONOUS
from tests.cluster.test_asynchronous_run import assert_a_function_of_its_schedule
from tests.cluster.test_controller_run import assert_equal_runs
from tests.cluster.test_environment_run import overrides_of, prepared, started_work
from tests.cluster.test_kills_of_agents import EVERY, VICTIMS, Victims, held_again, kill_in_order, order_of
from tests.training_run import numbers, train

pytestmark = [pytest.mark.cluster, pytest.mark.heavy]
__all__ = ["started_work"]  # a fixture

# Its third turn stands behind a summary, so that conversations have two samples and rewards of turns. Without packages,
# so that it starts fast; it rests before its turns, so that it lives when its kind is to be killed.
AGENT = """
import json
import os
import sys
import time
import urllib.request


def post(url, body, key):
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as response:
        return json.loads(response.read())


task = json.loads(sys.stdin.readline())
history = [{"role": "user", "content": f"Go {task['data']['go']}"}]
for turn in range(3):
    time.sleep(0.1)
    if turn == 2:
        words = " ".join(str(message["content"]) for message in history)
        history = [{"role": "user", "content": f"Summary: {words[:20]}"}]
    body = {"model": "policy", "messages": history}
    choice = post(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, os.environ["OPENAI_API_KEY"])["choices"][0]
    text = choice["message"]["content"]
    share = sum(c > "m" for c in text) / max(1, len(text))
    post(task["reward_url"], {"turn_reward": share}, task["reward_key"])
    history += [choice["message"], {"role": "user", "content": "Again"}]
post(task["reward_url"], {"reward": 0.5}, task["reward_key"])
"""
SUMMARISER = "summariser.py"


def programs_of(process: subprocess.Popen, run: RunDirectory) -> list[psutil.Process]:
    """Returns the programs whose conversations are under way."""
    programs = []
    for candidate in family(process):
        with suppress(psutil.NoSuchProcess):
            if candidate.cmdline()[1:2] == ["-S"] and candidate.cmdline()[-1].endswith(SUMMARISER):
                programs.append(candidate)
    return programs


PROGRAM_VICTIMS: dict[str, Victims] = {
    **{kind: VICTIMS[kind] for kind in ("controller", "rank", "actor", "driver")},
    "program": programs_of,
}
ALL_KINDS = 5


def environment_in(folder: Path) -> str:
    (folder / SUMMARISER).write_text(AGENT)
    return f'rlhf.environment="program:{sys.executable} -S {folder / SUMMARISER}"'


def command_of(work, folder: Path, controller: str, kills: int, *more: str) -> list[str]:
    return overrides_of(
        work,
        folder,
        environment_in(folder),
        f"rlhf.controller={controller}",
        "rlhf.pool.actors=1",
        f"stage.steps={EVERY * kills + 2}",
        f"cluster.max_restarts={kills}",
        "cluster.connect_timeout_s=120",
        *more,
    )


def assert_begins_anew(run: RunDirectory) -> None:
    """Conversations of the run have a second sample, and all of them a reward."""
    lines = numbers(run).values()
    assert sum(line.get("rollout/broken_prefixes", 0) for line in lines) > 0
    assert not any("rollout/invalid_" in name for line in lines for name in line)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("controller", "kills"),
    [
        ("process", 1),
        pytest.param("rank", ALL_KINDS - 1, marks=pytest.mark.bars),
        pytest.param("process", 2 * ALL_KINDS, marks=pytest.mark.bars),
    ],
)
def test_kills_of_everything_change_no_number_of_programs(controller, kills, started_work, tmp_path):
    """Finds a conversation that leaves its group because its program was killed, one that counts its rewards of turns
    twice when it is held again, and samples behind a summary that a restart forgets."""
    steps = f"stage.steps={EVERY * kills + 2}"
    expected = prepared(
        started_work, tmp_path, environment_in(tmp_path), steps, f"run_id=expected_{controller}_{kills}"
    )
    train(expected, ranks=1)
    assert held_again(expected) == 0

    run_id = f"killed_{controller}_{kills}"
    command = command_of(started_work, tmp_path, controller, kills, f"run_id={run_id}")
    run = started_work.run("rlhf", run_id)
    order = ["program"] if kills == 1 else order_of(controller, kills, seed=0, victims=PROGRAM_VICTIMS)
    kill_in_order(command, run, order, PROGRAM_VICTIMS)
    assert_equal_runs(run, expected)
    assert held_again(run) > 0
    assert_begins_anew(run)


@pytest.mark.bars
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("controller", ["rank", "process"])
def test_kills_of_everything_leave_a_schedule_of_programs_that_gives_the_run_again(controller, started_work, tmp_path):
    """Finds a program that was held again and cannot be replayed, and a restart that takes other groups."""
    kills = 2 * ALL_KINDS
    run_id = f"asynchronous_programs_{controller}"
    command = command_of(started_work, tmp_path, controller, kills, *ASYNCHRONOUS, f"run_id={run_id}")
    # Iterations go on while a process is killed, and these do not wait for the slowest conversation.
    iterations = 2 * EVERY * kills
    command.append(f"stage.steps={iterations}")
    run = started_work.run("rlhf", run_id)
    kill_in_order(command, run, order_of(controller, kills, seed=13, victims=PROGRAM_VICTIMS), PROGRAM_VICTIMS)

    assert_a_function_of_its_schedule(run, iterations, tmp_path)
    assert_begins_anew(run)
