"""The models that a rank of stage rlhf begins with: a resumed run has the reference and the reward model of before."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_lm.config.model import ModelConfig
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.layout import resolve_layout
from dist_lm.parallel.mesh import World, build_mesh
from dist_lm.prepare.compose import compose_config
from dist_lm.rlhf.algorithms.grpo import Grpo
from dist_lm.stages.rlhf.config import rlhf_config
from dist_lm.stages.rlhf.models import LoadedRun, load_run, saved_files, train_state, trunk_of_critic
from dist_lm.stages.training.program import RankStart
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.training.checkpoint_saver import CheckpointSaver
from tests.conftest import TINY_MODEL
from tests.training_run import linked, write_untrained

WORLD = World(0, 1, 0, torch.device("cpu"))
REPLACED = r"was .*{before}.* \(manifest \w{{12}}\), found .*{after}.* \(\w{{12}}\): name that checkpoint \(RUN@STEP\)"


@pytest.fixture
def _alone(work: WorkDirectory) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def work(tiny_work: WorkDirectory, tmp_path: Path) -> WorkDirectory:
    made = linked(tiny_work, tmp_path / "work")
    for stage in ("tools", "reward"):
        write_untrained(made, stage, 0)
        shutil.copytree(made.run(stage, "default").path, made.run(stage, "moved").path)
        write_untrained(made, stage, 1, run_id="other")
    return made


def begun(work: WorkDirectory, tools: str, reward: str) -> tuple[RunDirectory, LoadedRun]:
    start_at, reward_at = work.run("tools", tools).path, work.run("reward", reward).path
    given = ["rlhf.algorithm=grpo", "rlhf.normalise_reward=false", f"rlhf.reward_model={reward_at}"]
    config = rlhf_config(compose_config(["stage=rlhf", *TINY_MODEL, *given, f"stage.init_from={start_at}"]))
    layout = resolve_layout(config.parallel, config.model, 1)
    start = RankStart(WORLD, layout, build_mesh(layout, WORLD.device), Tokenizer.load(work.tokenizer_model))
    run = work.run("rlhf", "default")
    return run, load_run(run, config, start, Grpo(config.rlhf))


@pytest.mark.heavy
@pytest.mark.usefixtures("_alone")
def test_a_resumed_run_has_the_reference_and_the_reward_model_that_it_began_with(work: WorkDirectory):
    run, first = begun(work, "default", "default")
    run.create()
    policy = first.models.policy
    with CheckpointSaver(run.checkpoints, policy.model.config, WORLD, keep=1, asynchronous=False) as saver:
        counters = train_state(first.state, 0, Tokenizer.load(work.tokenizer_model).sha256)
        saver.save(policy.model, policy.optimizer, counters, first.companions, saved_files(first.state, first))
    begun(work, "moved", "moved")
    with pytest.raises(ArtefactError, match=f"stage.init_from {REPLACED.format(before='default', after='other')}"):
        begun(work, "other", "default")
    with pytest.raises(ArtefactError, match=f"rlhf.reward_model {REPLACED.format(before='default', after='other')}"):
        begun(work, "default", "other")


SHAPE = ModelConfig("small", d_model=8, n_layers=1, n_heads=2, d_ff=8, max_seq_len=16, vocab_size=32, head="scalar")


@pytest.mark.parametrize(
    ("change", "starts"),
    [
        ({}, True),
        ({"head_width": 4, "n_kv_heads": 2, "max_seq_len": 32, "init_std": 0.1, "tie_embeddings": True}, True),
        ({"head_width": 8}, False),
        *(({key: True}, False) for key in ("qk_norm", "value_residual", "parallel_residual")),
        *(({key: value}, False) for key, value in (("rope_base", 5e5), ("norm_eps", 1e-6), ("rotary_fraction", 0.5))),
    ],
)
def test_the_critic_starts_from_a_reward_model_that_computes_as_the_policy_does(change, starts):
    policy, reward = Transformer(replace(SHAPE, head="tokens")), Transformer(replace(SHAPE, **change))
    assert trunk_of_critic(None, policy, SHAPE, "zero") is policy
    assert trunk_of_critic(reward, policy, SHAPE, "zero") is (reward if starts else policy)
    if starts:
        assert trunk_of_critic(reward, policy, SHAPE, "reward_model") is reward
    else:
        key = next(iter(change)).replace("head_width", "d_head")
        with pytest.raises(
            ConfigError, match=rf"rlhf.value_head=reward_model: .* reward model has {key}=.* \(policy: "
        ):
            trunk_of_critic(reward, policy, SHAPE, "reward_model")
