"""One rank's share of a model on several devices: how it is cut from unsharded weights, and where ranks communicate.

The shares are those of training (`dist_lm.parallel.layout`): each rank holds some heads, some hidden units and some
of the vocabulary, padded with zeros so that all ranks hold equally many. Two rules are simpler than in training,
because no weight changes: rank 0 alone holds a bias that is added after ranks sum their outputs, and all further ranks
hold zeros; and if the query heads of a rank do not divide evenly among its key heads, it holds a copy of the key head
for each query head.

Dimensions: M rows, D d_model, V vocabulary, U vocabulary entries of a rank.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812  the name the field uses

from dist_lm.config.model import ModelConfig
from dist_lm.errors import require
from dist_lm.generation.linear import Linear
from dist_lm.model.size import VALUE_MIX, Shape, parameter_shapes
from dist_lm.parallel.layout import Layout, RankSlice, keys_of, keys_read, misfit, rank_slice
from dist_lm.parallel.tensor_axis import TensorAxis

LEADER = 0  # the rank that chooses tokens
SUMMED_BIASES = ("attention.output_bias", "feed_forward.down.bias")
CUT_INPUTS = "feed_forward.down.weight"


@dataclass(frozen=True)
class Share:
    """The part of every layer that a rank computes, padding included; with one rank, the complete layer."""

    rank: int
    n_layers: int
    d_head: int
    heads: RankSlice
    kv_heads: int
    key_heads: tuple[int, ...]  # the key/value heads it holds, in this order, then zeros up to kv_heads
    units: RankSlice  # hidden units of the feed-forward network
    vocab: RankSlice  # vocabulary entries
    key_shares: tuple[float, ...]  # 1 / number of ranks' copies of each of `key_heads`
    windows: tuple[int | None, ...]  # the window of each layer, see `model.window`

    @property
    def n_heads(self) -> int:
        return self.heads.held


def share_of(config: ModelConfig, tp: int = 1, rank: int = 0) -> Share:
    """Returns the share of rank `rank` of `tp`: heads, hidden units and vocabulary, split as `torch.chunk` splits them.

    The last ranks may have fewer real entries; padding makes all ranks hold equally many. Nothing is checked, see
    `check_tp`.
    """
    keys, _ = keys_of(config, tp, rank)
    key_heads = _key_heads(config, tp, rank)
    copies = Counter(head for other in range(tp) for head in _key_heads(config, tp, other))
    return Share(
        rank=rank,
        n_layers=config.n_layers,
        d_head=config.d_head,
        heads=rank_slice(config.n_heads, tp, rank),
        kv_heads=max(keys.held, len(key_heads)),  # heads that are split have padding, copies need none
        key_heads=tuple(key_heads),
        units=rank_slice(config.d_ff, tp, rank),
        vocab=rank_slice(config.vocab_size, tp, rank),
        key_shares=tuple(1 / copies[head] for head in key_heads),
        windows=tuple(config.windows),
    )


def _key_heads(config: ModelConfig, tp: int, rank: int) -> list[int]:
    """Returns the key/value heads that a rank holds, one of them several times if its query heads read it unequally
    often."""
    keys, n_queries_of_key = keys_of(config, tp, rank)
    if n_queries_of_key:
        return keys_read(config, tp, rank)
    return [*range(keys.start, keys.stop)]


def check_tp(config: ModelConfig, tp: int, devices: int | None, key: str = "tp") -> None:
    """Refuses a `tp` below 1, one that the model cannot be cut into, or one above the number of GPUs.

    Args:
        devices: GPUs of the node; None: ranks compute on the CPU, in any number.

    Raises:
        ConfigError: names `key`, the value and what is accepted.
    """
    require(tp > 0, key, tp, "a positive integer")
    reason = misfit(Layout(1, 1, tp), config)
    require(reason is None, key, tp, f"a degree that this model can be cut into ({reason})")
    require(devices is None or tp <= devices, key, tp, f"at most {devices}, the GPUs that one node has for an engine")


def cut(name: str, parameter: torch.Tensor, share: Share) -> torch.Tensor:
    """Returns a rank's part of the unsharded parameter `name`, as a view if possible; padding is zeros. Norms
    are returned whole, unless each head has weights of its own.

    A bias that is added after the sum over ranks is all zeros on every rank but the first.
    """
    # The name without its layer: all layers are cut alike.
    kind = name.split(".", 2)[2] if name.startswith("blocks.") else name
    is_of_heads = kind.endswith("norm.weight") and parameter.dim() > 1  # a norm over all heads
    if kind in ("attention.query", "attention.query_bias", "attention.output") or (is_of_heads and "query" in kind):
        return _slice(parameter, share.heads)
    if kind in ("attention.key", "attention.key_bias", "attention.value", "attention.value_bias") or is_of_heads:
        return _pad_rows(parameter[list(share.key_heads)], share.kv_heads)

    # Added after the sum over ranks in training, and before it here: one rank alone may add it.
    if kind in SUMMED_BIASES:
        return parameter if share.rank == 0 else torch.zeros_like(parameter)

    if kind == CUT_INPUTS:
        return _slice(parameter.t(), share.units).t()
    if kind.startswith("feed_forward."):
        return _slice(parameter, share.units)
    if kind in ("embedding.weight", "lm_head.weight"):
        return _slice(parameter, share.vocab)
    assert "norm." in kind or kind == VALUE_MIX, name
    return parameter


def part_shapes(config: ModelConfig, share: Share) -> dict[str, Shape]:
    """Returns the shapes of a rank's parts of all parameters, by name."""
    parameters = {name: torch.empty(shape, device="meta") for name, shape in parameter_shapes(config).items()}
    return {name: tuple(cut(name, parameter, share).shape) for name, parameter in parameters.items()}


