"""Runs with `rlhf.asynchronous`: a run is a function of its schedule, whoever repeats it, wherever it was killed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dist_lm.__main__ import app
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from tests.cluster.test_environment_run import ENVIRONMENT, prepared, started_work
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
STEP = "async def step(self, action):"
SLOW = ENVIRONMENT.replace("from pathlib", "import asyncio\nfrom pathlib").replace(
    STEP, STEP + "\n        await asyncio.sleep(0.1 * self.data['go'])"
)


def slow(work: WorkDirectory, folder: Path, *more: str) -> RunDirectory:
    run = prepared(work, folder, *SETTINGS, *more)
    (folder / "letters.py").write_text(SLOW)
    (folder / "short.json").write_text(json.dumps({"regex": "[a-z]{12,30}"}))
    return run


@pytest.fixture(scope="module")
def finished(started_work: WorkDirectory, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = slow(started_work, tmp_path_factory.mktemp("files"))
    train(run, ranks=1)
    return run


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
    turns = [
        turn
        for path in finished.conversations.glob("tasks_*.jsonl")
        for line in path.read_text().splitlines()
        for turn in json.loads(line)["episode"]["turns"]
    ]
    assert any(len(turn.get("versions", ())) > 1 for turn in turns), "no weights changed in the middle of an answer"


@pytest.mark.parametrize("until", [0, 3])
def test_losses_follow_from_the_schedule(until, finished, tmp_path):
    """Finds updates that depend on anything but seed, configuration, schedule and observations."""
    copy = copy_of(finished, tmp_path, until=until)
    train(copy, ranks=1)
    assert numbers(copy) == numbers(finished)
