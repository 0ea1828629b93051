"""Batch jobs that train a policy over many turns with an environment: `slurm/agents_large.sh`."""

import json

import pytest

from dist_lm.rlhf.episodes import read_episodes
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from tests.conftest import TINY_MODEL
from tests.patience import patient
from tests.slurm.batch_job import BatchJob
from tests.slurm.real_slurm import RealSlurm
from tests.training_run import numbers, write_untrained

pytestmark = [pytest.mark.slurm, pytest.mark.bars, pytest.mark.timeout(2400)]

ITERATIONS, PROMPTS, SAMPLES = 4, 4, 2
DEADLINE_S = patient(900)
ENVIRONMENT = '''
"""Wants letters of the second half of the alphabet, for two turns."""

from dist_lm.environments.protocol import Observation, Step, Verdict


class Letters:
    async def reset(self, task):
        self.turns = 0
        return Observation.user(f"Go {task.data['go']}")

    async def step(self, action):
        self.turns += 1
        share = sum(c > "m" for c in action.text) / max(1, len(action.text))
        if action.cut or self.turns == 2:
            return Step(Observation(), True, Verdict.of(share))
        return Step(Observation.user("Again"), False, turn_reward=share)

    async def close(self):
        pass
'''
SETTINGS = (
    *TINY_MODEL,
    "cluster.ranks_per_node=1",
    "cluster.connect_timeout_s=120",
    *(f"stage.steps={ITERATIONS}", "stage.checkpoint_every=2", "stage.eval_every=0"),
    *(f"rlhf.prompts={PROMPTS}", f"rlhf.samples={SAMPLES}", "rlhf.max_new_tokens=10", "rlhf.lr=1e-3"),
    *("rlhf.held_out_prompts=2", "rlhf.epochs=1", "rlhf.minibatches=1"),
    *("rlhf.pool.cache_tokens=4096", "rlhf.pool.max_sequences=8", "rlhf.pool.actors=0"),
)


def test_two_nodes_train_a_policy_in_a_class_of_the_user(slurm: RealSlurm, fresh: WorkDirectory) -> None:
    """Finds defaults that the stage refuses, and files of a user that a node does not see."""
    write_untrained(fresh, "tools", 0)
    files = fresh.path / "files"
    files.mkdir()
    (files / "letters.py").write_text(ENVIRONMENT)
    (files / "tasks.jsonl").write_text("\n".join(json.dumps({"go": number}) for number in range(9)))
    (files / "held_out.jsonl").write_text("\n".join(json.dumps({"go": number}) for number in range(2)))
    job = BatchJob(
        slurm,
        fresh,
        "slurm/agents_large.sh",
        *SETTINGS,
        f"stage.init_from={fresh.run('tools', 'default').path}",
        f"rlhf.environment={files / 'letters.py'}:Letters",
        f"rlhf.prompts_from={files / 'tasks.jsonl'}",
        f"rlhf.held_out_from={files / 'held_out.jsonl'}",
    )
    job.finish(seconds=DEADLINE_S)
    assert job.starts() == 1
    run: RunDirectory = fresh.run("rlhf", "default")
    result = json.loads(run.result.read_text())
    assert (result["steps"], result["ranks"]) == (ITERATIONS, 2)
    assert all(numbers(run)[step]["rollout/turns"] >= 1 for step in range(1, ITERATIONS + 1))
    episodes = [episode for path in sorted(run.conversations.iterdir()) for episode in read_episodes(path)]
    assert len(episodes) == ITERATIONS * PROMPTS * SAMPLES
    assert "rlhf.algorithm=grpo" in job.log
