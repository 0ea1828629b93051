"""A checkpoint of two models and a stage's own files: the first is as loadable as alone, damage anywhere is found."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dist_lm.config.model import ModelConfig
from dist_lm.config.stage import StageConfig
from dist_lm.errors import ArtefactError
from dist_lm.model.keyed_random import initialise
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import World
from dist_lm.training import checkpoint, checkpoint_files, checkpoint_saver
from dist_lm.training.checkpoint import Companion
from dist_lm.training.checkpoint_inspect import group_of
from dist_lm.training.checkpoint_tensors import consolidate, model_weights
from dist_lm.training.optimizer import ShardedAdamW, build_optimizer
from dist_lm.training.state import TrainState
from tests.model.small_models import small_config

POLICY, CRITIC = small_config(), small_config(head="scalar")
FILES = {"rlhf.json": b'{"iteration": 3}', "pending.safetensors": b"\x00" * 64}


@pytest.fixture
def world():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    dist.destroy_process_group()


def trained(config: ModelConfig, seed: int) -> tuple[Transformer, ShardedAdamW]:
    """A model after one step, so that its moments are not zero."""
    model = Transformer(config)
    initialise(model, seed)
    optimizer = build_optimizer(model, StageConfig(name="any"))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.1 * (seed + 1))
    optimizer.step()
    return model, optimizer


def save(directory: Path, world: World) -> Path:
    policy, optimizer = trained(POLICY, 0)
    critic = Companion("value.", *trained(CRITIC, 1), CRITIC)
    tensors = checkpoint.tensors_of(policy, optimizer, POLICY) | critic.tensors()
    return checkpoint_saver.write(directory, tensors, TrainState(step=3), POLICY, world, attached=FILES)


def values(model: torch.nn.Module, optimizer: ShardedAdamW) -> list[torch.Tensor]:
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return [*(p.detach() for p in model.parameters()), *moments]


def test_both_models_their_optimizers_and_the_files_come_back(tmp_path, world):
    saved = save(tmp_path, world)
    policy, critic = trained(POLICY, 5), trained(CRITIC, 6)
    companion = Companion("value.", *critic, CRITIC)
    state = checkpoint.load(saved, *policy, POLICY, [companion])
    assert state.step == 3
    for found, expected in ((policy, trained(POLICY, 0)), (critic, trained(CRITIC, 1))):
        for one, other in zip(values(*found), values(*expected), strict=True):
            assert torch.equal(one, other)
    assert {name: checkpoint_files.read_attached(saved, name) for name in FILES} == FILES
    with pytest.raises(ArtefactError, match=r"stage/nothing cannot be read"):
        checkpoint_files.read_attached(saved, "nothing")


def test_the_first_model_is_loaded_as_if_it_were_alone(tmp_path, world):
    saved = save(tmp_path, world)
    expected = {name: value.detach().numpy() for name, value in trained(POLICY, 0)[0].named_parameters()}
    found = model_weights(saved)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    alone = trained(POLICY, 5)[0]
    checkpoint.load(saved, alone, None, POLICY)
    assert all(np.array_equal(value.detach().numpy(), expected[name]) for name, value in alone.named_parameters())
    assert consolidate(saved, tmp_path / "one.safetensors") == len(expected)
    assert consolidate(saved, tmp_path / "two.safetensors", with_optimizer=True) == 4 * len(expected)
    assert group_of("value.optimizer.blocks.1.norm.exp_avg") == "value.optimizer.*.exp_avg"


@pytest.mark.parametrize("name", [*FILES, "shard"])
def test_damage_is_found_in_every_file(tmp_path, world, name):
    saved = save(tmp_path, world)
    checkpoint_files.verify(saved)
    path = saved / "stage" / name if name in FILES else next(saved.glob("shard-*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=rf"{path.name}.* is damaged"):
        checkpoint_files.verify(saved)
    path.unlink()
    with pytest.raises(ArtefactError, match=rf"{path.name}.* is missing"):
        checkpoint_files.verify(saved)
