"""The transformer over tensor-parallel ranks: each rank has some heads, some hidden units and some of the vocabulary.

Parameters are DTensors on the tp axis. Zeros after the last head (hidden unit, token id) make all shards equally large.
A module computes with its local shard. Padding never reaches an output, so its gradient is zero and it stays zero. The
parameter names are those of the plain model.

The loss needs one small message: no rank sees the logits of another.

Dimensions: B sequences, T tokens, S keys, N = B * T, D d_model, V vocabulary, H query heads, G key/value heads, K
d_head, F d_ff (V, H, G and F count what this rank has), R ranks of the axis.
"""

import math
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses
from fairscale.nn.model_parallel.mappings import gather_from_model_parallel_region
from torch import nn

from dist_lm.config.model import ModelConfig
from dist_lm.model.attention import Attention, Visibility, from_heads, to_heads
from dist_lm.model.cross_entropy import tempered
from dist_lm.model.layers import (
    AllHeadsNorm,
    FeedForward,
    HeadNorm,
    RopeTables,
    activate,
    build_norm,
    normalise_heads,
    rotate,
    square_sum,
)
from dist_lm.model.lora import Adapter, AdapterDropout, adapted
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.layout import RankSlice, keys_of, rank_slice, shards_key_heads
from dist_lm.parallel.tensor_axis import TensorAxis, local


