"""Initial values, keyed by (seed, parameter name).

A parameter's value does not depend on which others exist, on the order they are made in, or on how they are
sharded.
"""

import hashlib
import math

import torch

from dist_lm.config.model import ModelConfig
from dist_lm.model.transformer import Transformer

RESIDUAL_PROJECTIONS = ("attention.output", "feed_forward.down.weight")
"""What writes to the residual stream: 2 a layer, so it is scaled by depth (Radford et al. 2019, 2.3)."""

SCALAR_HEAD = "scalar_head.weight"


def initial_value(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> torch.Tensor:
    """The full logical value of one parameter, fp32 on the CPU.

    Biases are 0, norm weights 1, gains of queries `first_gain`, the rest normal with standard deviation `init_std`,
    divided by sqrt(2 n_layers) for projections onto the residual stream; a scalar head has 1 / sqrt(d_model + 1)
    (Stiennon et al. 2020).
    """
    if name.endswith("bias"):
        return torch.zeros(shape)
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith("query_gain"):
        return torch.full(shape, first_gain(config))
    std = config.init_std
    if name.endswith(RESIDUAL_PROJECTIONS):
        std /= math.sqrt(2 * config.n_layers)
    if name == SCALAR_HEAD:
        std = 1 / math.sqrt(config.d_model + 1)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.empty(shape).normal_(0, std, generator=generator)


def first_gain(config: ModelConfig) -> float:
    """The gain of a query that lets a head pick one of all tokens of a sequence: log2(L^2 - L) times the cosine (Henry
    et al. 2020, equation 5); here of products whose largest is d_head, divided by sqrt(d_head)."""
    longest = max(config.max_seq_len, 2)
    return math.log2(longest**2 - longest) / math.sqrt(config.d_head)


@torch.no_grad()
def initialise(model: Transformer, seed: int) -> None:
    """Fill an unsharded model in place."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, tuple(parameter.shape), model.config, seed))
