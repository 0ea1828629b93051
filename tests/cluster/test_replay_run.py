"""`dist-lm replay` on a real run: equal where nothing was touched, and each change of its record is found and named."""

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from dist_lm.__main__ import app
from dist_lm.errors import UserError
from dist_lm.rlhf.environment_rollouts import file_name
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.training import checkpoint_files
from tests.cluster.test_environment_run import ENVIRONMENT, ITERATIONS, prepared, started_work
from tests.training_run import linked, train

pytestmark = [pytest.mark.cluster, pytest.mark.heavy]
__all__ = ["started_work"]  # a fixture

CONVERSATIONS = 9  # of an iteration


@pytest.fixture(scope="module")
def finished(started_work: WorkDirectory, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = prepared(started_work, tmp_path_factory.mktemp("files"), "stage.checkpoint_every=1", "rlhf.top_p=0.9")
    train(run, ranks=1)
    return run


@pytest.fixture
def run(finished: RunDirectory, tmp_path: Path) -> RunDirectory:
    """A copy of the finished run, which a test may damage."""
    work = linked(finished.work, tmp_path / "work")
    copy = work.run("rlhf", finished.path.name)
    shutil.copytree(finished.path, copy.path)
    return copy


def replay(run: RunDirectory, *options: str) -> Result:
    return CliRunner().invoke(app, ["replay", str(run.path), *options])


def results(run: RunDirectory, *options: str) -> list[dict[str, Any]]:
    """Returns what `--json` prints."""
    return [json.loads(line) for line in replay(run, "--json", *options).stdout.splitlines()]


def change(run: RunDirectory, iteration: int, line: int, how: Callable[[dict[str, Any]], object]) -> int:
    """Changes a line of the record, with the checksum that belongs to it; returns the number of its rollout."""
    path = run.conversations / file_name(3 * (iteration - 1))
    lines = path.read_text().splitlines()
    content = json.loads(lines[line])
    how(content["episode"])
    content["crc32"] = zlib.crc32(json.dumps(content["episode"]).encode())
    lines[line] = json.dumps(content)
    path.write_text("".join(f"{text}\n" for text in lines))
    episode = content["episode"]
    return 3 * (episode["position"] - 3 * (iteration - 1)) + episode["sample"] + 1


def line_with(run: RunDirectory, iteration: int, condition: Callable[[dict[str, Any]], bool]) -> int:
    """Returns the index of the first line whose conversation fulfils a condition."""
    lines = (run.conversations / file_name(3 * (iteration - 1))).read_text().splitlines()
    return next(index for index, line in enumerate(lines) if condition(json.loads(line)["episode"]))


def has_two_turns(episode: dict[str, Any]) -> bool:
    return len(episode["turns"]) == 2 and episode["verdict"][1] is None


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_what_a_run_recorded_is_what_happens_again(run):
    """Finds bits that the same weights do not give, and a replay that writes into the run."""
    before = contents(run.path)
    # The ranks had another number of threads, on which the last bits depend.
    torch.set_num_threads(2)
    lines = results(run)
    assert torch.get_num_threads() == 2
    assert [line["iteration"] for line in lines] == [*range(1, ITERATIONS + 1)]
    assert all(line["equal"] and line["metrics"] > 15 and line["largest_gap"] == 0 for line in lines)
    assert [Path(line["weights"]).name for line in lines][1:] == [f"step_{i:08d}" for i in range(1, ITERATIONS)]
    assert sum(line["conversations"] for line in lines) == ITERATIONS * CONVERSATIONS

    said = replay(run, "--verify")
    assert said.exit_code == 0, said.output
    assert said.stdout.count("9 conversations") == said.stdout.count(": equal") == ITERATIONS
    assert contents(run.path) == before


def test_a_flipped_token_a_changed_observation_and_a_changed_verdict_are_named(run):
    """Finds a difference that is missed, or named at another place."""

    def flip(episode: dict[str, Any]) -> None:
        sample = episode["samples"][0]
        second_turn = sample["drawn"].rindex("01") + 1
        sample["ids"][second_turn] ^= 1

    rollout = change(run, 2, line_with(run, 2, has_two_turns), flip)
    (line,) = results(run, "--iteration", "2")
    assert not line["equal"]
    assert (line["differing"], line["rollout"]) == (1, rollout)
    assert (line["difference"]["what"], line["difference"]["turn"], line["difference"]["token"]) == ("token", 2, 1)
    said = replay(run, "--iteration", "2", "--rollout", str(rollout))
    assert said.exit_code == 1
    assert f"1 differ, the first is rollout {rollout}, turn 2, token 1, token: recorded " in said.stdout

    def observe(episode: dict[str, Any]) -> None:
        episode["turns"][0]["step"]["observation"]["messages"][0]["content"] = "Stop"

    rollout = change(run, 3, line_with(run, 3, has_two_turns), observe)
    (line,) = results(run, "--iteration", "3")
    assert (line["rollout"], line["difference"]["what"], line["difference"]["turn"]) == (rollout, "prompt", 2)
    said = replay(run, "--verify", "--iteration", "3")
    assert said.exit_code == 1
    assert f"1 differ, the first is rollout {rollout}, turn 1, observation: recorded" in said.stdout
    assert "Stop" in said.stdout
    assert "Again" in said.stdout

    def judge(episode: dict[str, Any]) -> None:
        episode["verdict"][0] = episode["turns"][-1]["step"]["verdict"][0] = 7.0

    rollout = change(run, 4, line_with(run, 4, has_two_turns), judge)
    # The weights know no verdicts, but the metrics that the run wrote do.
    (line,) = results(run, "--iteration", "4")
    assert line["difference"] is None
    assert not line["equal"]
    assert line["metric_difference"]["name"].startswith("rlhf/")
    said = replay(run, "--verify", "--iteration", "4")
    assert said.exit_code == 1
    assert f"rollout {rollout}, turn 2, verdict: recorded [7.0, true, null], now [" in said.stdout


def test_iterations_whose_weights_are_gone_are_named(run):
    """Finds conversations that are compared with other weights, or count as equal because nothing was compared."""
    shutil.rmtree(run.checkpoints / checkpoint_files.step_name(1))
    said = replay(run)
    assert said.exit_code == 0, said.output
    assert "not drawn again, as the weights after iteration 1 are in no checkpoint" in said.stdout.splitlines()[1]
    assert f"stage.checkpoint_every=1 stage.keep_checkpoints={ITERATIONS}" in said.stdout
    assert said.stdout.count(": equal") == ITERATIONS - 1
    alone = replay(run, "--iteration", "2")
    assert isinstance(alone.exception, UserError)
    assert "no conversation was compared: the weights after iteration 1" in str(alone.exception)


def test_a_run_that_keeps_no_old_conversations_keeps_those_that_a_restart_needs(started_work, tmp_path):
    """Finds conversations that are removed though a checkpoint may be continued that needs them, or none at all."""
    settings = ("stage.checkpoint_every=1", "stage.keep_checkpoints=2", "rlhf.keep_conversations=false")
    run = prepared(started_work, tmp_path, "run_id=short", *settings)
    train(run, ranks=1)
    oldest, *_ = checkpoint_files.steps_in(run.checkpoints)
    first = checkpoint_files.step_of(oldest) + 1
    assert 1 < first <= ITERATIONS

    lines = results(run)
    assert [line["iteration"] for line in lines][-1] == ITERATIONS
    # A save in a thread removes the oldest checkpoint after the conversations were looked through.
    assert first - 1 <= lines[0]["iteration"] <= first
    assert all(line["equal"] for line in lines)
    assert lines[-1]["weights"] is not None
    (path, *_) = sorted(run.conversations.iterdir())
    path.unlink()
    with pytest.raises(UserError, match="missing"):
        raise replay(run, "--iteration", str(lines[0]["iteration"])).exception or AssertionError


def test_damage_is_one_line(run):
    """Finds a damaged checkpoint, line or environment that ends in a traceback or in a comparison."""
    path = run.conversations / file_name(0)
    content = path.read_text()
    path.write_text(content.replace("Again", "Never", 1))
    error = replay(run).exception
    assert isinstance(error, UserError)
    assert f"{path}: line " in str(error)
    path.write_text(content)

    shard = next((run.checkpoints / checkpoint_files.step_name(1)).glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    error = replay(run, "--iteration", "2").exception
    assert isinstance(error, UserError)
    assert shard.name in str(error)

    environment = next(path for path in _files_of(run) if path.name == "letters.py")
    run.note_files({f"rlhf.environment={environment}:Letters": [environment]})
    environment.write_text(ENVIRONMENT.replace("Again", "And again"))
    try:
        error = replay(run, "--verify").exception
        assert isinstance(error, UserError)
        assert "letters.py:Letters: has changed since" in str(error)
        assert replay(run, "--iteration", "1").exit_code == 0
    finally:
        environment.write_text(ENVIRONMENT)


def _files_of(run: RunDirectory) -> list[Path]:
    words = run.config.read_text().split()
    (name,) = {word.rpartition(":")[0] for word in words if word.endswith("letters.py:Letters")}
    return [Path(name)]
