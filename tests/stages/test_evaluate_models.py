"""Which checkpoints stage `evaluate` asks: the same ones to the end of a run, told apart by name, refused early."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dist_lm.config.corpus import TokenizerConfig
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.launcher.pool_run import run_pool_stage
from dist_lm.launcher.process import Interrupt
from dist_lm.stages.evaluate.inputs import labels_of
from dist_lm.stages.stage import Action
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tokenizer.train import train_tokenizer
from dist_lm.training import checkpoint_files
from tests.cluster.generation_runs import Screen
from tests.cluster.pool_of_one import Alone
from tests.conftest import texts
from tests.stages.test_evaluate_stage import cluster, plan_of
from tests.training_run import linked, write_untrained

__all__ = ["cluster"]  # a fixture
BITS = ("stage.tasks=[bits_per_byte]", "stage.corpora=[code]", "stage.documents=2")


class Stopped(Interrupt):
    """A signal has come already."""

    @property
    def requested(self) -> bool:
        return True


def models_of(work: WorkDirectory, *settings: str) -> list[str]:
    stage: Any = plan_of(work, *settings).config.stage
    return stage.models


def add_checkpoint(run: RunDirectory) -> None:
    newer = shutil.copytree(run.checkpoints / "step_00000005", run.checkpoints / "step_00000006")
    checkpoint_files.write_pointer(run.checkpoints, checkpoint_files.LATEST, newer)


@pytest.fixture
def work(tiny_work: WorkDirectory, tmp_path: Path) -> WorkDirectory:
    return linked(tiny_work, tmp_path / "work")


@pytest.mark.heavy
def test_a_begun_run_keeps_its_checkpoints_while_their_runs_train_on(work, cluster, tmp_path):
    code, reward = (write_untrained(work, stage, 0) for stage in ("code", "reward"))
    prompts = tmp_path / "p.txt"
    prompts.write_text("def f():\n")
    rewarded = ("stage.tasks=[reward]", f"eval.prompts={prompts}", f"eval.reward_model={reward.path}")
    commands = {
        "named": (*BITS, f"stage.models=[{code.path}]"),
        "auto": BITS,
        "reward": (*rewarded, f"stage.models=[{code.path}]"),
    }
    for run_id, settings in commands.items():
        assert not run_pool_stage(plan_of(work, *settings, f"run_id={run_id}"), cluster, Screen(), Stopped())
    write_untrained(work, "language", 0)
    for run in (code, reward):
        add_checkpoint(run)
    for run_id, settings in commands.items():
        assert models_of(work, *settings, f"run_id={run_id}") == [str(code.checkpoints / "step_00000005")]
    again = plan_of(work, *commands["named"], "run_id=named")
    assert run_pool_stage(again, cluster, Screen(), Interrupt())
    with pytest.raises(ConfigError, match=r"stage\.models=.*step_00000006.*was .*step_00000005"):
        plan_of(work, *commands["named"], "run_id=named")  # its figures are not those of the newest checkpoint
    (new,) = models_of(work, *commands["named"], "run_id=new")
    assert new.endswith("step_00000006")


@pytest.mark.heavy
def test_runs_of_two_work_directories_may_have_the_same_name(work, cluster, tiny_work, tmp_path):
    runs = [write_untrained(one, "code", seed) for seed, one in enumerate((work, linked(tiny_work, tmp_path / "b")))]
    settings = (*BITS, f"stage.models=[{runs[0].path},{runs[1].path}]")
    assert run_pool_stage(plan_of(work, *settings), cluster, Screen(), Interrupt())
    result = json.loads(work.run("evaluate", "default").result.read_text())
    rest = "runs/code/default/checkpoints/step_00000005"
    assert [one["model"] for one in result["models"]] == [f"work/{rest}", f"b/{rest}"]
    assert result["comparisons"][0]["difference"] != 0
    assert plan_of(work, *settings).action is Action.READY
    with pytest.raises(ConfigError, match="expected different models"):
        plan_of(work, f"stage.models=[{runs[0].path},{runs[0].checkpoints}]")


def test_only_equal_labels_grow():
    paths = [Path(f"/{work}/runs/code/a/checkpoints/step_1") for work in ("x", "y")]
    paths.append(Path("/x/runs/code/b/checkpoints/step_1"))
    rest = "runs/code/a/checkpoints/step_1"
    assert labels_of(paths) == [f"x/{rest}", f"y/{rest}", "code/b/step_1"]


@pytest.mark.heavy
def test_what_refuses_a_later_model_does_so_before_the_first_is_asked(work, cluster, tmp_path, monkeypatch):
    other = write_untrained(WorkDirectory(tmp_path / "copied"), "code", 0)
    other.work.tokenizer.mkdir()
    train_tokenizer([one.text for one in texts("sql", 80)], other.work.tokenizer_model, TokenizerConfig(vocab_size=512))
    models = f"stage.models=[{write_untrained(work, 'code', 0).path},{other.path}]"
    monkeypatch.setattr(Alone, "generate", lambda *_: pytest.fail("a question was asked"))
    with pytest.raises(ArtefactError, match=r"copied/tokenizer/tokenizer\.model has 512 pieces, model\.vocab_size=640"):
        run_pool_stage(plan_of(work, "stage.tasks=[own_sql]", models), cluster, Screen(), Interrupt())


def test_a_model_that_writes_text_is_no_reward_model(work, tmp_path):
    code, prompts = write_untrained(work, "code", 0).path, tmp_path / "p.txt"
    prompts.write_text("def f():\n")
    with pytest.raises(ConfigError, match=rf"^eval\.reward_model={code}: expected a run of stage=reward"):
        plan_of(work, "stage.tasks=[reward]", f"eval.prompts={prompts}", f"eval.reward_model={code}")
