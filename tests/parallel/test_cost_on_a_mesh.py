"""Memory of a build on a mesh: one full parameter beside the shards. Messages of a step: nothing is sent twice."""

import math

import pytest

from dist_lm.config.cluster import HardwareConfig, ParallelConfig
from dist_lm.config.model import ModelConfig
from dist_lm.dry_run.watch import LiveMemory, Watch, WorkCounter
from dist_lm.model.size import parameter_shapes
from dist_lm.parallel.layout import resolve_layout
from dist_lm.parallel.mesh import World, build_mesh
from dist_lm.parallel.sharding import build_model
from dist_lm.parallel.values import shard_of
from tests.parallel.parity_cases import layout_of, model_of, parallel_of
from tests.parallel.ranks import RankGroups
from tests.parallel.training_task import SEED, batch_of, dropout_key

FP32_BYTES = 4
SMALL = 16 << 10  # tensors that are no parameters
MODEL = ModelConfig("peak", d_model=200, n_layers=6, n_heads=25, d_ff=800, max_seq_len=64, vocab_size=2048)
FIVE_HEADS = model_of((5, 5))


def bytes_of_building(world: World, parallel: ParallelConfig) -> tuple[int, int]:
    """(most bytes alive while the model is built, bytes of the shards that stay)."""
    mesh = build_mesh(resolve_layout(parallel, MODEL, world.size), world.device)
    memory = LiveMemory(gloo=False)
    with Watch(memory):
        model = build_model(MODEL, parallel, mesh, world.device, seed=0)
    return memory.peak, sum(shard_of(parameter).nbytes for parameter in model.parameters())


@pytest.mark.heavy
@pytest.mark.parametrize("layout", ["1x4x1", "1x1x4", "1x2x2"])
def test_building_holds_the_shards_and_one_full_parameter(ranks: RankGroups, layout: str):
    shapes = parameter_shapes(MODEL).values()
    whole, largest = (FP32_BYTES * f(math.prod(shape) for shape in shapes) for f in (sum, max))
    peak, own = ranks.run(layout_of(layout).world_size, bytes_of_building, parallel_of(layout))
    assert whole / 4 <= own < 0.3 * whole
    assert peak <= own + largest + SMALL
    assert peak < 0.75 * whole


def messages(world: World, parallel: ParallelConfig) -> int:
    """Collectives on the tp axis in one forward and backward pass."""
    mesh = build_mesh(resolve_layout(parallel, FIVE_HEADS, world.size), world.device)
    model, batch = build_model(FIVE_HEADS, parallel, mesh, world.device, SEED), batch_of(FIVE_HEADS, 0)
    model.dropout = dropout_key(0, FIVE_HEADS)
    counter = WorkCounter(HardwareConfig(), {mesh.get_group("tp").group_name: "tp"})
    with Watch(counter):
        model.token_losses(batch).sum().backward()
    return counter.parts[-1].messages["tp"]


@pytest.mark.heavy
@pytest.mark.parametrize("layout", ["1x1x2", "1x1x2+sp"])
def test_selective_checkpointing_sends_nothing_twice(ranks: RankGroups, layout: str):
    sent = {
        mode: ranks.run(2, messages, parallel_of(layout, activation_checkpointing=mode))
        for mode in ("none", "selective", "full")
    }
    # embedding, input of the head and loss; two regions a block, forward and backward, each one message (sp: as many)
    assert sent["none"] == sent["selective"] < sent["full"]
