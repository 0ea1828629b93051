"""Tasks answered by actors of a launched run: the figures of ranks between steps, also when somebody is killed."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.cluster.launched import DEADLINE_S, assert_gone, ranks_on, steps_of, wait_until
from tests.cluster.test_rlhf_run import actors_of
from tests.stages.test_eval_tasks import figures_of, tasks_of
from tests.training_run import SAMPLED, SETTINGS, linked, numbers, prepare, train

pytestmark = [pytest.mark.cluster, pytest.mark.bars]
TASKS = (
    "stage.eval_tasks={own_sql: 40}",
    *("stage.steps=240", "stage.eval_every=120", "stage.checkpoint_every=7", "stage.eval_new_tokens=6"),
)


def test_actors_answer_what_ranks_answer_after_kills(tiny_work, tmp_path):
    expected = prepare(linked(tiny_work, tmp_path / "ranks"), "default", *TASKS)
    train(expected, 1)
    work = linked(tiny_work, tmp_path / "actors")
    run = work.run("language", "default")
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "dist_lm.launch", "stage=language", *SETTINGS, *SAMPLED, *TASKS),
            *(f"work_dir={work.path}", "eval.pool.actors=1", "eval.pool.cache_tokens=4096"),
            *("cluster.ranks_per_node=1", "cluster.connect_timeout_s=120"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        for goal, victims in ((42, ranks_on), (60, lambda _: actors_of(process))):
            wait_until(lambda goal=goal: max(steps_of(run), default=0) >= goal, process, f"step {goal}")
            wait_until(lambda victims=victims: victims(run), process, "somebody to kill")
            victim = victims(run)[-1]
            os.kill(victim.pid, signal.SIGKILL)
            assert_gone([victim])
        out, err = process.communicate(timeout=DEADLINE_S * 2)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err
    assert "own_sql 0.0" in out
    assert figures_of(run) == figures_of(expected)
    assert tasks_of(run) == tasks_of(expected)
    assert numbers(run) == numbers(expected)
    assert not list(run.evaluations.iterdir())
    events = [json.loads(line) for line in run.events.read_bytes().splitlines()]
    assert sum(event["event"] == "failed" for event in events) == 1
