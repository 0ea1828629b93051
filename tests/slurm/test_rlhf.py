"""Batch jobs that train a reward model and align a policy with it: `slurm/rlhf_large.sh`."""

import json
import shutil

import pytest

from dist_lm.rlhf.reward_model import read_reward_scale
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from tests.conftest import TINY_MODEL
from tests.patience import patient
from tests.slurm.batch_job import BatchJob
from tests.slurm.real_slurm import RealSlurm
from tests.training_run import numbers, write_untrained

pytestmark = [pytest.mark.slurm, pytest.mark.bars, pytest.mark.timeout(2400)]

ITERATIONS, REWARD_STEPS, PROMPTS = 12, 4, 8
DEADLINE_S = patient(900)  # two stages, each with a start of its ranks and actors
SETTINGS = (
    *TINY_MODEL,
    "model.tie_embeddings=true",
    "cluster.ranks_per_node=1",
    "cluster.connect_timeout_s=120",
    *("stages.rankings.samples.most=4", "stages.rankings.samples.max_new_tokens=12"),
    *("stages.reward.seq_len=200", f"stages.reward.steps={REWARD_STEPS}", "stages.reward.global_batch=4"),
    *("stages.reward.eval_at_start=false", "stages.reward.eval_sequences=8", "stages.reward.eval_every=0"),
    *("stages.reward.reward.normaliser_prompts=8", "stages.reward.reward.normaliser_new_tokens=8"),
    f"stage.steps={ITERATIONS}",
    "stage.checkpoint_every=3",
    "stage.eval_every=6",
    *(
        f"rlhf.prompts={PROMPTS}",
        "rlhf.max_new_tokens=16",
        "rlhf.lr=1e-3",
        "rlhf.value_lr=1e-3",
        "rlhf.held_out_prompts=8",
    ),
    *("rlhf.epochs=1", "rlhf.minibatches=1"),
    *("rlhf.pretrain_coefficient=0.5", "rlhf.pretrain_sequences=4", "rlhf.pretrain_seq_len=64"),
    *("rlhf.pool.cache_tokens=4096", "rlhf.pool.max_sequences=8"),
)


class RlhfJob(BatchJob):
    """One job on two nodes, and its run of stage `rlhf`."""

    def __init__(self, slurm: RealSlurm, work: WorkDirectory, *arguments: str) -> None:
        """Start from the tools checkpoint in `work`, which no stage has trained."""
        tools = work.run("tools", "default").path
        self.run: RunDirectory = work.run("rlhf", "default")
        super().__init__(slurm, work, "slurm/rlhf_large.sh", *SETTINGS, f"stage.init_from={tools}", *arguments)


@pytest.fixture
def trained(fresh: WorkDirectory, tiny_work: WorkDirectory) -> WorkDirectory:
    """A work directory that may be written to, with a checkpoint of the tools stage."""
    (fresh.path / "corpora").unlink()
    shutil.copytree(tiny_work.path / "corpora", fresh.path / "corpora")
    write_untrained(fresh, "tools", 0)
    return fresh


def test_two_nodes_train_a_reward_model_and_a_policy(slurm: RealSlurm, trained: WorkDirectory) -> None:
    job = RlhfJob(slurm, trained)
    job.finish(seconds=DEADLINE_S)
    assert job.starts() == 1
    assert json.loads(trained.run("reward", "default").result.read_text())["steps"] == REWARD_STEPS
    result = json.loads(job.run.result.read_text())
    assert (result["steps"], result["ranks"], result["prompts"]) == (ITERATIONS, 2, PROMPTS * ITERATIONS)
    assert {"rlhf/part_preference", "rlhf/win_rate", "rlhf/pretrain_loss"} <= result["metrics"].keys()
    measured = read_reward_scale(trained.run("reward", "default"))
    state = json.loads((job.run.checkpoints / result["checkpoint"] / "stage" / "rlhf.json").read_text())
    assert state["reward_scale"] == {"mean": measured.mean, "std": measured.std}
    assert "wins against the reference" in job.log
    assert {path.name for path in job.directory.iterdir()} == {"batch.log", "node_n1.log", "node_n2.log"}
    assert numbers(job.run).keys() == set(range(ITERATIONS + 1))