class TensorParallelTransformer(Transformer):
    """`Transformer` whose layers are shared by the ranks of a `TensorAxis`."""

    def __init__(self, config: ModelConfig, axis: TensorAxis, partial_gradients: list[str]) -> None:
        """
        Args:
            partial_gradients: names of the parameters whose gradients must be summed over the axis.
        """
        super().__init__(config)
        self.axis = axis
        self.partial_gradients = partial_gradients
        self.vocab = rank_slice(config.vocab_size, axis.size, axis.rank)

        # Only modules with a split parameter differ from the plain model; the flow of a forward pass is inherited.
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
        """The rows of this rank, with padding: all ranks must cut the loss into the same number of chunks."""
        return local(super().head_weight)

    def head_input(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.axis.enter(x_BTD)

    @property
    def scalar_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (D,), 0 on all ranks but the first, which has the only row, and bias (1,)."""
        assert self.scalar_head is not None
        n_rows = rank_slice(1, self.axis.size, self.axis.rank).real
        return local(self.scalar_head.weight)[:n_rows].sum(0), local(self.scalar_head.bias)

    @property
    def holds_all_tokens(self) -> bool:
        return not self.axis.sp

    def sum_over_ranks(self, part: torch.Tensor) -> torch.Tensor:
        return self.axis.sum(part)

    def losses_of_logits(
        self, logits_NV: torch.Tensor, targets_N: torch.Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> torch.Tensor:
        logits_NV = logits_NV[:, : self.vocab.real]
        return vocab_parallel_losses(
            logits_NV, targets_N, self.vocab, self.config.vocab_size, self.axis, label_smoothing, z_loss
        )

    def logprobs_of_logits(
        self,
        logits_NV: torch.Tensor,
        targets_N: torch.Tensor,
        temperature: float,
        entropy_gradient: bool,
        allowed_NV: torch.Tensor | None = None,
    ) -> torch.Tensor:
        logits_NV = logits_NV[:, : self.vocab.real]
        return vocab_parallel_logprobs_and_entropy(
            logits_NV, targets_N, self.vocab, self.axis, temperature, entropy_gradient, allowed_NV
        )

    @property
    def vocab_range(self) -> range:
        return range(self.vocab.start, self.vocab.stop)

    def first_held_index(self, n_tokens: int) -> int:
        return self.axis.first_held_index(n_tokens)


class VocabParallelEmbedding(nn.Embedding):
    """An embedding of which each rank holds a slice of the vocabulary and looks up the tokens in it."""

    def __init__(self, config: ModelConfig, axis: TensorAxis) -> None:
        super().__init__(config.vocab_size, config.d_model)
        self.axis = axis
        self.vocab = rank_slice(config.vocab_size, axis.size, axis.rank)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        self.axis.check_current()  # every forward pass begins here

        # Each token is in the slice of one rank; the other ranks contribute zeros to the sum.
        row_BT = tokens_BT - self.vocab.start
        is_local_BT = (row_BT >= 0) & (row_BT < self.vocab.real)
        part_BTD = F.embedding(row_BT.where(is_local_BT, 0), local(self.weight))
        return self.axis.leave(part_BTD * is_local_BT[..., None])


class ReplicatedNorm(nn.Module):
    """`build_norm` with the same weights on all ranks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # `build_norm` decides which norm it is and which parameters it has; they are replaced by DTensors later.
        norm = build_norm(config)
        assert isinstance(norm, nn.RMSNorm | nn.LayerNorm)
        self.is_rms = isinstance(norm, nn.RMSNorm)
        self.shape = [config.d_model]
        self.eps = config.norm_eps
        self.weight = norm.weight
        self.bias = getattr(norm, "bias", None)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        if self.is_rms:
            return F.rms_norm(x_BTD, self.shape, local(self.weight), self.eps)
        bias = None if self.bias is None else local(self.bias)
        return F.layer_norm(x_BTD, self.shape, local(self.weight), bias, self.eps)


class ReplicatedHeadNorm(HeadNorm):
    """`HeadNorm` with the same weight on all ranks; each rank applies it to its own heads."""

    def forward(self, x_BTHK: torch.Tensor) -> torch.Tensor:
        return normalise_heads(x_BTHK, local(self.weight), self.norm_eps)


class ParallelAllHeadsNorm(AllHeadsNorm):
    """`AllHeadsNorm` over the heads of all ranks, with the same weight on each; a rank applies it to its own heads."""

    def __init__(
        self, config: ModelConfig, n_heads: int, axis: TensorAxis, heads: RankSlice, shares: Sequence[float]
    ) -> None:
        """
        Args:
            n_heads: heads of all ranks.
            heads: those that this rank computes.
            shares: for each of these heads, the part of its squares that this rank adds to the sum over ranks; padded
                heads add nothing.
        """
        super().__init__(config, n_heads)
        self.axis = axis
        self.heads = heads
        self.shares = [*shares, *[0.0] * (heads.held - len(shares))]

    def forward(self, x_BTHK: torch.Tensor) -> torch.Tensor:
        """Does the same as `AllHeadsNorm.forward` with this rank's heads (collective)."""
        part_BTHK = x_BTHK
        if {*self.shares} != {1.0}:
            root_H = torch.tensor(self.shares, dtype=x_BTHK.dtype, device=x_BTHK.device).sqrt()
            part_BTHK = x_BTHK * root_H[:, None]
        sum_BT11 = self.axis.sum_of_shares(square_sum(part_BTHK))
        weight_HK = bias_rows(self.weight, self.heads)
        assert weight_HK is not None
        return self.normalise(x_BTHK, sum_BT11, weight_HK)


class ParallelAdapter(Adapter):
    """A LoRA adapter whose weight is split over the ranks.

    Tensor parallelism splits the factor that has the split dimension of the weight: B of queries, keys, values, gate
    and up, A of the outputs. The other factor is the same on all ranks, and each rank computes a part of its gradient.
    """

    def __init__(self, adapter: Adapter, split_factor: str, part: slice, first: int) -> None:
        """
        Args:
            adapter: the unsplit adapter.
            split_factor: a | b.
            part: entries, along the split dimension of this rank's factor, that the rank computes with.
            first: the head or hidden unit of the unsplit input that the input of this rank begins with; 0: its input is
                not split.
        """
        super().__init__(tuple(adapter.a.shape), tuple(adapter.b.shape), adapter.scale)
        self.split_factor = split_factor
        self.part = part
        # An input has a channel for each hidden unit, or d_head channels for each head.
        self._first_channel = first * math.prod(adapter.a.shape[2:])

    @property
    def first_channel(self) -> int:
        return self._first_channel

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = local(self.a), local(self.b)
        if self.split_factor == "a":
            return a[:, self.part], b
        return a, b[:, self.part]


def split_adapters(adapters: nn.ModuleDict, parts: dict[str, slice], first: int) -> None:
    """Replaces the adapters of attention or of the feed-forward network, in place, by those of this rank.

    Args:
        parts: `ParallelAdapter.part` by the name of the weight.
        first: the first head or hidden unit of this rank.
    """
    for name, adapter in list(adapters.items()):
        assert isinstance(adapter, Adapter)
        reads_split = name in ("output", "down")
        split_factor = "a" if reads_split else "b"
        adapters[name] = ParallelAdapter(adapter, split_factor, parts[name], first if reads_split else 0)


class HeadParallelAttention(Attention):
    """Attention of which each rank computes its query heads."""

    def __init__(self, config: ModelConfig, axis: TensorAxis, layer: int) -> None:
        super().__init__(config, layer)
        self.axis = axis
        self.heads = rank_slice(config.n_heads, axis.size, axis.rank)
        self.keys, self.queries_of_key = keys_of(config, axis.size, axis.rank)

        if config.qk_norm:
            self.query_norm, self.key_norm = self._build_head_norms(config)
        if self.adapters is not None:
            keys = slice(self.keys.start, self.keys.stop)
            if shards_key_heads(config, axis.size):
                keys = slice(None)  # the factor of this rank has its key heads only
            heads = slice(self.heads.real)
            parts = {"query": slice(None), "key": keys, "value": keys, "output": heads}
            split_adapters(self.adapters, parts, self.heads.start)

    def forward(
        self,
        x_BTD: torch.Tensor,
        rope: RopeTables,
        visibility: Visibility,
        v1_BSGK: torch.Tensor | None = None,
        dropout: AdapterDropout = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Does the same as `Attention.forward` with this rank's heads; every rank gets the sum over ranks (collective).

        With sequence parallelism, `x_BTD` and the output hold the tokens of this rank. The values of the first layer
        are those of this rank's key heads, at all tokens.
        """
        x_BTD = self.axis.enter(x_BTD)

        q_BTHK = to_heads(x_BTD, local(self.query), bias_rows(self.query_bias, self.heads))
        q_BTHK = adapted(q_BTHK, x_BTD, self.adapters, "query", dropout)
        k_BSGK = to_heads(x_BTD, self._key_rows(self.key), bias_rows(self.key_bias, self.keys))
        k_BSGK = adapted(k_BSGK, x_BTD, self.adapters, "key", dropout)
        v_BSGK = to_heads(x_BTD, self._key_rows(self.value), bias_rows(self.value_bias, self.keys))
        v_BSGK = adapted(v_BSGK, x_BTD, self.adapters, "value", dropout)

        mix_2 = None if self.value_mix is None else local(self.value_mix)
        v_BSGK, v1_BSGK = self.mix_first_values(v_BSGK, v1_BSGK, mix_2)
        if self.query_norm is not None and self.key_norm is not None:
            q_BTHK, k_BSGK = self.query_norm(q_BTHK), self.key_norm(k_BSGK)
        if self.scales_queries:
            q_BTHK = q_BTHK * self.query_scale
        if self.is_rotated:
            q_BTHK, k_BSGK = rotate(q_BTHK, rope), rotate(k_BSGK, rope)

        # SDPA repeats every key head equally often; here the rank boundary cuts through a group of query heads.
        if self.queries_of_key:
            k_BSGK = repeat_heads(k_BSGK, self.queries_of_key)
            v_BSGK = repeat_heads(v_BSGK, self.queries_of_key)

        # Padded heads attend, too, but are cut off before the projection.
        o_BTHK = self.attend(q_BTHK, k_BSGK, v_BSGK, visibility)
        o_BTHK = o_BTHK[:, :, : self.heads.real]
        part_BTD = from_heads(o_BTHK, local(self.output)[: self.heads.real], None)
        part_BTD = adapted(part_BTD, o_BTHK, self.adapters, "output", dropout)
        return add_bias(self.axis.leave(part_BTD), self.output_bias), v1_BSGK

    def _build_head_norms(self, config: ModelConfig) -> tuple[nn.Module, nn.Module]:
        if config.qk_norm_span == "head":
            return ReplicatedHeadNorm(config), ReplicatedHeadNorm(config)

        # Several ranks may compute one key head: each adds its part of the squares.
        computed = Counter[int]()
        for rank in range(self.axis.size):
            keys, _ = keys_of(config, self.axis.size, rank)
            computed.update(range(keys.start, keys.stop))
        shares = [1 / computed[head] for head in range(self.keys.start, self.keys.stop)]
        return (
            ParallelAllHeadsNorm(config, config.n_heads, self.axis, self.heads, [1.0] * self.heads.real),
            ParallelAllHeadsNorm(config, config.kv_heads, self.axis, self.keys, shares),
        )

    def _key_rows(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the key (or value) heads (G, K, D) that this rank reads: its shard if they are split, else a part of
        all heads."""
        shard = local(weight)
        if shard.shape[0] == self.keys.held:
            return shard
        return shard[self.keys.start : self.keys.stop]


class WidthParallelFeedForward(FeedForward):
    """A feed-forward network of which each rank computes its hidden units."""

    def __init__(self, config: ModelConfig, axis: TensorAxis) -> None:
        super().__init__(config)
        self.axis = axis
        self.units = rank_slice(config.d_ff, axis.size, axis.rank)
        if self.adapters is not None:
            parts: dict[str, slice] = dict.fromkeys(("gate", "up", "down"), slice(self.units.real))
            split_adapters(self.adapters, parts, self.units.start)

    def forward(self, x_BTD: torch.Tensor, dropout: AdapterDropout = None) -> torch.Tensor:
        """Does the same as `FeedForward.forward` with this rank's hidden units; every rank gets the sum over ranks
        (collective). With sequence parallelism, `x_BTD` and the result hold the tokens of this rank."""
        x_BTD = self.axis.enter(x_BTD)

        gate_BTF = None
        if self.gate is not None:
            gate_BTF = adapted(self._project(x_BTD, self.gate), x_BTD, self.adapters, "gate", dropout)
        up_BTF = adapted(self._project(x_BTD, self.up), x_BTD, self.adapters, "up", dropout)
        h_BTF = activate(up_BTF, gate_BTF, self.ffn)

        # Padded hidden units were never computed, so the weights that read them are cut off, too.
        part_BTD = F.linear(h_BTF, local(self.down.weight)[:, : self.units.real])
        part_BTD = adapted(part_BTD, h_BTF, self.adapters, "down", dropout)
        return add_bias(self.axis.leave(part_BTD), self.down.bias)

    def _project(self, x_BTD: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        bias_F = None if layer.bias is None else local(layer.bias)[self.units.start : self.units.stop]
        return F.linear(x_BTD, local(layer.weight)[: self.units.real], bias_F)


def repeat_heads(x_BSGK: torch.Tensor, times: list[int]) -> torch.Tensor:
    """Repeats key head g `times[g]` times: (B, S, H, K)."""
    return torch.cat([x_BSGK[:, :, g : g + 1].expand(-1, -1, n, -1) for g, n in enumerate(times)], dim=2)


def bias_rows(bias: torch.Tensor | None, heads: RankSlice) -> torch.Tensor | None:
    """Returns this rank's rows of a replicated bias (heads, K), with zeros for padded heads."""
    if bias is None:
        return None
    rows = local(bias)[heads.start : heads.stop]
    padding = heads.held - heads.real
    if padding:
        rows = F.pad(rows, (0, 0, 0, padding))
    return rows


def add_bias(x_BTD: torch.Tensor, bias_D: torch.Tensor | None) -> torch.Tensor:
    """Returns `x + bias`; called after the sum over ranks, so that the bias counts once."""
    if bias_D is None:
        return x_BTD
    return x_BTD + local(bias_D)


def vocab_parallel_losses(
    logits_NV: torch.Tensor,
    targets_N: torch.Tensor,
    vocab: RankSlice,
    vocab_size: int,
    axis: TensorAxis,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """Returns `model.cross_entropy.token_losses` over the vocabulary of all ranks: (N,) fp32, the same on every rank
    (collective).

    `loss = log Z - (1 - a) * logit[target] - a * mean(logits) + z_loss * log(Z)^2`. Each rank contributes its part of
    the sum of exponentials Z (as a logarithm), of the target's logit and of the mean.

    Args:
        logits_NV: logits of this rank's vocabulary, without padding.
        vocab: this rank's slice of the vocabulary.
        targets_N: int64, token ids of the complete vocabulary.
        vocab_size: size of the vocabulary of all ranks.
    """
    logits_NV = logits_NV.float()
    target_N = _target_logits(logits_NV, targets_N, vocab)
    parts = [logits_NV.logsumexp(-1), target_N]
    if label_smoothing:
        parts.append(logits_NV.sum(-1) / vocab_size)

    # At most three numbers per token and rank travel, not V logits.
    log_z_RN, target_RN, *mean_RN = _gather_over_ranks(parts, axis)
    log_z_N = log_z_RN.logsumexp(0)
    losses_N = log_z_N - (1 - label_smoothing) * target_RN.sum(0)
    if label_smoothing:
        losses_N = losses_N - label_smoothing * mean_RN[0].sum(0)
    if z_loss:
        losses_N = losses_N + z_loss * log_z_N.square()
    return losses_N


def vocab_parallel_logprobs_and_entropy(
    logits_NV: torch.Tensor,
    targets_N: torch.Tensor,
    vocab: RankSlice,
    axis: TensorAxis,
    temperature: float,
    entropy_gradient: bool,
    allowed_NV: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns `model.cross_entropy.logprobs_and_entropy` over the vocabulary of all ranks: (N, 2) fp32, the same on
    every rank (collective).

    `entropy = log Z - sum of p * logit`. Each rank contributes the mean logit under the distribution over its slice.

    Args:
        logits_NV: logits of this rank's vocabulary, without padding; `allowed_NV` has the same columns.
        vocab: this rank's slice of the vocabulary.
    """
    x_NV = tempered(logits_NV, temperature, allowed_NV)
    target_N = _target_logits(x_NV, targets_N, vocab)
    entropy_x_NV = x_NV if entropy_gradient else x_NV.detach()
    mean_N = (entropy_x_NV.softmax(-1) * entropy_x_NV).sum(-1)

    log_z_RN, target_RN, mean_RN = _gather_over_ranks([x_NV.logsumexp(-1), target_N, mean_N], axis)
    logprob_N = target_RN.sum(0) - log_z_RN.logsumexp(0)

    # The entropy over all slices is a mean of the slices' mean logits, weighted by their probabilities.
    if not entropy_gradient:
        log_z_RN = log_z_RN.detach()
    share_RN = log_z_RN.softmax(0)  # probability of the slice of each rank
    entropy_N = log_z_RN.logsumexp(0) - (share_RN * mean_RN).sum(0)
    return torch.stack([logprob_N, entropy_N], dim=-1)


def _target_logits(x_NV: torch.Tensor, targets_N: torch.Tensor, vocab: RankSlice) -> torch.Tensor:
    """Returns the logit of each target; 0 for targets outside this rank's slice of the vocabulary."""
    # The target is in the slice of one rank; the sum over ranks finds its logit.
    row_N = targets_N - vocab.start
    is_local_N = (row_N >= 0) & (row_N < vocab.real)
    return x_NV.gather(-1, row_N.where(is_local_N, 0)[:, None]).squeeze(-1) * is_local_N


def _gather_over_ranks(parts_N: list[torch.Tensor], axis: TensorAxis) -> torch.Tensor:
    """Returns the parts of all ranks, (parts, R, N), in one message."""
    return gather_from_model_parallel_region(torch.stack(parts_N)).unflatten(-1, (axis.size, -1))
