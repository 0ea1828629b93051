"""Activation checkpointing under FSDP on two ranks: the time of a step and the peak memory of its passes.

`parallel.activation_checkpointing` none, selective and full; and in place of full fairscale's `checkpoint_wrapper`,
which recomputes a whole block too. The peak is what forward and backward hold beyond parameters and optimizer state.
"""

from collections.abc import Sequence
from dataclasses import replace

from fairscale.nn.checkpoint import checkpoint_wrapper

from dist_lm.bench.case import Case, Comparison, CrewSize, configurations, describe
from dist_lm.bench.trial import OwnTraining, Trial, own_rows, peak_mib
from dist_lm.config.root import Config
from dist_lm.parallel.layout import Layout
from dist_lm.parallel.mesh import World, build_mesh
from dist_lm.parallel.sharding import build_model

RANKS = 2
NONE, SELECTIVE, FULL, FAIRSCALE = "none", "selective", "full", "full by fairscale"
PEAK = "peak MiB"
SHAPES = (
    ("model=nano", "stage.global_batch=8", "stage.seq_len=256"),
    ("model=tiny", "model.vocab_size=4096", "stage.global_batch=8", "stage.seq_len=256"),
    (
        "model=tiny",
        "model.d_model=512",
        "model.d_ff=2048",
        "model.n_heads=8",
        "model.vocab_size=4096",
        "stage.global_batch=4",
        "stage.seq_len=256",
    ),
)
PAIRS = ((SELECTIVE, NONE), (FULL, NONE), (FULL, FAIRSCALE))


def cases(overrides: Sequence[str], quick: bool) -> list[Case]:
    """The shapes above, or the one that `overrides` give."""
    ways = {way: CrewSize(RANKS) for way in (NONE, SELECTIVE, FULL, FAIRSCALE)}
    return [
        Case(
            name=describe(config),
            config=config,
            ways=ways,
            comparisons=tuple(
                Comparison(own=own, peer=peer, fact=fact) for fact in (None, PEAK) for own, peer in PAIRS
            ),
            same_losses=frozenset(ways),
        )
        for config in configurations(SHAPES, overrides, quick)
    ]


def build(way: str, config: Config, world: World) -> Trial:
    """A rank's part of one way."""
    mesh = build_mesh(Layout(1, world.size, 1), world.device)
    parallel = replace(config.parallel, activation_checkpointing=NONE if way == FAIRSCALE else way)
    model = build_model(config.model, parallel, mesh, world.device, config.seed)
    if way == FAIRSCALE:
        for block in model.blocks:
            checkpoint_wrapper(block)  # FSDP works by hooks around `forward`, so it may come before
    training = OwnTraining(model, config, own_rows(config, mesh), world)

    def facts() -> dict[str, float]:
        peak = peak_mib(training.forward_backward, world.device)
        training.optimizer.zero_grad(set_to_none=True)
        return {PEAK: peak}

    return Trial(training.step, facts)
