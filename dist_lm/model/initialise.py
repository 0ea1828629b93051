"""Initial values of parameters, keyed by (seed, parameter name).

The value of a parameter does not depend on the other parameters, on the order of creation, or on the sharding.
"""

import hashlib
import math

import torch

from dist_lm.config.model import ModelConfig
from dist_lm.model.transformer import Transformer

RESIDUAL_PROJECTIONS = ("attention.output", "feed_forward.down.weight")
"""Projections onto the residual stream, two per layer: their scale falls with depth (Radford et al. 2019, 2.3)."""

SCALAR_HEAD = "scalar_head.weight"


def initial_value(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> torch.Tensor:
    """The whole value of one parameter, fp32 on the CPU, of logical `shape`.

    Biases are 0 and norm weights 1. Other parameters are normal with standard deviation `init_std`, divided by
    sqrt(2 n_layers) for projections onto the residual stream; a scalar head has 1 / sqrt(d_model + 1) (Stiennon et al.
    2020).
    """
    if name.endswith("bias"):
        return torch.zeros(shape)
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    std = config.init_std
    if name.endswith(RESIDUAL_PROJECTIONS):
        std /= math.sqrt(2 * config.n_layers)
    if name == SCALAR_HEAD:
        std = 1 / math.sqrt(config.d_model + 1)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.empty(shape).normal_(0, std, generator=generator)


@torch.no_grad()
def initialise(model: Transformer, seed: int) -> None:
    """Fill an unsharded model in place."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, tuple(parameter.shape), model.config, seed))
