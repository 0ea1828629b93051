"""What one of several ranks holds of a model that generates, and how it is cut out of whole weights.

The same parts as in training (`dist_lm.parallel.placement`): each rank takes some heads, some hidden units, some of the
vocabulary, with zeros after the last one so that every rank holds as many. Two things are simpler, as nothing is
trained: biases that are added after the parts are summed lie on the first rank, with zeros on the others, and
where key heads are read by unequally many query heads of a rank, it holds one key head for each query head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses

from dist_lm.config.model import ModelConfig
from dist_lm.errors import require
from dist_lm.model.size import Shape, parameter_shapes
from dist_lm.parallel.layout import Layout, misfit
from dist_lm.parallel.placement import Slice, keys_of, keys_read, shards_key_heads, slice_of

SUMMED_BIASES = ("attention.output_bias", "feed_forward.down.bias")
CUT_INPUTS = "feed_forward.down.weight"


@dataclass(frozen=True)
class Share:
    """What a rank computes in every layer, padding included; a cache is built for it as for a whole model."""

    rank: int
    n_layers: int
    d_head: int
    heads: Slice
    kv_heads: int
    read: tuple[int, ...]  # the model's key heads that it holds, in this order; zeros after the last one
    units: Slice  # of the feed-forward network
    pieces: Slice  # of the vocabulary

    @property
    def n_heads(self) -> int:
        return self.heads.held


def share_of(config: ModelConfig, tp: int = 1, rank: int = 0) -> Share:
    """The share of one of `tp` ranks."""
    keys, queries = keys_of(config, tp, rank)
    read = keys_read(config, tp, rank) if queries else range(keys.start, keys.stop)
    return Share(
        rank=rank,
        n_layers=config.n_layers,
        d_head=config.d_head,
        heads=slice_of(config.n_heads, tp, rank),
        kv_heads=keys.held if shards_key_heads(config, tp) else len(read),
        read=tuple(read),
        units=slice_of(config.d_ff, tp, rank),
        pieces=slice_of(config.vocab_size, tp, rank),
    )


def check_tp(config: ModelConfig, tp: int, devices: int | None, key: str = "tp") -> None:
    """Refuse a number of ranks that a model cannot be cut into, or for which there are not enough GPUs.

    Args:
        devices: GPUs of the node; None: ranks compute on the CPU, and there may be any number.

    Raises:
        ConfigError: names `key`.
    """
    require(tp > 0, key, tp, "a positive integer")
    reason = misfit(Layout(1, 1, tp), config)
    require(reason is None, key, tp, f"a degree that this model can be cut into ({reason})")
    require(devices is None or tp <= devices, key, tp, f"at most {devices}, the GPUs that one node has for an engine")


def cut(name: str, value: torch.Tensor, share: Share) -> torch.Tensor:
    """A rank's part of the parameter `name`; a view where it can be one."""
    kind = name.split(".", 2)[2] if name.startswith("blocks.") else name
    if kind in ("attention.query", "attention.query_bias", "attention.query_gain", "attention.output"):
        return _slice(value, share.heads)
    if kind in ("attention.key", "attention.key_bias", "attention.value", "attention.value_bias"):
        return _rows(value, share.read, share.kv_heads)
    if kind in SUMMED_BIASES:
        return value if share.rank == 0 else torch.zeros_like(value)
    if kind == CUT_INPUTS:
        return _slice(value.t(), share.units).t()
    if kind.startswith("feed_forward."):
        return _slice(value, share.units)
    if kind in ("embedding.weight", "lm_head.weight"):
        return _slice(value, share.pieces)
    assert "norm." in kind, name
    return value


def part_shapes(config: ModelConfig, share: Share) -> dict[str, Shape]:
    """The shape of a rank's part of every parameter, by name."""
    whole = {name: torch.empty(shape, device="meta") for name, shape in parameter_shapes(config).items()}
    return {name: tuple(cut(name, value, share).shape) for name, value in whole.items()}


def _slice(value: torch.Tensor, part: Slice) -> torch.Tensor:
    return _padded(value[part.start : part.stop], part.held)


def _rows(value: torch.Tensor, rows: Sequence[int], held: int) -> torch.Tensor:
    return _padded(value[list(rows)], held)


def _padded(rows: torch.Tensor, held: int) -> torch.Tensor:
    missing = held - len(rows)
    return F.pad(rows, (*[0] * (2 * rows.dim() - 1), missing)) if missing else rows
