"""Training beside a base in four bits: replicas compute what one rank computes, and FSDP leaves the base alone."""

from pathlib import Path

import pytest
import torch

from dist_lm.config.cluster import ParallelConfig
from dist_lm.config.model import AdaptedModelConfig
from dist_lm.config.stage import LoraConfig
from dist_lm.errors import ConfigError
from dist_lm.model.quantised import quantised_matrices, round_trip
from dist_lm.model.size import is_trained, parameter_shapes
from dist_lm.parallel.layout import layouts_of, resolve_layout
from dist_lm.parallel.mesh import World, build_mesh
from dist_lm.parallel.sharding import build_model
from dist_lm.parallel.values import fill, unsharded_copy
from dist_lm.training import checkpoint, checkpoint_saver
from dist_lm.training.optimizer import build_optimizer
from dist_lm.training.state import TrainState
from tests.parallel.on_a_mesh import MeshTrajectory, rank_steps
from tests.parallel.one_process import entries_off
from tests.parallel.parity_cases import layout_of, model_of, parallel_of
from tests.parallel.ranks import RankGroups
from tests.parallel.training_task import SEED, STAGE, parameter_value

pytest.importorskip("bitsandbytes")
LORA = LoraConfig(rank=3, alpha=5.0, load_in_4bit=True)


def adapted(**changes) -> AdaptedModelConfig:
    return AdaptedModelConfig.of(model_of((5, 5), ffn="swiglu", **changes), LORA)


def saved_base(world: World, model: AdaptedModelConfig, checkpoints: Path) -> str:
    """Writes a checkpoint of the base of the task (collective)."""
    parallel = parallel_of("1x1x1")
    mesh = build_mesh(resolve_layout(parallel, model.plain, world.size), world.device)
    base = build_model(model.plain, parallel, mesh, world.device, SEED)
    fill(base, model.plain, lambda name, shape: parameter_value(name, shape, model))
    tensors = checkpoint.tensors_of(base, build_optimizer(base, STAGE), model.plain)
    return str(checkpoint_saver.write(checkpoints, tensors, TrainState(), model.plain, world))


def loaded(world: World, model_config: AdaptedModelConfig, parallel: ParallelConfig, base: str) -> dict:
    """What a model that loaded the base holds, and what it hands to engines (collective)."""
    mesh = build_mesh(resolve_layout(parallel, model_config, world.size), world.device)
    model = build_model(model_config, parallel, mesh, world.device, SEED)
    checkpoint.load_weights(Path(base), model, model_config)
    frozen = [parameter for name, parameter in model.named_parameters() if not is_trained(name, model_config)]
    copy = unsharded_copy(model, model_config, torch.float32)
    return {
        "dtypes": {str(parameter.dtype) for parameter in frozen},
        "bytes": sum(matrix.nbytes for matrix in quantised_matrices(model).values()),
        "whole": {name: value.numpy() for name, value in copy.state_dict().items()},
    }


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["1x1x1", "2x1x1"])
def test_every_rank_holds_the_base_once_and_engines_get_it_dequantised(
    ranks: RankGroups, tmp_path: Path, layout: str, dtype: str
):
    """Finds fp32 copies of what is frozen, a base that FSDP shards, and engines that get the base before rounding."""
    model = adapted()
    base = ranks.run(1, saved_base, model, tmp_path)
    found = ranks.run(layout_of(layout).world_size, loaded, model, parallel_of(layout, compute_dtype=dtype), base)
    assert found["dtypes"] == {"torch.float32" if dtype == "fp32" else "torch.bfloat16"}
    tolerance = 1e-6 if dtype == "fp32" else 1e-2
    for name, shape in parameter_shapes(model.plain).items():
        expected = round_trip(name, parameter_value(name, shape, model))
        assert entries_off({name: found["whole"][name]}, {name: expected.numpy()}, tolerance) == {}


@pytest.mark.heavy
def test_replicas_take_the_steps_of_one_rank(ranks: RankGroups):
    """Finds gradients of adapters that replicas do not add up."""
    model = adapted()
    one: MeshTrajectory = ranks.run(1, rank_steps, model, parallel_of("1x1x1"), range(3))
    two: MeshTrajectory = ranks.run(2, rank_steps, model, parallel_of("2x1x1"), range(3))
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    assert two.torn == two.dirty == set()
    assert all(is_trained(name, model) for name in two.gradients)


@pytest.mark.parametrize("layout", ["1x2x1", "1x1x2"])
def test_layouts_that_cut_the_base_are_refused_by_name(layout: str):
    axis = "dp_shard=2" if layout == "1x2x1" else "tp=2"
    with pytest.raises(ConfigError, match=rf"load_in_4bit=true .* {axis} must be 1 .* fit 2 ranks: \(2, 1, 1\)"):
        resolve_layout(parallel_of(layout), adapted(), 2)
    assert [str(fitting) for fitting in layouts_of(adapted(), 4)] == ["dp_replicate=4 dp_shard=1 tp=1"]
