"""The parts of a block besides attention: norms, rotary positions, the feed-forward network.

PyTorch computes the statistics of a norm in fp32, whatever the dtype of its input.

Dimensions: B sequences, T tokens, S keys, D d_model, H heads, G key/value heads, K d_head, R entries of a head that
RoPE rotates, F d_ff.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses
from torch import nn

from dist_lm.config.model import ModelConfig
from dist_lm.model.lora import AdapterDropout, adapted, build_adapters
from dist_lm.model.quantised import QuantisedLinear

RopeTables = tuple[torch.Tensor, torch.Tensor]
"""(cos, sin), each (B or 1, T, 1, R); the first half of sin is negated."""


def build_norm(config: ModelConfig) -> nn.Module:
    """Builds LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019) over the residual stream."""
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


class AllHeadsNorm(nn.Module):
    """RMSNorm over all heads of queries, or of keys, before the rotation, with a weight (H, K) for each entry: the norm
    of OLMo 2 (OLMo Team 2024)."""

    def __init__(self, config: ModelConfig, n_heads: int) -> None:
        super().__init__()
        self.norm_eps = config.norm_eps
        self.n_entries = n_heads * config.d_head
        self.weight = nn.Parameter(torch.ones(n_heads, config.d_head))

    def forward(self, x_BTHK: torch.Tensor) -> torch.Tensor:
        return self.normalise(x_BTHK, square_sum(x_BTHK), self.weight)

    def normalise(self, x_BTHK: torch.Tensor, sum_BT11: torch.Tensor, weight_HK: torch.Tensor) -> torch.Tensor:
        """Returns x, normalised over all heads, in its shape and dtype.

        Args:
            sum_BT11: the sum of squares over all heads, also those of other ranks.
            weight_HK: of the heads in x.
        """
        scale_BT11 = torch.rsqrt(sum_BT11 / self.n_entries + self.norm_eps)
        return x_BTHK * scale_BT11.to(x_BTHK.dtype) * weight_HK


def square_sum(x_BTHK: torch.Tensor) -> torch.Tensor:
    """Returns the sum of squares over heads and their entries, at least fp32: (B, T, 1, 1)."""
    wide = torch.promote_types(x_BTHK.dtype, torch.float32)
    return x_BTHK.to(wide).square().sum(dim=(-2, -1), keepdim=True)


def build_head_norms(config: ModelConfig) -> tuple[nn.Module, nn.Module]:
    """Builds the norms of queries and of keys that `model.qk_norm_span` names."""
    if config.qk_norm_span == "all":
        return AllHeadsNorm(config, config.n_heads), AllHeadsNorm(config, config.kv_heads)
    return HeadNorm(config), HeadNorm(config)


def normalise_heads(x_BTHK: torch.Tensor, weight_K: torch.Tensor, eps: float) -> torch.Tensor:
    """Returns RMSNorm over the last dimension, in the dtype of x, times `weight`, which broadcasts: (K,), or (H, K) if
    it differs by head."""
    if x_BTHK.is_cuda:
        return F.rms_norm(x_BTHK, x_BTHK.shape[-1:], eps=eps) * weight_K

    # The same in fewer passes: on a CPU, forward and backward take 60 % of the time of F.rms_norm.
    wide = torch.promote_types(x_BTHK.dtype, torch.float32)
    length_BTH1 = torch.linalg.vector_norm(x_BTHK, dim=-1, keepdim=True, dtype=wide)
    scale_BTH1 = torch.rsqrt(length_BTH1.square() / x_BTHK.shape[-1] + eps).to(x_BTHK.dtype)
    return x_BTHK * scale_BTH1 * weight_K


def rope_tables(position_BT: torch.Tensor, config: ModelConfig, dtype: torch.dtype) -> RopeTables:
    """Returns cos and sin of the angles `position * base^(-2i/R)`, with `model.rope_scaling`, computed in fp32, in
    `dtype`.

    Rotary position embedding (Su et al. 2021, equation 34) in the half-rotation form: pairs are (i, i + R/2).

    Args:
        position_BT: int64; (1, T) if all sequences have the same positions.
    """
    width = config.rotary_width
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device=position_BT.device) / width
    frequency = 1.0 / config.rope_base**exponent
    if config.rope_scaling != "none":
        frequency = scaled_frequency(frequency, config)

    # Angles grow with the position, so bf16 could not tell late positions from each other: cast only the tables.
    angle = position_BT[..., None, None].float() * frequency
    cos, sin = angle.cos(), angle.sin()
    if config.rope_scaling == "yarn":
        cos, sin = cos * config.attention_factor, sin * config.attention_factor
    cos, sin = cos.to(dtype), sin.to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def scaled_frequency(frequency: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Returns the frequencies, in radians per token, that `model.rope_scaling` (not none) makes of `frequency`.

    linear: all are divided by the factor (Chen et al. 2023). llama3: only the low ones are, with a linear transition
    (Grattafiori et al. 2024; `config.model.ModelConfig` has the details). yarn: see `_yarn_share`.
    """
    if config.rope_scaling == "linear":
        return frequency / config.rope_factor
    if config.rope_scaling == "yarn":
        unscaled_share = _yarn_share(config, frequency.device)
        return (1 - unscaled_share) * frequency / config.rope_factor + unscaled_share * frequency
    periods = config.rope_original_len / (2 * math.pi / frequency)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    unscaled_share = ((periods - low) / (high - low)).clamp(0, 1)
    return (1 - unscaled_share) * frequency / config.rope_factor + unscaled_share * frequency


