"""Runs with `rlhf.asynchronous`: a run is a function of its schedule, whoever repeats it, wherever it was killed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dist_lm.__main__ import app
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.prepare.compose import compose_config
from dist_lm.rlhf.schedule_record import SCHEDULE
from dist_lm.stages.rlhf.stage import check_inputs
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from tests.cluster.launched import ranks_on
from tests.cluster.test_controller_run import controllers_of, killed
from tests.cluster.test_environment_run import ENVIRONMENT, overrides_of, prepared, started_work
from tests.cluster.test_rlhf_run import actors_of, kill_in_turn
from tests.training_run import linked, numbers, train

pytestmark = [pytest.mark.cluster, pytest.mark.heavy]
__all__ = ["started_work"]  # a fixture

ITERATIONS = 6
SETTINGS = (
    "rlhf.asynchronous=true",
    "rlhf.max_staleness=2",
    f"stage.steps={ITERATIONS}",
    "stage.checkpoint_every=1",
    "stage.keep_checkpoints=99",
    "rlhf.top_p=0.9",
    "rlhf.max_new_tokens=40",
)
# Slow enough that weights change in the middle of conversations.
NO_ENVIRONMENT = ("rlhf.environment=''", "rlhf.rewards={x: {kind: length, target: 9}}")
STEP = "async def step(self, action):"
SLOW = ENVIRONMENT.replace("from pathlib", "import asyncio\nfrom pathlib").replace(
    STEP, STEP + "\n        await asyncio.sleep(0.1 * self.data['go'])"
)


def make_slow(folder: Path) -> None:
    (folder / "letters.py").write_text(SLOW)
    (folder / "short.json").write_text(json.dumps({"regex": "[a-z]{12,30}"}))


def slow(work: WorkDirectory, folder: Path, *more: str) -> RunDirectory:
    run = prepared(work, folder, *SETTINGS, *more)
    make_slow(folder)
    return run


@pytest.fixture(scope="module")
def finished(started_work: WorkDirectory, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = slow(started_work, tmp_path_factory.mktemp("files"))
    train(run, ranks=1)
    return run


def assert_a_function_of_its_schedule(run: RunDirectory, iterations: int, tmp_path: Path) -> None:
    """A replay of the schedule that a run has recorded gives its numbers, and so does one without actors."""
    lines = replayed(run)
    assert len(lines) == iterations
    assert all(line["equal"] and line["weights"] and line["largest_gap"] == 0 for line in lines), lines

    again = copy_of(run, tmp_path, until=0)
    config = again.config.read_text()
    without_actors = re.sub(r"(?m)^(    actors): 1$", r"\1: 0", config)
    again.config.write_text(without_actors.replace("controller: process", "controller: rank"))
    assert again.config.read_text() != config
    train(again, ranks=1)
    assert numbers(again) == numbers(run)


def replayed(run: RunDirectory, *options: str) -> list[dict[str, Any]]:
    result = CliRunner().invoke(app, ["replay", str(run.path), "--json", *options])
    assert not isinstance(result.exception, Exception), result.exception
    return [json.loads(line) for line in result.stdout.splitlines()]


def copy_of(run: RunDirectory, folder: Path, *, until: int) -> RunDirectory:
    """Returns the run as it was when it was killed after a checkpoint: that one, the record, and no later ones."""
    copy = linked(run.work, folder / "work").run("rlhf", run.path.name)
    shutil.copytree(run.path, copy.path)
    for checkpoint in sorted(copy.checkpoints.glob("step_*")):
        if int(checkpoint.name.removeprefix("step_")) > until:
            shutil.rmtree(checkpoint)
    for pointer in ("LATEST", "BEST"):
        (copy.checkpoints / pointer).unlink(missing_ok=True)
    copy.result.unlink(missing_ok=True)
    if until:
        (copy.checkpoints / "LATEST").write_text(f"step_{until:08d}\n")
    return copy


def test_the_schedule_gives_tokens_and_metrics_again(finished):
    """Finds tokens that are not noted with their weights: no single version would give them again."""
    lines = replayed(finished)
    assert [line["iteration"] for line in lines] == [*range(1, ITERATIONS + 1)]
    assert all(line["equal"] and line["weights"] and line["largest_gap"] == 0 for line in lines), lines
    assert all(line["metrics"] > 19 for line in lines)
    metrics = numbers(finished)
    assert max(metrics[step]["rollout/token_staleness_max"] for step in range(1, ITERATIONS + 1)) >= 1
    # Weights in the middle of an answer, which take luck here: tests/generation/test_swapped_weights.py.
    conversations = [
        [turn["versions"] for turn in json.loads(line)["episode"]["turns"] if "versions" in turn]
        for path in finished.conversations.glob("tasks_*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert any(len({version for versions in turns for _, version in versions}) > 1 for turns in conversations)


@pytest.mark.parametrize("until", [0, 3])
def test_losses_follow_from_the_schedule(until, finished, tmp_path):
    """Finds updates that depend on anything but seed, configuration, schedule and observations."""
    copy = copy_of(finished, tmp_path, until=until)
    train(copy, ranks=1)
    assert numbers(copy) == numbers(finished)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("controller", "kills"),
    [("rank", 2), ("process", 2), *(pytest.param(name, 10, marks=pytest.mark.bars) for name in ("rank", "process"))],
)
def test_a_run_with_actors_is_a_function_of_its_schedule_wherever_it_was_killed(
    controller, kills, started_work, tmp_path
):
    """Finds a restart that takes other groups than before, and bits that depend on the actors: the schedule of a run
    with an actor, of which ranks, actors and the controller's process are killed, gives the same numbers in one rank
    without any."""
    name = f"{controller}_{kills}"
    command = overrides_of(
        started_work,
        tmp_path,
        *SETTINGS,
        f"run_id={name}",
        f"rlhf.controller={controller}",
        "rlhf.pool.actors=1",
        f"stage.steps={4 * kills}",
        f"cluster.max_restarts={kills}",
        "cluster.connect_timeout_s=120",
    )
    make_slow(tmp_path)
    run = started_work.run("rlhf", name)
    process = subprocess.Popen(
        [sys.executable, "-m", "dist_lm.launch", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )
    if controller == "rank":
        kill_in_turn(process, run, kills, every=3)
    else:
        kinds = [lambda: controllers_of(run), lambda: ranks_on(run), lambda: actors_of(process)]
        killed(process, run, [(3 * kill + 1, kinds[kill % 3]) for kill in range(kills)])
        assert controllers_of(run) == []

    assert_a_function_of_its_schedule(run, 4 * kills, tmp_path)


def test_what_the_record_lacks_is_named(finished, tmp_path):
    """Finds a run that goes on without the groups that it trained on, and a replay that passes them over."""
    copy = copy_of(finished, tmp_path, until=0)
    first = json.loads((copy.conversations / SCHEDULE).read_text().splitlines()[0])["assignment"]["groups"][0]
    path = copy.conversations / f"tasks_{first // 3 * 3:08d}.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if f'"position": {first},' not in line))
    result = CliRunner().invoke(app, ["replay", str(copy.path)])
    assert isinstance(result.exception, ArtefactError)
    assert f"conversation 1 of task {first} is missing, on which iteration 1 trained" in str(result.exception)

    (copy.conversations / SCHEDULE).unlink()
    result = CliRunner().invoke(app, ["replay", str(copy.path)])
    assert isinstance(result.exception, ArtefactError)
    assert "iteration 1 has not begun yet" in str(result.exception)
    result = CliRunner().invoke(
        app, ["replay", str(finished.path), "--iteration", "1", "--rollout", "1", "--fork", "1"]
    )
    assert "a run without rlhf.asynchronous" in str(result.exception)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("rlhf.environment=''", "rlhf.rewards={x: {kind: length, target: 9}}"),
            r"rlhf.asynchronous=true: expected false without rlhf.environment",
        ),
        (("rlhf.keep_conversations=false",), "rlhf.keep_conversations=false: expected true with rlhf.asynchronous"),
        (("rlhf.pool.tp=2",), "rlhf.pool.tp=2: expected 1 with rlhf.asynchronous"),
        (("rlhf.pool.push=direct",), "rlhf.pool.push=direct: expected auto or ray with rlhf.asynchronous"),
        (("rlhf.pool.actors=1", "rlhf.pool.placement=shared"), "rlhf.pool.placement=shared: expected disjoint with"),
        (("stage.eval_tasks={own_sql: 0}",), "stage.eval_tasks=.*expected none with rlhf.asynchronous"),
    ],
)
def test_what_does_not_go_with_asynchronous_sampling_is_refused_before_a_run(
    overrides, message, started_work, tmp_path
):
    """Finds a key that is silently not read."""
    with pytest.raises(ConfigError, match=message):
        check_inputs(compose_config(overrides_of(started_work, tmp_path, *SETTINGS, *overrides)))  # type: ignore[arg-type]
