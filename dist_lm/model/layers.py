"""The parts of a block besides attention: norms, rotary positions, the feed-forward network.

PyTorch computes the statistics of a norm in fp32, whatever the dtype of its input.

Dimensions: B sequences, T tokens, D d_model, H heads, K d_head, R entries of a head that RoPE rotates, F d_ff.
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses
from torch import nn

from dist_lm.config.model import ModelConfig

RopeTables = tuple[torch.Tensor, torch.Tensor]
"""(cos, sin), each (B or 1, T, 1, R); the first half of sin is negated."""


def build_adapters(config: ModelConfig, part: str) -> nn.ModuleDict | None:
    """The adapters of attention or feed_forward by the name of the weight (`dist_lm.model.lora`); None without."""
    if config.lora is None:
        return None
    from dist_lm.model import lora

    return lora.build_adapters(config, part)


def adapted(y: torch.Tensor, x: torch.Tensor, adapters: nn.ModuleDict | None, name: str) -> torch.Tensor:
    """`y`, the product of weight `name` with x, and the change of it by the adapter of the weight."""
    if adapters is None or name not in adapters or not adapters[name].is_on:
        return y
    return y + adapters[name](x)


def build_norm(config: ModelConfig) -> nn.Module:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019) over the residual stream."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.d_model, eps=config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)


class HeadNorm(nn.RMSNorm):
    """RMSNorm over d_head of every head, before the rotation, with one weight (K,) for all heads: the norm of queries
    and keys in Qwen3 (Yang et al. 2025)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.d_head, eps=config.norm_eps)
        self.norm_eps = config.norm_eps

    def forward(self, x_BTHK: torch.Tensor) -> torch.Tensor:
        return normalise_heads(x_BTHK, self.weight, self.norm_eps)


def normalise_heads(x_BTHK: torch.Tensor, weight_K: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension; `weight` broadcasts, so it may also differ by head: (H, K)."""
    if x_BTHK.is_cuda:
        return F.rms_norm(x_BTHK, x_BTHK.shape[-1:], eps=eps) * weight_K
    # the same in fewer passes: on a CPU, forward and backward take 60 % of the time of F.rms_norm
    wide = torch.promote_types(x_BTHK.dtype, torch.float32)
    length_BTH1 = torch.linalg.vector_norm(x_BTHK, dim=-1, keepdim=True, dtype=wide)
    scale_BTH1 = torch.rsqrt(length_BTH1.square() / x_BTHK.shape[-1] + eps).to(x_BTHK.dtype)
    return x_BTHK * scale_BTH1 * weight_K


def rope_tables(position_BT: torch.Tensor, config: ModelConfig, dtype: torch.dtype) -> RopeTables:
    """Angles `position * base^(-2i/R)`, computed in fp32, as tables in `dtype`.

    Rotary position embedding (Su et al. 2021, equation 34) in the half-rotation form: pairs are (i, i + R/2).
    """
    width = config.rotary_width
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device=position_BT.device) / width
    frequency = 1.0 / config.rope_base**exponent
    if config.rope_scaling != "none":
        frequency = scaled(frequency, config)
    angle = position_BT[..., None, None].float() * frequency
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def scaled(frequency: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Frequencies, in radians per token, under `model.rope_scaling`."""
    if config.rope_scaling == "linear":
        return frequency / config.rope_factor
    periods = config.rope_original_len / (2 * math.pi / frequency)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    kept = ((periods - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequency / config.rope_factor + kept * frequency


def rotate(x_BTHK: torch.Tensor, tables: RopeTables) -> torch.Tensor:
    """`x * cos + cat(-x2, x1) * sin` of the first R entries of every head; the table holds the minus sign."""
    cos, signed_sin = tables
    width = cos.shape[-1]
    if width < x_BTHK.shape[-1]:
        return torch.cat((rotate(x_BTHK[..., :width], tables), x_BTHK[..., width:]), dim=-1)
    return torch.addcmul(x_BTHK * cos, x_BTHK.roll(x_BTHK.shape[-1] // 2, dims=-1), signed_sin)


def mix_values(v: torch.Tensor, first: torch.Tensor, mix_2: torch.Tensor) -> torch.Tensor:
    """`a v + b v_1` of a layer and the first one, with `mix` = (a, b): value residual learning (Zhou et al. 2024, arXiv
    2410.17897, equation 4)."""
    own, of_first = mix_2.unbind()
    return v * own + first * of_first


class FeedForward(nn.Module):
    """`down(gelu(up(x)))` with exact (erf) GELU, the same with squared ReLU, or SwiGLU (Shazeer 2020)
    `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        gated, self.squared = config.ffn == "swiglu", config.ffn == "relu2"
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=config.bias) if gated else None
        self.up = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=config.bias)
        self.adapters = build_adapters(config, "feed_forward")

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        gate_BTF = None if self.gate is None else adapted(self.gate(x_BTD), x_BTD, self.adapters, "gate")
        h_BTF = activate(adapted(self.up(x_BTD), x_BTD, self.adapters, "up"), gate_BTF, self.squared)
        return adapted(self.down(h_BTF), h_BTF, self.adapters, "down")


def activate(up_BTF: torch.Tensor, gate_BTF: torch.Tensor | None, squared: bool = False) -> torch.Tensor:
    """Hidden units after the activation; 0 where both tensors are 0.

    Args:
        squared: squared ReLU in place of GELU.
    """
    if gate_BTF is not None:
        return F.silu(gate_BTF) * up_BTF
    return F.relu(up_BTF).square() if squared else F.gelu(up_BTF)


def capped(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """Logits between -cap and cap; unchanged if `cap` is 0."""
    return cap * torch.tanh(logits / cap) if cap else logits