def _slice(parameter: torch.Tensor, part: RankSlice) -> torch.Tensor:
    return _pad_rows(parameter[part.start : part.stop], part.held)


def _pad_rows(rows: torch.Tensor, n_rows: int) -> torch.Tensor:
    padding = n_rows - len(rows)
    if padding:
        rows = F.pad(rows, (*[0] * (2 * rows.dim() - 1), padding))
    return rows


def build_embedding(
    weight_UD: torch.Tensor, vocab: RankSlice, axis: TensorAxis | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the embedding: a function from tokens (M,) to vectors (M, D), summed over ranks (collective with an
    axis).

    Args:
        vocab: the entries of the vocabulary that this rank holds, in `weight_UD`.
    """
    if axis is None:
        return lambda token_M: F.embedding(token_M, weight_UD)

    # Tokens outside the share take a row of zeros; multiplying by 0 instead would let nan through.
    padded_weight_UD = F.pad(weight_UD, (0, 0, 0, 1))

    def embed(token_M: torch.Tensor) -> torch.Tensor:
        axis.check_current()  # a forward pass begins here
        row_M = token_M - vocab.start
        is_local_M = (row_M >= 0) & (row_M < vocab.real)
        return axis.leave(F.embedding(row_M.where(is_local_M, vocab.held), padded_weight_UD))

    return embed


def leaving(linear: Linear, axis: TensorAxis) -> Linear:
    """Returns a linear layer over this rank's part of the inputs (row-parallel); every rank gets the sum over ranks
    (collective)."""

    def sum_over_ranks(x_MD: torch.Tensor, added_MN: torch.Tensor | None = None) -> torch.Tensor:
        y_MN = axis.leave(linear(x_MD))
        if added_MN is not None:
            y_MN = added_MN + y_MN
        return y_MN

    return sum_over_ranks


def gathering(linear: Linear, axis: TensorAxis, vocab_size: int) -> Linear:
    """Returns the head: the leader gets all logits (M, V), every follower its own (M, U) (collective).

    Args:
        vocab_size: tokens of the complete vocabulary; padding is cut off.
    """
    sizes = [rank_slice(vocab_size, axis.size, rank).real for rank in range(axis.size)]

    def gather(x_MD: torch.Tensor, added_MN: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the logits of all ranks on the leader and this rank's on followers."""
        assert added_MN is None
        part_MU = linear(x_MD)
        if axis.rank != LEADER:
            dist.gather(part_MU, group=axis.group, group_dst=LEADER)
            return part_MU
        # `gather` wants equal parts; the padding of the vocabulary is cut off after it.
        parts = list(part_MU.new_empty(axis.size, *part_MU.shape).unbind())
        dist.gather(part_MU, parts, group=axis.group, group_dst=LEADER)
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)

    return gather
