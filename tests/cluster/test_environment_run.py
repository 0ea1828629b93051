"""Stage rlhf with an environment as its users meet it: a class in a file, tasks in rows, records and a restart."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_lm.config.root import save_config
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.prepare.compose import compose_config
from dist_lm.rlhf.episodes import read_episodes
from dist_lm.stages.rlhf.config import RlhfRunConfig
from dist_lm.stages.rlhf.stage import check_inputs, with_reward_run
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from tests.conftest import TINY_MODEL
from tests.training_run import DEADLINE_S, copy_until, linked, numbers, train, write_untrained

pytestmark = [pytest.mark.cluster, pytest.mark.heavy]

ENVIRONMENT = '''
"""Wants letters of the second half of the alphabet, for two turns."""

from pathlib import Path

from dist_lm.environments.protocol import Observation, Step, Verdict


class Letters:
    async def reset(self, task):
        self.data, self.turns = task.data, 0
        with Path(task.data["log"]).open("a") as log:
            log.write(f"{task.key}\\n")
        return Observation.user(f"Go {self.data['go']}")

    async def step(self, action):
        self.turns += 1
        share = sum(c > "m" for c in action.text) / max(1, len(action.text))
        if self.data["go"] == 3 and self.turns == 2:
            raise RuntimeError("three")
        if action.cut or self.turns == 2:
            return Step(Observation(), True, Verdict.of(share))
        return Step(Observation.user("Again"), False, turn_reward=share)

    async def close(self):
        pass
'''
ITERATIONS = 4
SETTINGS = (
    "stage=rlhf",
    *TINY_MODEL,
    f"stage.steps={ITERATIONS}",
    "stage.checkpoint_every=2",
    "stage.eval_every=2",
    "stage.keep_checkpoints=9",
    "rlhf.algorithm=grpo",
    "rlhf.prompts=3",
    "rlhf.samples=3",
    "rlhf.max_new_tokens=10",
    "rlhf.minibatches=1",
    "rlhf.held_out_prompts=2",
    "rlhf.lr=1e-3",
    "rlhf.pool.cache_tokens=4096",
    "rlhf.pool.max_sequences=8",
    "rlhf.pool.actors=0",
    "rlhf.reward_model=none",
    "rlhf.max_failed_fraction=0.7",
    "rlhf.environment_limits.turns=4",
)


@pytest.fixture(scope="module")
def started_work(tiny_work: WorkDirectory, tmp_path_factory: pytest.TempPathFactory) -> WorkDirectory:
    work = linked(tiny_work, tmp_path_factory.mktemp("started"))
    write_untrained(work, "tools", 0)
    return work


def overrides_of(work: WorkDirectory, folder: Path, *more: str) -> list[str]:
    """Returns a command; the environment, its tasks and the constraint of turns are files in `folder`."""
    (folder / "letters.py").write_text(ENVIRONMENT)
    tasks = [json.dumps({"go": number, "log": str(folder / "resets.txt")}) for number in range(7)]
    (folder / "tasks.jsonl").write_text("\n".join(tasks))
    (folder / "held_out.jsonl").write_text("\n".join(tasks[:2]))
    # Without training no turn ends by itself.
    (folder / "short.json").write_text(json.dumps({"regex": "[a-z]{1,3}"}))
    return [
        *SETTINGS,
        f"work_dir={work.path}",
        f"stage.init_from={work.run('tools', 'default').path}",
        f"rlhf.environment={folder / 'letters.py'}:Letters",
        f"rlhf.prompts_from={folder / 'tasks.jsonl'}",
        f"rlhf.held_out_from={folder / 'held_out.jsonl'}",
        f"rlhf.constraint={folder / 'short.json'}",
        *more,
    ]


def prepared(work: WorkDirectory, folder: Path, *more: str) -> RunDirectory:
    config = compose_config(overrides_of(work, folder, *more))
    assert isinstance(config, RlhfRunConfig)
    check_inputs(config)
    run = work.run("rlhf", config.run_id)
    run.create()
    save_config(with_reward_run(config), run.config)
    return run


def resets(folder: Path) -> int:
    return len((folder / "resets.txt").read_text().splitlines())


def test_a_run_with_a_class_in_a_file_records_and_goes_on_with_the_same_numbers(started_work, tmp_path):
    """Finds a run that cannot be restarted, executes a recorded conversation again, or counts a crash as a reward."""
    run = prepared(started_work, tmp_path)
    result = train(run, ranks=1)
    expected = numbers(run)

    metrics = [expected[step] for step in range(1, ITERATIONS + 1)]
    assert all(
        line["rollout/turns"] > 1.5 and line["rlhf/ratio_mean"] == pytest.approx(1, abs=1e-6) for line in metrics
    )
    n_crashed = sum(line.get("rollout/invalid_crashed", 0) for line in metrics)
    assert n_crashed == sum(line["rlhf/failed_environment"] for line in metrics) > 0
    assert result["metrics"]["rlhf/held_out"] == 2

    episodes = [episode for path in sorted(run.conversations.iterdir()) for episode in read_episodes(path)]
    assert len(episodes) == ITERATIONS * 9
    assert sum(not episode.verdict.valid for episode in episodes) == n_crashed
    assert {episode.verdict.failure_reason for episode in episodes} == {None, "crashed"}

    # Half of the run is done again. Conversations of iterations 3 and 4 are recorded already.
    n_resets = resets(tmp_path)
    again = linked(started_work, tmp_path / "again").run("rlhf", run.path.name)
    again.path.parent.mkdir(parents=True)
    copy_until(run, again, step=2)
    train(again, ranks=1)
    assert numbers(again) == expected
    assert resets(tmp_path) - n_resets == 2 * 2, "only held-out tasks are executed again"


@pytest.mark.bars
def test_an_actor_holds_the_same_conversations(started_work, tmp_path):
    """Finds answers of a pool that depend on the actor, or requests that it loses while conversations wait."""
    expected = prepared(started_work, tmp_path, "run_id=alone")
    train(expected, ranks=1)
    command = overrides_of(started_work, tmp_path, "run_id=actors", "rlhf.pool.actors=1")
    finished = subprocess.run(
        [sys.executable, "-m", "dist_lm.launch", *command],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert numbers(started_work.run("rlhf", "actors")) == numbers(expected)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("rlhf.reward_model=auto",), r"rlhf.rewards=preference: expected its verdict alone .*reward_model=none"),
        (("rlhf.prompts_from=''",), "rlhf.prompts_from=''.*tasks of rlhf.environment"),
        (("rlhf.algorithm=gspo",), "rlhf.algorithm=gspo: expected an algorithm with a ratio for each token: "),
        (("rlhf.environment_limits.turns=0",), "rlhf.environment_limits.turns=0"),
        (("rlhf.environments_at_once=0",), "rlhf.environments_at_once=0"),
        (("rlhf.environment=nothing",), "nothing: .*expected bash"),
        (("rlhf.environment=''", "rlhf.rewards={x: {kind: environment}}"), "rlhf.environment=''"),
    ],
)
def test_what_does_not_go_together_is_refused_before_a_run(overrides, message, started_work, tmp_path):
    """Finds a key that is silently not read."""
    with pytest.raises(ConfigError, match=message):
        check_inputs(compose_config(overrides_of(started_work, tmp_path, *overrides)))  # type: ignore[arg-type]


def test_a_file_without_tasks_is_refused(started_work, tmp_path):
    """Finds rows that are no tasks and are met only by a rank."""
    overrides = overrides_of(started_work, tmp_path)
    (tmp_path / "tasks.jsonl").write_text('{"go": 1}\n{"go": \n')
    with pytest.raises(ArtefactError, match=r"rlhf.prompts_from: tasks.jsonl line 2"):
        check_inputs(compose_config(overrides))  # type: ignore[arg-type]
