"""The engine that draws the rollouts of stage `rlhf`: of each actor, or in the first rank."""

from dataclasses import replace

import torch

from dist_lm.cluster.pool_actor import EngineSpec
from dist_lm.generation.decoder import Weights
from dist_lm.generation.engine import Engine
from dist_lm.generation.grammar import Grammars
from dist_lm.generation.paged_cache import BLOCK
from dist_lm.stages.pool_start import engine_spec
from dist_lm.stages.rlhf.config import RlhfRunConfig
from dist_lm.tokenizer.tokenizer import Tokenizer


def rollout_spec(config: RlhfRunConfig, tokenizer: Tokenizer, dtype: torch.dtype, device: torch.device) -> EngineSpec:
    """Returns the specification of the engine."""
    needs_texts = bool(config.stage.eval_tasks)
    spec = engine_spec(config, config.pool, tokenizer, dtype, device, needs_texts)
    if config.rlhf.constraint:
        spec = replace(spec, tokenizer_file=tokenizer.file_content)
    if config.rlhf.environment and spec.options.page_tokens % BLOCK == 0 and spec.options.piece_tokens % BLOCK == 0:
        # A turn begins on the pages of the turns before.
        spec = replace(spec, options=replace(spec.options, prefix_cache=True))
    return spec


def local_engine(
    config: RlhfRunConfig, spec: EngineSpec, tokenizer: Tokenizer, weights: Weights, device: torch.device
) -> Engine:
    """Returns the engine in this process.

    Args:
        weights: a stream of them is read to its end.

    Raises:
        ArtefactError: the weights do not fit the model.
    """
    return Engine(
        spec.model,
        weights,
        eot_id=spec.eot_id,
        vocabulary=spec.vocabulary,
        options=spec.options,
        dtype=spec.dtype,
        device=device,
        grammars=Grammars(lambda: tokenizer) if config.rlhf.constraint else None,
    )
