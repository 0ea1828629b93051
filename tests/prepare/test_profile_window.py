"""A profile that no step can be traced for is refused or warned about before anything starts."""

import io
from dataclasses import replace
from pathlib import Path

import pytest

from dist_lm.errors import ConfigError
from dist_lm.launch import run_command
from dist_lm.prepare.compose import compose_config
from dist_lm.prepare.plan import PlannedStage, untraced
from dist_lm.stages.registry import stage_named
from dist_lm.stages.stage import Action, run_of
from dist_lm.tracking.console import Console
from dist_lm.training import checkpoint_files
from tests.conftest import TINY, TINY_MODEL


def planned(work: Path, action: Action, steps: str, stage: str = "language") -> PlannedStage:
    config = compose_config([f"stage={stage}", *TINY, "stage.steps=40", f"work_dir={work}", f"profile.steps={steps}"])
    checkpoints = run_of(config).checkpoints
    checkpoints.mkdir(parents=True)
    if action is Action.RESUME:
        (checkpoints / checkpoint_files.step_name(10)).mkdir()
        checkpoint_files.write_pointer(
            checkpoints, checkpoint_files.LATEST, checkpoints / checkpoint_files.step_name(10)
        )
    return PlannedStage(stage_named(stage), config, action, "")


@pytest.mark.parametrize(
    ("action", "steps", "words"),
    [
        (Action.BUILD, "[2,4]", ""),
        (Action.RESUME, "[2,4]", "continues after step 10"),
        (Action.RESUME, "[2,10]", "continues after step 10"),
        (Action.RESUME, "[8,13]", ""),
        (Action.READY, "[31,33]", "the run is finished"),
        (Action.READY, "[]", ""),
    ],
)
def test_a_window_that_is_over_is_named(tmp_path: Path, action: Action, steps: str, words: str) -> None:
    warning = untraced(planned(tmp_path, action, steps))
    assert words in warning
    assert bool(warning) == bool(words)


def test_a_stage_without_training_is_refused(tmp_path: Path) -> None:
    stage = planned(tmp_path, Action.BUILD, "[2,4]")
    with pytest.raises(ConfigError, match=r"profile\.steps=\[2, 4\]: stage=shards has no training steps"):
        untraced(replace(stage, stage=stage_named("shards")))


def test_the_launcher_refuses_it_too(tmp_path: Path) -> None:
    command = ["stage=shards", *TINY_MODEL, f"work_dir={tmp_path}", "profile.steps=[2,4]"]
    with pytest.raises(ConfigError, match="stage=shards has no training steps"):
        run_command(command, Console(io.StringIO(), io.StringIO()))
