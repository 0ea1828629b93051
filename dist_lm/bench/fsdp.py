"""FSDP on two ranks of one thread against one process with two threads: the step of training, on the same global batch.

Ceiling: two ranks that each train alone on their half of the batch with a whole model and send no gradients. (On CUDA:
two GPUs against one.)
"""

from collections.abc import Sequence

import torch

from dist_lm.bench.case import Case, Comparison, CrewSize, configurations, describe
from dist_lm.bench.trial import OwnTraining, Trial, own_rows
from dist_lm.config.root import Config
from dist_lm.model.initialise import initialise
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.layout import Layout
from dist_lm.parallel.mesh import World, build_mesh
from dist_lm.parallel.sharding import build_model

RANKS = 2
FSDP, ONE, ALONE = "fsdp", "one process", "each alone"
BATCH = ("stage.global_batch=4", "stage.seq_len=512")
SHAPES = (("model=nano", *BATCH), ("model=tiny", "model.vocab_size=4096", *BATCH))


def cases(overrides: Sequence[str], quick: bool) -> list[Case]:
    """The shapes above, or the one that `overrides` give."""
    pair = CrewSize(RANKS)
    return [
        Case(
            name=describe(config),
            config=config,
            ways={FSDP: pair, ONE: CrewSize(1, threads=RANKS), ALONE: pair},
            comparisons=(Comparison(own=FSDP, peer=ONE, peer_name=f"one process, {RANKS} threads", ceiling=ALONE),),
            same_losses=frozenset({FSDP, ONE}),
        )
        for config in configurations(SHAPES, overrides, quick)
    ]


def build(way: str, config: Config, world: World) -> Trial:
    """A rank's part of one way."""
    mesh = build_mesh(Layout(1, world.size, 1), world.device)
    if way == ALONE:
        model = Transformer(config.model)
        initialise(model, config.seed)
        model = model.to(world.device, torch.float32)
    else:
        model = build_model(config.model, config.parallel, mesh, world.device, config.seed)
    return Trial(OwnTraining(model, config, own_rows(config, mesh), world).step)
