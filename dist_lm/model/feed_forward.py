"""The feed-forward network of a block.

Dimensions: B sequences, T tokens, D d_model, F d_ff.
"""

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses
from torch import nn

from dist_lm.config.model import ModelConfig


class FeedForward(nn.Module):
    """`down(gelu(up(x)))` with exact (erf) GELU, or SwiGLU (Shazeer 2020) `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        gated = config.ffn == "swiglu"
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=config.bias) if gated else None
        self.up = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        gate_BTF = None if self.gate is None else self.gate(x_BTD)
        return self.down(activate(self.up(x_BTD), gate_BTF))


def activate(up_BTF: torch.Tensor, gate_BTF: torch.Tensor | None) -> torch.Tensor:
    """What the hidden units pass on; 0 where both arguments are 0."""
    return F.gelu(up_BTF) if gate_BTF is None else F.silu(gate_BTF) * up_BTF
