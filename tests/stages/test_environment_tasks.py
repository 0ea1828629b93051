"""What the launcher refuses of an environment before a run starts."""

from pathlib import Path

import pytest

from dist_lm.errors import ConfigError
from dist_lm.rlhf.config import RewardPartConfig
from dist_lm.stages.rlhf.config import RlhfRunGroup
from dist_lm.stages.rlhf.environment_tasks import check_environment, read_tasks


def settings(name: str, folder: Path) -> RlhfRunGroup:
    """The settings of a run with the class of this name, in a file of `folder` with the class `Guess`."""
    (folder / "guess.py").write_text("raise SystemExit\n\n\nclass Guess:\n    pass\n")
    (folder / "tasks.jsonl").write_text("".join(f'{{"number": {number}}}\n' for number in range(32)))
    return RlhfRunGroup(
        environment=f"{folder / 'guess.py'}:{name}",
        prompts_from=str(folder / "tasks.jsonl"),
        algorithm="grpo",
        reward_model="none",
        rewards={"environment": RewardPartConfig(kind="environment")},
    )


@pytest.mark.parametrize("name", ["Gues", "MISSING", ""])
def test_a_class_that_its_file_does_not_have_is_refused_before_ranks_start(name: str, tmp_path: Path):
    """Finds a mistyped class that only shows when all ranks have started and loaded their models."""
    with pytest.raises(ConfigError, match="the file has no such class"):
        check_environment(settings(name, tmp_path))


def test_the_file_of_an_environment_is_not_executed_by_the_launcher(tmp_path: Path):
    """Finds code of a user that runs in the launcher, and a class that is there but refused."""
    check_environment(settings("Guess", tmp_path))


def test_a_held_out_task_is_told_from_the_training_task_of_its_number(tmp_path: Path):
    """Finds an environment that keeps something by key and gives it to both, and a log that confuses them."""
    of_run = settings("Guess", tmp_path)
    of_run.held_out_from = of_run.prompts_from
    tasks, held_out = read_tasks(of_run)
    assert [task.key for task in tasks] == [str(number) for number in range(32)]
    assert [task.key for task in held_out] == [f"held_out {number}" for number in range(32)]
    assert not {task.digest for task in tasks} & {task.digest for task in held_out}
