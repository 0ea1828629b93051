"""torch.compile of each block against eager, in one process with all cores (on CUDA: on one GPU)."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace

from dist_lm.bench.case import Case, Comparison, CrewSize, configurations, describe
from dist_lm.bench.trial import OwnTraining, Trial, own_rows
from dist_lm.config.root import Config
from dist_lm.errors import UserError
from dist_lm.parallel.layout import Layout
from dist_lm.parallel.mesh import World, build_mesh
from dist_lm.parallel.sharding import build_model
from dist_lm.storage.process import cores

COMPILED, EAGER = "compiled", "eager"
SHAPES = (
    ("model=nano", "stage.global_batch=8", "stage.seq_len=256"),
    ("model=tiny", "model.vocab_size=4096", "stage.global_batch=4", "stage.seq_len=512"),
)


def cases(overrides: Sequence[str], quick: bool) -> list[Case]:
    """The shapes above, or the one that `overrides` give.

    Raises:
        UserError: there is no C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        raise UserError(f"torch.compile needs a C++ compiler and {compiler} is not there: install g++, or set CXX")
    crew = CrewSize(1, threads=cores())
    return [
        Case(
            name=describe(config),
            config=config,
            ways={COMPILED: crew, EAGER: crew},
            comparisons=(Comparison(own=COMPILED, peer=EAGER),),
            same_losses=frozenset({COMPILED, EAGER}),
        )
        for config in configurations(SHAPES, overrides, quick)
    ]


def build(way: str, config: Config, world: World) -> Trial:
    """The one rank's part of one way."""
    mesh = build_mesh(Layout(1, 1, 1), world.device)
    parallel = replace(config.parallel, compile="always" if way == COMPILED else "never")
    model = build_model(config.model, parallel, mesh, world.device, config.seed)
    return Trial(OwnTraining(model, config, own_rows(config, mesh), world).step)
