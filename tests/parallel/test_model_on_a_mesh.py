"""What a mesh may change about a model, and what not: initial values, precision, compilation, where parameters live."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from dist_lm.config.cluster import ParallelConfig
from dist_lm.config.model import ModelConfig
from dist_lm.config.stage import MuonConfig
from dist_lm.model.keyed_random import initial_value
from dist_lm.model.size import parameter_shapes
from dist_lm.parallel import layout as layout_module
from dist_lm.parallel.layout import Layout
from dist_lm.parallel.mesh import World, build_mesh
from dist_lm.parallel.sharding import build_model
from tests.parallel.on_a_mesh import (
    MeshTrajectory,
    changed_by_a_skipped_step,
    compiled_graphs,
    forget_graphs,
    initial_weights,
    rank_steps,
)
from tests.parallel.one_process import entries_off, error, expected_of
from tests.parallel.parity_cases import layout_of, model_of, parallel_of
from tests.parallel.ranks import RankGroups
from tests.parallel.training_task import SEED, batch_of

MODEL = model_of((25, 25))
BF16 = 0.03  # of the gradient; an entry of bf16 has 8 bits


@pytest.mark.heavy
@pytest.mark.parametrize("layout", ["1x1x1", "1x4x1", "1x1x4", "1x2x2", "2x1x2"])
def test_initial_values_are_the_same_bits_on_any_layout(ranks: RankGroups, layout: str):
    found = ranks.run(layout_of(layout).world_size, initial_weights, MODEL, parallel_of(layout))
    expected = {n: initial_value(n, shape, MODEL, SEED).numpy() for n, shape in parameter_shapes(MODEL).items()}
    assert found.keys() == expected.keys()
    assert [name for name in expected if not np.array_equal(found[name], expected[name])] == []


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("layout", "head_dtype"),
    [
        ("1x1x1", "compute"),
        ("1x2x1", "fp32"),
        pytest.param("1x2x2", "compute", marks=pytest.mark.bars),
        ("1x1x4+sp", "compute"),
        ("1x1x4+sp", "fp32"),
    ],
)
def test_bf16_compute_is_near(ranks: RankGroups, layout: str, head_dtype: str):
    model, parallel = replace(MODEL, head_dtype=head_dtype), parallel_of(layout, compute_dtype="bf16")
    found: MeshTrajectory = ranks.run(layout_of(layout).world_size, rank_steps, model, parallel, range(1))
    expected = expected_of(MODEL)
    assert found.losses == pytest.approx(expected.losses, rel=1e-3)
    assert 1e-4 < error(found.gradients, expected.gradients) < BF16
    assert found.torn == found.dirty == set()


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.heavy
@pytest.mark.parametrize(
    ("layout", "mode", "dtype"),
    [
        pytest.param("1x1x2", "none", "fp32", marks=pytest.mark.bars),
        pytest.param("1x1x2", "selective", "fp32", marks=pytest.mark.bars),
        pytest.param("1x1x2", "full", "fp32", marks=pytest.mark.bars),
        pytest.param("1x1x2+sp", "none", "fp32", marks=pytest.mark.bars),
        ("1x2x1", "none", "bf16"),  # what CUDA runs by default
    ],
)
def test_compiled_blocks_compute_the_same(ranks: RankGroups, layout: str, mode: str, dtype: str):
    options = {"compile": "always", "activation_checkpointing": mode, "compute_dtype": dtype}
    model, parallel = model_of((5, 5)), parallel_of(layout, **options)
    ranks.run(2, forget_graphs)
    found: MeshTrajectory = ranks.run(2, rank_steps, model, parallel, range(1))
    assert ranks.run(2, compiled_graphs) > 0
    expected = expected_of(model).gradients
    if dtype == "fp32":
        assert entries_off(found.gradients, expected, 5e-6) == {}
    assert error(found.gradients, expected) < (BF16 if dtype == "bf16" else 1e-6)


@pytest.mark.heavy
@pytest.mark.parametrize("layout", ["1x2x1", "1x2x2+sp", pytest.param("2x1x2", marks=pytest.mark.bars)])
def test_offloaded_parameters_take_the_same_step(ranks: RankGroups, layout: str):
    model, parallel = model_of((5, 5)), parallel_of(layout, cpu_offload=True)
    found: MeshTrajectory = ranks.run(layout_of(layout).world_size, rank_steps, model, parallel, range(1))
    assert entries_off(found.end, expected_of(model).end, 1e-5) == {}


@pytest.mark.heavy
@pytest.mark.parametrize("layout", ["1x4x1", "1x2x2+sp", pytest.param("2x1x2", marks=pytest.mark.bars)])
@pytest.mark.parametrize("muon", [None, MuonConfig(lr=0.02, variance_beta=0.9)], ids=["adamw", "muon"])
def test_a_rank_without_finite_gradients_makes_all_ranks_skip_the_step(ranks: RankGroups, layout: str, muon):
    """The flag decides inside kernels what is written: a moment, a counter or a rank that forgets it goes its own way
    from here on, and nan that an owner of matrices computes would come back in a step."""
    applied, changed = ranks.run(
        layout_of(layout).world_size, changed_by_a_skipped_step, model_of((5, 5)), parallel_of(layout), muon
    )
    assert applied == [True, False, True]
    assert changed == []


def steps_with_many_units(world: World, model: ModelConfig, parallel: ParallelConfig) -> MeshTrajectory:
    """Three steps of two micro-batches, each with an evaluation behind it. FSDP gathers every block, the embedding and
    the head by itself, as in a large model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout_module, "UNIT_BYTES", 1)
        return rank_steps(world, model, parallel, range(3), between=True)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "layout", ["1x2x1", *(pytest.param(layout, marks=pytest.mark.bars) for layout in ("2x2x1", "1x2x2+sp"))]
)
def test_parameters_that_stay_gathered_are_never_stale(ranks: RankGroups, layout: str):
    size, model = layout_of(layout).world_size, model_of((5, 5))
    freed: MeshTrajectory = ranks.run(
        size, steps_with_many_units, model, parallel_of(layout, reshard_after_forward=True)
    )
    kept: MeshTrajectory = ranks.run(
        size, steps_with_many_units, model, parallel_of(layout, reshard_after_forward=False)
    )
    assert kept.losses == freed.losses
    assert [name for name in freed.end if not np.array_equal(kept.end[name], freed.end[name])] == []
    whole: MeshTrajectory = ranks.run(size, rank_steps, model, parallel_of(layout), range(3))
    assert entries_off(kept.end, whole.end, 1e-6) == {}


def steps_after_another_mesh(world: World, model: ModelConfig) -> str:
    first = build_mesh(Layout(1, 2, 2), world.device)
    built = build_model(model, parallel_of("1x2x2"), first, world.device, SEED)
    build_mesh(Layout(1, 1, 4), world.device)
    try:
        built.token_losses(batch_of(model, 0))
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.heavy
def test_two_tensor_parallel_layouts_in_one_process_are_refused_not_mixed_up(ranks: RankGroups):
    assert "must share a mesh" in ranks.run(4, steps_after_another_mesh, MODEL)
