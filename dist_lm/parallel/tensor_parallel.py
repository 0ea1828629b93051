"""The transformer over tensor-parallel ranks: each takes some heads, some hidden units, some of the vocabulary.

Parameters are DTensors on the tp axis, with zeros after the last head (hidden unit, piece) so that every rank holds as
many; a module computes with its shard, and what is padded never reaches a result: it keeps a gradient of zero and stays
zero. The modules have the parameter names of the plain ones.

Dimensions: B sequences, T tokens, D d_model, H query heads, G key/value heads, K d_head, F d_ff (all of this rank).
"""

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses
from torch import nn

from dist_lm.config.model import ModelConfig
from dist_lm.model.attention import Attention, Visibility, attend, from_heads, to_heads
from dist_lm.model.feed_forward import FeedForward, activate
from dist_lm.model.norm import build_norm
from dist_lm.model.rope import RopeTables, rotate
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.cross_entropy import vocab_parallel_logprobs_and_entropy, vocab_parallel_losses
from dist_lm.parallel.placement import Slice, keys_of, slice_of
from dist_lm.parallel.tensor_axis import TensorAxis, local


class TensorParallelTransformer(Transformer):
    """`Transformer` whose layers are shared by the ranks of a `TensorAxis`."""

    def __init__(self, config: ModelConfig, axis: TensorAxis, partial: list[str]) -> None:
        """
        Args:
            partial: names of the parameters whose gradients have to be summed over the axis.
        """
        super().__init__(config)
        self.axis = axis
        self.partial = partial
        self.pieces = slice_of(config.vocab_size, axis.size, axis.rank)
        self.embedding = VocabParallelEmbedding(config, axis)
        for layer, block in enumerate(self.blocks):
            block.attention = HeadParallelAttention(config, layer, axis)
            block.feed_forward = WidthParallelFeedForward(config, axis)
            block.attention_norm = ReplicatedNorm(config)
            block.feed_forward_norm = ReplicatedNorm(config)
        self.final_norm = ReplicatedNorm(config)

    def head(self, x_BTD: torch.Tensor) -> torch.Tensor:
        raise TypeError("logits are never whole under tensor parallelism: use token_losses, or an unsharded copy")

    @property
    def head_weight(self) -> torch.Tensor:
        """This rank's pieces, padding included: ranks that count chunks of the loss have to count alike."""
        return local(super().head_weight)

    def head_input(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.axis.enter(x_BTD)

    @property
    def scalar_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The only row is the first rank's; of the others, which hold padding, nothing is taken."""
        assert self.scalar_head is not None
        rows = slice_of(1, self.axis.size, self.axis.rank).real
        return local(self.scalar_head.weight)[:rows].sum(0), local(self.scalar_head.bias)

    @property
    def holds_all_tokens(self) -> bool:
        return not self.axis.sp

    def sum_of_parts(self, part: torch.Tensor) -> torch.Tensor:
        return self.axis.sum(part)

    def losses_of_logits(
        self, logits_NV: torch.Tensor, targets_N: torch.Tensor, label_smoothing: float, z_loss: float
    ) -> torch.Tensor:
        own_NV = logits_NV[:, : self.pieces.real]
        return vocab_parallel_losses(
            own_NV, targets_N, self.pieces, self.config.vocab_size, self.axis, label_smoothing, z_loss
        )

    def logprobs_and_entropy_of_logits(
        self, logits_NV: torch.Tensor, targets_N: torch.Tensor, temperature: float, entropy_gradient: bool
    ) -> torch.Tensor:
        own_NV = logits_NV[:, : self.pieces.real]
        return vocab_parallel_logprobs_and_entropy(
            own_NV, targets_N, self.pieces, self.axis, temperature, entropy_gradient
        )

    def first_token(self, n_tokens: int) -> int:
        return self.axis.first_token(n_tokens)


class VocabParallelEmbedding(nn.Embedding):
    """Each rank looks up the pieces it holds."""

    def __init__(self, config: ModelConfig, axis: TensorAxis) -> None:
        super().__init__(config.vocab_size, config.d_model)
        self.axis = axis
        self.pieces = slice_of(config.vocab_size, axis.size, axis.rank)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        self.axis.check_current()  # here a forward pass begins
        row_BT = tokens_BT - self.pieces.start
        held_BT = (row_BT >= 0) & (row_BT < self.pieces.real)
        part_BTD = F.embedding(row_BT.where(held_BT, 0), local(self.weight))
        return self.axis.leave(part_BTD * held_BT[..., None])


class ReplicatedNorm(nn.Module):
    """The norm of the model, with weights that all ranks hold."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        norm = build_norm(config)
        self.rms, self.shape, self.eps = isinstance(norm, nn.RMSNorm), [config.d_model], config.norm_eps
        self.weight = nn.Parameter(torch.empty(config.d_model))
        self.bias = nn.Parameter(torch.empty(config.d_model)) if getattr(norm, "bias", None) is not None else None

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        if self.rms:
            return F.rms_norm(x_BTD, self.shape, local(self.weight), self.eps)
        return F.layer_norm(
            x_BTD, self.shape, local(self.weight), None if self.bias is None else local(self.bias), self.eps
        )


class HeadParallelAttention(Attention):
    """Each rank attends with its query heads."""

    def __init__(self, config: ModelConfig, layer: int, axis: TensorAxis) -> None:
        super().__init__(config, layer)
        self.axis = axis
        self.heads = slice_of(config.n_heads, axis.size, axis.rank)
        self.keys, self.queries_of_key = keys_of(config, axis.size, axis.rank)

    def forward(
        self,
        x_BTD: torch.Tensor,
        rope: RopeTables,
        visibility: Visibility,
    ) -> torch.Tensor:
        x_BTD = self.axis.enter(x_BTD)
        q_BTHK = to_heads(x_BTD, local(self.query), bias_of(self.query_bias, self.heads))
        k_BSGK = to_heads(x_BTD, self._key_rows(self.key), bias_of(self.key_bias, self.keys))
        v_BSGK = to_heads(x_BTD, self._key_rows(self.value), bias_of(self.value_bias, self.keys))
        if self.query_gain is not None:
            q_BTHK, k_BSGK = self.by_direction(q_BTHK, k_BSGK, part_of(self.query_gain, self.heads))
        k_BSGK = rotate(k_BSGK, rope)
        if self.queries_of_key:
            k_BSGK, v_BSGK = (_repeated(heads, self.queries_of_key) for heads in (k_BSGK, v_BSGK))
        o_BTHK = attend(rotate(q_BTHK, rope), k_BSGK, v_BSGK, visibility)
        real = self.heads.real
        part_BTD = from_heads(o_BTHK[:, :, :real], local(self.output)[:real], None)
        return with_bias(self.axis.leave(part_BTD), self.output_bias)

    def _key_rows(self, weight: torch.Tensor) -> torch.Tensor:
        """This rank's key (or value) heads (G, K, D): its shard, or, where all ranks hold all, those it reads."""
        held = local(weight)
        return held if held.shape[0] == self.keys.held else held[self.keys.start : self.keys.stop]


class WidthParallelFeedForward(FeedForward):
    """Each rank computes its hidden units."""

    def __init__(self, config: ModelConfig, axis: TensorAxis) -> None:
        super().__init__(config)
        self.axis = axis
        self.units = slice_of(config.d_ff, axis.size, axis.rank)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x_BTD = self.axis.enter(x_BTD)
        gate_BTF = None if self.gate is None else self._project(x_BTD, self.gate)
        h_BTF = activate(self._project(x_BTD, self.up), gate_BTF)
        part_BTD = F.linear(h_BTF, local(self.down.weight)[:, : self.units.real])
        return with_bias(self.axis.leave(part_BTD), self.down.bias)

    def _project(self, x_BTD: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        bias_F = None if layer.bias is None else local(layer.bias)[self.units.start : self.units.stop]
        return F.linear(x_BTD, local(layer.weight)[: self.units.real], bias_F)


def _repeated(heads_BSGK: torch.Tensor, times: list[int]) -> torch.Tensor:
    """Key head g `times[g]` times over: (B, S, H, K)."""
    return torch.cat([heads_BSGK[:, :, g : g + 1].expand(-1, -1, n, -1) for g, n in enumerate(times)], dim=2)


def bias_of(bias: torch.Tensor | None, part: Slice) -> torch.Tensor | None:
    """A rank's rows of a bias (heads, K) that all ranks hold, zeros for padded heads."""
    return None if bias is None else part_of(bias, part)


def part_of(value: torch.Tensor, part: Slice) -> torch.Tensor:
    """A rank's rows of what all ranks hold, zeros for padded ones."""
    rows = local(value)[part.start : part.stop]
    missing = part.held - part.real
    return F.pad(rows, (*[0] * (2 * rows.dim() - 1), missing)) if missing else rows


def with_bias(x_BTD: torch.Tensor, bias_D: torch.Tensor | None) -> torch.Tensor:
    """Added after the parts are summed, so once."""
    return x_BTD if bias_D is None else x_BTD + local(bias_D)
