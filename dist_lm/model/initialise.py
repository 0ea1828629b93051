"""Initial values, keyed by (seed, parameter name).

A parameter's value does not depend on which others exist, on the order they are made in, or on how they are
sharded.
"""

import hashlib
import math

import torch

from dist_lm.config import ModelConfig
from dist_lm.model.transformer import Transformer

RESIDUAL_PROJECTIONS = ("attention.output", "feed_forward.down.weight")
"""What writes to the residual stream: 2 a layer, so it is scaled by depth (Radford et al. 2019, 2.3)."""
OUTPUT, VALUE = "attention.output", "attention.value"
MIRROR_GAIN = 2.0


def initial_value(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> torch.Tensor:
    """The full logical value of one parameter, fp32 on the CPU.

    Biases are 0, norm weights 1, the rest normal with standard deviation `init_std`, divided by sqrt(2
    n_layers) for projections onto the residual stream.

    With `init=mirrored` the output projection of attention is that of its values times `MIRROR_GAIN`: over all heads
    their product is about a multiple of the identity, so that a head passes on what it looks at from the start. After
    'mimetic initialization' (Trockman and Kolter 2023, section 4), of which this is the half that helps to copy.
    """
    if config.init == "mirrored" and name.endswith(OUTPUT):
        value = initial_value(name.replace(OUTPUT, VALUE), (config.kv_heads, *shape[1:]), config, seed)
        return value.repeat_interleave(config.n_heads // config.kv_heads, dim=0) * MIRROR_GAIN
    if name.endswith("bias"):
        return torch.zeros(shape)
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    std = config.init_std
    if name.endswith(RESIDUAL_PROJECTIONS):
        std /= math.sqrt(2 * config.n_layers)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.empty(shape).normal_(0, std, generator=generator)


@torch.no_grad()
def initialise(model: Transformer, seed: int) -> None:
    """Fill an unsharded model in place."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, tuple(parameter.shape), model.config, seed))
