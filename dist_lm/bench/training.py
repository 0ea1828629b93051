"""Benchmarks of the training step: FSDP, activation checkpointing and torch.compile, each against its alternatives.

FSDP: two ranks of one thread against one process with two threads, on the same global batch. Ceiling: two ranks that
each train a whole model on their half of the batch and send no gradients. (On CUDA: two GPUs against one.)

CHECKPOINTING: `parallel.activation_checkpointing` none, selective and full under FSDP on two ranks, and fairscale's
`checkpoint_wrapper` in place of full, which recomputes whole blocks too: step time, and the peak memory of forward and
backward beyond parameters and optimizer state.

COMPILE: torch.compile of each block against eager, in one process with all cores. (On CUDA: on one GPU, in bf16 with
flash attention, as a user's run.)
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from fairscale.nn.checkpoint import checkpoint_wrapper

from dist_lm.bench.case import AS_USED, Benchmark, Case, Comparison, GroupSize, configurations, describe
from dist_lm.bench.models import initial_model
from dist_lm.bench.rank import OwnTraining, Trial, own_rows, peak_mib
from dist_lm.config.cluster import ParallelConfig
from dist_lm.config.root import Config
from dist_lm.errors import UserError
from dist_lm.parallel.layout import Layout
from dist_lm.parallel.mesh import World, build_mesh
from dist_lm.parallel.sharding import build_model
from dist_lm.storage.process import cores

RANKS = 2
PAIR = GroupSize(RANKS)
NANO, TINY = ("model=nano",), ("model=tiny", "model.vocab_size=4096")
WIDE = ("model=tiny", "model.d_model=512", "model.d_ff=2048", "model.n_heads=8", "model.vocab_size=4096")

SHARDED, ONE, ALONE = "fsdp", "one process", "each alone"
NONE, SELECTIVE, FULL, FAIRSCALE = "none", "selective", "full", "full by fairscale"
PEAK = "peak MiB"
COMPILED, EAGER = "compiled", "eager"


def _batch(sequences: int, tokens: int) -> tuple[str, ...]:
    return (f"stage.global_batch={sequences}", f"stage.seq_len={tokens}")


def _case(
    config: Config, variants: Mapping[str, GroupSize], comparisons: Sequence[Comparison], *different: str
) -> Case:
    """Makes a case; the variants named in `different` compute something else, so their losses are not compared."""
    return Case(describe(config), config, variants, comparisons, frozenset(variants) - set(different))


def _training(config: Config, world: World, parallel: ParallelConfig | None = None) -> OwnTraining:
    """Builds our training step, sharded over all ranks by FSDP.

    Raises:
        ConfigError: bf16 is asked for on a GPU without it.
    """
    mesh = build_mesh(Layout(1, world.size, 1), world.device)
    model = build_model(config.model, parallel or config.parallel, mesh, world.device, config.seed)
    return OwnTraining(model, config, own_rows(config, mesh), world)


# --- FSDP ---


def _fsdp_cases(overrides: Sequence[str], quick: bool) -> list[Case]:
    variants = {SHARDED: PAIR, ONE: GroupSize(1, threads=RANKS), ALONE: PAIR}
    rows = [Comparison(variant=SHARDED, peer=ONE, peer_name=f"one process, {RANKS} threads", ceiling=ALONE)]
    shapes = [(*size, *_batch(4, 512)) for size in (NANO, TINY)]
    return [_case(config, variants, rows, ALONE) for config in configurations(shapes, overrides, quick)]


def _build_fsdp(variant: str, config: Config, world: World) -> Trial:
    if variant != ALONE:
        return Trial(_training(config, world).step)

    # The ceiling: each rank has a whole model and its part of the batch, and nothing is sent.
    mesh = build_mesh(Layout(1, world.size, 1), world.device)
    model = initial_model(config).to(world.device)
    return Trial(OwnTraining(model, config, own_rows(config, mesh), world).step)


FSDP = Benchmark(_fsdp_cases, _build_fsdp)


# --- activation checkpointing ---


def _checkpointing_cases(overrides: Sequence[str], quick: bool) -> list[Case]:
    """Returns cases of speed and peak memory of each method on two ranks, for three models or that of `overrides`.

    Raises:
        ConfigError, ArtefactError, UserError: as `compose_config`.
    """
    variants: dict[str, GroupSize] = dict.fromkeys((NONE, SELECTIVE, FULL, FAIRSCALE), PAIR)
    pairs = ((SELECTIVE, NONE), (FULL, NONE), (FULL, FAIRSCALE))
    rows = [Comparison(variant=method, peer=peer, fact=fact) for fact in (None, PEAK) for method, peer in pairs]
    shapes = [(*NANO, *_batch(8, 256)), (*TINY, *_batch(8, 256)), (*WIDE, *_batch(4, 256))]
    return [_case(config, variants, rows) for config in configurations(shapes, overrides, quick)]


def _build_checkpointing(variant: str, config: Config, world: World) -> Trial:
    """Builds a trial with the activation checkpointing `variant`, under FSDP; its fact is the peak memory of a forward
    and backward pass.

    Raises:
        ConfigError: bf16 is asked for on a GPU without it.
    """
    method = NONE if variant == FAIRSCALE else variant
    training = _training(config, world, replace(config.parallel, activation_checkpointing=method))
    if variant == FAIRSCALE:
        for block in training.model.blocks:
            # FSDP hooks around `forward`, so the model may be sharded before.
            checkpoint_wrapper(block)

    def facts() -> dict[str, float]:
        peak = peak_mib(training.forward_backward, world.device)
        training.optimizer.zero_grad(set_to_none=True)
        return {PEAK: peak}

    return Trial(training.step, facts)


CHECKPOINTING = Benchmark(_checkpointing_cases, _build_checkpointing)


# --- torch.compile ---


def _compile_cases(overrides: Sequence[str], quick: bool) -> list[Case]:
    """Returns cases of torch.compile against eager on all cores, for two models or that of `overrides`; `quick`: the
    first.

    Raises:
        UserError: there is no C++ compiler.
        ConfigError, ArtefactError, UserError: as `compose_config`.
    """
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        raise UserError(f"torch.compile needs a C++ compiler and {compiler} is not there: install g++, or set CXX")

    variants: dict[str, GroupSize] = dict.fromkeys((COMPILED, EAGER), GroupSize(1, threads=cores()))
    rows = [Comparison(variant=COMPILED, peer=EAGER)]
    shapes = [(AS_USED, *size, *batch) for size, batch in ((NANO, _batch(8, 256)), (TINY, _batch(4, 512)))]
    settings = [AS_USED, *overrides] if overrides else ()
    return [_case(config, variants, rows) for config in configurations(shapes, settings, quick)]


def compiled_as_used(variant: str, config: Config, device: torch.device) -> Config:
    """Returns the configuration of a variant; on CUDA with attention of packed documents, as a user's run has it."""
    # flash attention, which a user's run has on CUDA, wants the bounds of packed documents.
    mask = config.stage.document_mask or device.type == "cuda"
    mode = "always" if variant == COMPILED else "never"
    stage, parallel = replace(config.stage, document_mask=mask), replace(config.parallel, compile=mode)
    return replace(config, stage=stage, parallel=parallel)


def _build_compile(variant: str, config: Config, world: World) -> Trial:
    return Trial(_training(compiled_as_used(variant, config, world.device), world).step)


COMPILE = Benchmark(_compile_cases, _build_compile)
