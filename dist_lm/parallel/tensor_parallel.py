"""The transformer over tensor-parallel ranks: each rank has some heads, some hidden units and some of the vocabulary.

Parameters are DTensors on the tp axis. Zeros after the last head (hidden unit, piece) make all shards equally large. A
module computes with its local shard. Padding never reaches a result, so its gradient is zero and it stays zero. The
parameter names are those of the plain model.

The loss needs one small message: no rank sees the logits of another.

Dimensions: B sequences, T tokens, N = B * T, D d_model, V pieces, H query heads, G key/value heads, K d_head, F d_ff
(V, H, G and F are those of this rank).
"""

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses
from fairscale.nn.model_parallel.mappings import gather_from_model_parallel_region
from torch import nn

from dist_lm.config.model import ModelConfig
from dist_lm.model.attention import Attention, Visibility, attend, from_heads, to_heads
from dist_lm.model.cross_entropy import tempered
from dist_lm.model.layers import (
    FeedForward,
    HeadNorm,
    RopeTables,
    activate,
    adapted,
    build_norm,
    normalise_heads,
    rotate,
)
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.layout import Slice, keys_of, shards_key_heads, slice_of
from dist_lm.parallel.tensor_axis import TensorAxis, local


class TensorParallelTransformer(Transformer):
    """`Transformer` whose layers are shared by the ranks of a `TensorAxis`."""

    def __init__(self, config: ModelConfig, axis: TensorAxis, partial: list[str]) -> None:
        """
        Args:
            partial: names of the parameters whose gradients must be summed over the axis.
        """
        super().__init__(config)
        self.axis = axis
        self.partial = partial
        self.pieces = slice_of(config.vocab_size, axis.size, axis.rank)
        self.embedding = VocabParallelEmbedding(config, axis)
        for layer, block in enumerate(self.blocks):
            block.attention = HeadParallelAttention(config, axis, layer)
            block.feed_forward = WidthParallelFeedForward(config, axis)
            block.attention_norm = ReplicatedNorm(config)
            block.feed_forward_norm = ReplicatedNorm(config)
        self.final_norm = ReplicatedNorm(config)

    def head(self, x_BTD: torch.Tensor) -> torch.Tensor:
        raise TypeError("logits are never whole under tensor parallelism: use token_losses, or an unsharded copy")

    @property
    def head_weight(self) -> torch.Tensor:
        """This rank's pieces, with padding: all ranks must cut the loss into the same number of chunks."""
        return local(super().head_weight)

    def head_input(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.axis.enter(x_BTD)

    @property
    def scalar_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The first rank has the only row; the rows of the other ranks are padding and are left out."""
        assert self.scalar_head is not None
        rows = slice_of(1, self.axis.size, self.axis.rank).real
        return local(self.scalar_head.weight)[:rows].sum(0), local(self.scalar_head.bias)

    @property
    def holds_all_tokens(self) -> bool:
        return not self.axis.sp

    def sum_of_parts(self, part: torch.Tensor) -> torch.Tensor:
        return self.axis.sum(part)

    def losses_of_logits(
        self, logits_NV: torch.Tensor, targets_N: torch.Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> torch.Tensor:
        own_NV = logits_NV[:, : self.pieces.real]
        return vocab_parallel_losses(
            own_NV, targets_N, self.pieces, self.config.vocab_size, self.axis, label_smoothing, z_loss
        )

    def logprobs_of_logits(
        self,
        logits_NV: torch.Tensor,
        targets_N: torch.Tensor,
        temperature: float,
        entropy_gradient: bool,
        kept_NV: torch.Tensor | None = None,
    ) -> torch.Tensor:
        own_NV = logits_NV[:, : self.pieces.real]
        return vocab_parallel_logprobs_and_entropy(
            own_NV, targets_N, self.pieces, self.axis, temperature, entropy_gradient, kept_NV
        )

    @property
    def own_pieces(self) -> range:
        return range(self.pieces.start, self.pieces.start + self.pieces.real)

    def first_token(self, n_tokens: int) -> int:
        return self.axis.first_token(n_tokens)


class VocabParallelEmbedding(nn.Embedding):
    """Each rank looks up the pieces it holds."""

    def __init__(self, config: ModelConfig, axis: TensorAxis) -> None:
        super().__init__(config.vocab_size, config.d_model)
        self.axis = axis
        self.pieces = slice_of(config.vocab_size, axis.size, axis.rank)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        self.axis.check_current()  # every forward pass begins here
        row_BT = tokens_BT - self.pieces.start
        held_BT = (row_BT >= 0) & (row_BT < self.pieces.real)
        part_BTD = F.embedding(row_BT.where(held_BT, 0), local(self.weight))
        return self.axis.leave(part_BTD * held_BT[..., None])


class ReplicatedNorm(nn.Module):
    """`build_norm` with the same weights on all ranks."""

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


class ReplicatedHeadNorm(HeadNorm):
    """`HeadNorm` with the same weight on all ranks; each rank applies it to its own heads."""

    def forward(self, x_BTHK: torch.Tensor) -> torch.Tensor:
        return normalise_heads(x_BTHK, local(self.weight), self.norm_eps)


class HeadParallelAttention(Attention):
    """Each rank attends with its query heads."""

    def __init__(self, config: ModelConfig, axis: TensorAxis, layer: int) -> None:
        super().__init__(config, layer)
        self.axis = axis
        self.heads = slice_of(config.n_heads, axis.size, axis.rank)
        self.keys, self.queries_of_key = keys_of(config, axis.size, axis.rank)
        if config.qk_norm:
            self.query_norm, self.key_norm = ReplicatedHeadNorm(config), ReplicatedHeadNorm(config)
        if self.adapters is not None:
            from dist_lm.parallel.adapters import share_heads

            keys = slice(None) if shards_key_heads(config, axis.size) else slice(self.keys.start, self.keys.stop)
            share_heads(self.adapters, self.heads, keys)

    def forward(
        self,
        x_BTD: torch.Tensor,
        rope: RopeTables,
        visibility: Visibility,
        first_BSGK: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x_BTD = self.axis.enter(x_BTD)
        q_BTHK = to_heads(x_BTD, local(self.query), bias_of(self.query_bias, self.heads))
        q_BTHK = adapted(q_BTHK, x_BTD, self.adapters, "query")
        k_BSGK = to_heads(x_BTD, self._key_rows(self.key), bias_of(self.key_bias, self.keys))
        k_BSGK = adapted(k_BSGK, x_BTD, self.adapters, "key")
        v_BSGK = to_heads(x_BTD, self._key_rows(self.value), bias_of(self.value_bias, self.keys))
        v_BSGK = adapted(v_BSGK, x_BTD, self.adapters, "value")
        mix_2 = None if self.value_mix is None else local(self.value_mix)
        v_BSGK, first_BSGK = self.mixed(v_BSGK, first_BSGK, mix_2)
        if self.query_norm is not None and self.key_norm is not None:
            q_BTHK, k_BSGK = self.query_norm(q_BTHK), self.key_norm(k_BSGK)
        k_BSGK = rotate(k_BSGK, rope)
        if self.queries_of_key:
            k_BSGK, v_BSGK = (_repeated(heads, self.queries_of_key) for heads in (k_BSGK, v_BSGK))
        o_BTHK = attend(rotate(q_BTHK, rope), k_BSGK, v_BSGK, visibility)
        o_BTHK = o_BTHK[:, :, : self.heads.real]
        part_BTD = from_heads(o_BTHK, local(self.output)[: self.heads.real], None)
        part_BTD = adapted(part_BTD, o_BTHK, self.adapters, "output")
        return with_bias(self.axis.leave(part_BTD), self.output_bias), first_BSGK

    def _key_rows(self, weight: torch.Tensor) -> torch.Tensor:
        """This rank's key (or value) heads (G, K, D): its shard, or the heads it reads if all ranks hold all heads."""
        held = local(weight)
        return held if held.shape[0] == self.keys.held else held[self.keys.start : self.keys.stop]


class WidthParallelFeedForward(FeedForward):
    """Each rank computes its hidden units."""

    def __init__(self, config: ModelConfig, axis: TensorAxis) -> None:
        super().__init__(config)
        self.axis = axis
        self.units = slice_of(config.d_ff, axis.size, axis.rank)
        if self.adapters is not None:
            from dist_lm.parallel.adapters import share_units

            share_units(self.adapters, self.units)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x_BTD = self.axis.enter(x_BTD)
        gate_BTF = None if self.gate is None else self._project(x_BTD, self.gate)
        gate_BTF = None if gate_BTF is None else adapted(gate_BTF, x_BTD, self.adapters, "gate")
        h_BTF = activate(adapted(self._project(x_BTD, self.up), x_BTD, self.adapters, "up"), gate_BTF, self.squared)
        part_BTD = F.linear(h_BTF, local(self.down.weight)[:, : self.units.real])
        part_BTD = adapted(part_BTD, h_BTF, self.adapters, "down")
        return with_bias(self.axis.leave(part_BTD), self.down.bias)

    def _project(self, x_BTD: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        bias_F = None if layer.bias is None else local(layer.bias)[self.units.start : self.units.stop]
        return F.linear(x_BTD, local(layer.weight)[: self.units.real], bias_F)


def _repeated(heads_BSGK: torch.Tensor, times: list[int]) -> torch.Tensor:
    """Key head g `times[g]` times over: (B, S, H, K)."""
    return torch.cat([heads_BSGK[:, :, g : g + 1].expand(-1, -1, n, -1) for g, n in enumerate(times)], dim=2)


def bias_of(bias: torch.Tensor | None, part: Slice) -> torch.Tensor | None:
    """This rank's rows of a replicated bias (heads, K), with zeros for padded heads."""
    if bias is None:
        return None
    missing = part.held - part.real
    rows = local(bias)[part.start : part.stop]
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def with_bias(x_BTD: torch.Tensor, bias_D: torch.Tensor | None) -> torch.Tensor:
    """`x + bias`, after the sum over ranks, so that the bias counts once."""
    return x_BTD if bias_D is None else x_BTD + local(bias_D)


def vocab_parallel_losses(
    logits_NV: torch.Tensor,
    targets_N: torch.Tensor,
    pieces: Slice,
    vocab_size: int,
    axis: TensorAxis,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """`model.cross_entropy.token_losses` of the whole logits: (N,) fp32, the same on every rank (collective).

    `loss = log Z - (1 - a) * logit[target] - a * mean(logits) + z_loss * log(Z)^2`. Each rank contributes its part of
    the sum of exponentials Z (as a logarithm), of the target's logit and of the mean.

    Args:
        logits_NV: logits of this rank's pieces, without padding.
    """
    logits_NV = logits_NV.float()
    row_N = targets_N - pieces.start
    held_N = (row_N >= 0) & (row_N < pieces.real)
    target_N = logits_NV.gather(-1, row_N.where(held_N, 0)[:, None]).squeeze(-1) * held_N
    parts = [logits_NV.logsumexp(-1), target_N]
    if label_smoothing:
        parts.append(logits_NV.sum(-1) / vocab_size)
    # (part, N) of every rank, in the order of ranks
    gathered = gather_from_model_parallel_region(torch.stack(parts)).unflatten(-1, (axis.size, -1))
    log_z_N = gathered[0].logsumexp(0)
    losses_N = log_z_N - (1 - label_smoothing) * gathered[1].sum(0)
    if label_smoothing:
        losses_N = losses_N - label_smoothing * gathered[2].sum(0)
    return losses_N + z_loss * log_z_N.square() if z_loss else losses_N


def vocab_parallel_logprobs_and_entropy(
    logits_NV: torch.Tensor,
    targets_N: torch.Tensor,
    pieces: Slice,
    axis: TensorAxis,
    temperature: float,
    entropy_gradient: bool,
    kept_NV: torch.Tensor | None = None,
) -> torch.Tensor:
    """`model.cross_entropy.logprobs_and_entropy` of the whole logits: (N, 2) fp32, the same on every rank (collective).

    `entropy = log Z - sum of p * logit`. Each rank contributes the mean logit under the distribution of its own pieces.

    Args:
        logits_NV: logits of this rank's pieces, without padding; `kept_NV` has the same columns.
    """
    x_NV = tempered(logits_NV, temperature, kept_NV)
    row_N = targets_N - pieces.start
    held_N = (row_N >= 0) & (row_N < pieces.real)
    target_N = x_NV.gather(-1, row_N.where(held_N, 0)[:, None]).squeeze(-1) * held_N
    own_NV = x_NV if entropy_gradient else x_NV.detach()
    mean_N = (own_NV.softmax(-1) * own_NV).sum(-1)
    parts = torch.stack([x_NV.logsumexp(-1), target_N, mean_N])
    gathered = gather_from_model_parallel_region(parts).unflatten(-1, (axis.size, -1))
    log_z_N = gathered[0].logsumexp(0)
    log_z_RN = gathered[0] if entropy_gradient else gathered[0].detach()
    share_RN = log_z_RN.softmax(0)  # probability of the pieces of each rank
    entropy_N = log_z_RN.logsumexp(0) - (share_RN * gathered[2]).sum(0)
    return torch.stack([gathered[1].sum(0) - log_z_N, entropy_N], dim=-1)