def _yarn_share(config: ModelConfig, device: torch.device) -> torch.Tensor:
    """Returns how much of each frequency YaRN keeps (Peng et al. 2023, section 3.2).

    It is 1 for pairs of entries up to the one that turns `rope_beta_fast` times in `rope_original_len` tokens, 0 from
    that of `rope_beta_slow` on, and linear between them.
    """
    width = config.rotary_width

    def pair_with(turns: float) -> float:
        return width * math.log(config.rope_original_len / (turns * 2 * math.pi)) / (2 * math.log(config.rope_base))

    first, last = pair_with(config.rope_beta_fast), pair_with(config.rope_beta_slow)
    if config.rope_truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    if first == last:
        last += 0.001  # as in transformers: a step

    pair = torch.arange(width // 2, dtype=torch.float32, device=device)
    return 1 - ((pair - first) / (last - first)).clamp(0, 1)


def rotate(x_BTHK: torch.Tensor, tables: RopeTables) -> torch.Tensor:
    """Returns `x * cos + cat(-x2, x1) * sin` for the first R entries of every head, in the shape of x; the others stay.
    The table holds the minus sign."""
    cos, signed_sin = tables
    width = cos.shape[-1]
    if width < x_BTHK.shape[-1]:
        return torch.cat((rotate(x_BTHK[..., :width], tables), x_BTHK[..., width:]), dim=-1)
    # One roll and one addcmul take fewer passes than splitting each head in two and concatenating.
    return torch.addcmul(x_BTHK * cos, x_BTHK.roll(x_BTHK.shape[-1] // 2, dims=-1), signed_sin)


def mix_values(v_BSGK: torch.Tensor, v1_BSGK: torch.Tensor, mix_2: torch.Tensor) -> torch.Tensor:
    """Returns `a v + b v_1` for the values of a layer and of the first layer, with `mix` = (a, b): value residual
    learning (Zhou et al. 2024, arXiv 2410.17897, equation 4)."""
    a, b = mix_2.unbind()
    return v_BSGK * a + v1_BSGK * b


class FeedForward(nn.Module):
    """Computes `down(f(up(x)))`, or with a gate (Shazeer 2020) `down(f(gate(x)) * up(x))`; `model.ffn` names f, see
    `ACTIVATIONS`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ffn = config.ffn
        # The order of modules is the order of parameters in checkpoints, and in weights that are streamed to engines
        # (`size.parameter_shapes`).
        linear = nn.Linear
        if config.is_in_4bit:
            linear = cast(type[nn.Linear], QuantisedLinear)  # with the same attributes
        self.gate = None
        if config.is_gated:
            self.gate = linear(config.d_model, config.d_ff, bias=config.has_ffn_bias)
        self.up = linear(config.d_model, config.d_ff, bias=config.has_ffn_bias)
        self.down = linear(config.d_ff, config.d_model, bias=config.has_ffn_bias)
        self.adapters = build_adapters(config, "feed_forward")

    def forward(self, x_BTD: torch.Tensor, dropout: AdapterDropout = None) -> torch.Tensor:
        """Returns the output, (B, T, D). `dropout`: of the inputs of adapters."""
        gate_BTF = None
        if self.gate is not None:
            gate_BTF = adapted(self.gate(x_BTD), x_BTD, self.adapters, "gate", dropout)
        up_BTF = adapted(self.up(x_BTD), x_BTD, self.adapters, "up", dropout)
        h_BTF = activate(up_BTF, gate_BTF, self.ffn)
        return adapted(self.down(h_BTF), h_BTF, self.adapters, "down", dropout)


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """Returns the square of ReLU (So et al. 2021)."""
    return F.relu(x).square()


ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": squared_relu,
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": partial(F.gelu, approximate="tanh"),
}
"""Activations by `model.ffn`; all are 0 at 0. GELU (Hendrycks & Gimpel 2016) is exact (erf), or by tanh."""


def activate(up_BTF: torch.Tensor, gate_BTF: torch.Tensor | None, ffn: str) -> torch.Tensor:
    """Returns hidden units (B, T, F) after the activation of `model.ffn`; 0 where both tensors are 0, so padded units
    stay 0.

    Args:
        gate_BTF: None: the network has no gate.
    """
    if gate_BTF is not None:
        return ACTIVATIONS[ffn](gate_BTF) * up_BTF
    return ACTIVATIONS[ffn](up_BTF)


def capped(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """Returns logits between -cap and cap: `cap * tanh(logits / cap)`; unchanged if `cap` is 0."""
    if not cap:
        return logits
    return cap * torch.tanh(logits / cap)
