"""How many messages a step of tensor parallelism sends, by what its blocks keep of their forward pass."""

import pytest

from dist_lm.config.hardware import HardwareConfig
from dist_lm.config.parallel import ParallelConfig
from dist_lm.dry_run.watch import Watch, WorkCounter
from dist_lm.parallel.layout import resolve_layout
from dist_lm.parallel.mesh import World, build_mesh
from dist_lm.parallel.sharding import build_model
from tests.parallel.parity_cases import model_of, parallel_of
from tests.parallel.ranks import RankGroups
from tests.parallel.training_task import SEED, batch_of, dropout_key

MODEL = model_of((5, 5))


def messages(world: World, parallel: ParallelConfig) -> int:
    """Collectives on the tp axis in one forward and backward pass."""
    mesh = build_mesh(resolve_layout(parallel, MODEL, world.size), world.device)
    model, batch = build_model(MODEL, parallel, mesh, world.device, SEED), batch_of(MODEL, 0)
    model.dropout = dropout_key(0)
    counter = WorkCounter(HardwareConfig(), {mesh.get_group("tp").group_name: "tp"})
    with Watch(counter):
        model.token_losses(batch).sum().backward()
    return counter.parts[-1].messages["tp"]


@pytest.mark.parametrize("layout", ["1x1x2", "1x1x2+sp"])
def test_selective_checkpointing_sends_nothing_twice(ranks: RankGroups, layout: str):
    sent = {
        mode: ranks.run(2, messages, parallel_of(layout, activation_checkpointing=mode))
        for mode in ("none", "selective", "full")
    }
    # embedding, input of the head and loss; two regions a block, forward and backward, each one message (sp: as many)
    assert sent["none"] == sent["selective"] < sent["full"]
