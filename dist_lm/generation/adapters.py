"""Adapters beside one base in one decoder: each row of a step gets the low-rank change of its own adapter (LoRA, Hu et
al. 2021, arXiv 2106.09685), and all rows share the product with the base's weights.

    y = W x + b + s B A x        (a row without an adapter: W x + b)

The changes are added by the kernel of the base's product, as a residual is. Rows of one adapter that stand together are
multiplied together. On the CPU in fp32 all these products give a row the same bits in any batch (`linear.py`), so an
answer depends neither on the rows beside it nor on the adapters that are loaded.

Dimensions: M rows, D inputs, N outputs, R rank (of the adapters of a concatenated weight together).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses

from dist_lm.config.model import AdaptedModelConfig
from dist_lm.generation.linear import VECTOR, Linear, build_linear
from dist_lm.generation.shard import Share
from dist_lm.model.size import ADAPTERS


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter for an engine that holds its base."""

    name: str  # its name in requests, not empty
    config: AdaptedModelConfig
    factors: Mapping[str, torch.Tensor]  # A (R, *input) and B (R, *output), by the names of the parameters
    version: int  # answers tell it


@dataclass(frozen=True)
class Run:
    """Consecutive rows of one adapter."""

    adapter: str  # empty: the base alone
    rows: slice


def runs_of(adapters: Sequence[str], lengths: Sequence[int] | None = None) -> tuple[Run, ...]:
    """Returns the runs of rows with the same adapter, in order; empty if no row has one.

    Args:
        adapters: name of the adapter of each group of rows; an empty name is the base.
        lengths: rows of each group; None: one.
    """
    if not any(adapters):
        return ()
    runs: list[Run] = []
    start = 0
    for adapter, group in groupby(zip(adapters, lengths or [1] * len(adapters), strict=True), key=lambda pair: pair[0]):
        end = start + sum(length for _, length in group)
        runs.append(Run(adapter, slice(start, end)))
        start = end
    return tuple(runs)


@dataclass
class RowAdapters:
    """The adapters of the rows of the step that runs; all layers of a decoder read it."""

    runs: Sequence[Run] = ()


class AdaptedLinear:
    """A linear layer of the base, with the changes of adapters beside it."""

    def __init__(self, linear: Linear, n_outputs: int, rows: RowAdapters, has_activation: bool) -> None:
        """
        Args:
            has_activation: whether the kernel of `linear` applies an activation.
        """
        self._linear = linear
        self._n_outputs = n_outputs
        self._rows = rows
        self._has_activation = has_activation
        self._changes: dict[str, tuple[Linear, Linear]] = {}  # (A, s B) by the name of the adapter

    def add(self, adapter: str, a_RD: torch.Tensor, b_NR: torch.Tensor) -> None:
        """Adds the change of an adapter, with its scale in `b_NR`."""
        # Padded entries of the rank stay 0, and no kernel loop has a tail.
        padding = -len(a_RD) % VECTOR
        a_RD, b_NR = F.pad(a_RD, (0, 0, 0, padding)), F.pad(b_NR, (0, padding))
        self._changes[adapter] = build_linear(a_RD.contiguous(), None), build_linear(b_NR.contiguous(), None)

    def __call__(self, x_MD: torch.Tensor, added_MN: torch.Tensor | None = None) -> torch.Tensor:
        """Returns `x @ weight^T + bias + added_MN`, plus the change of each row's adapter, (M, N)."""
        if not any(run.adapter in self._changes for run in self._rows.runs):
            return self._linear(x_MD, added_MN)

        change_MN = x_MD.new_zeros(len(x_MD), self._n_outputs) if added_MN is None else added_MN.clone()
        for run in self._rows.runs:
            if run.adapter in self._changes:
                a, b = self._changes[run.adapter]
                change_MN[run.rows] = b(a(x_MD[run.rows]), change_MN[run.rows])
        y_MN = self._linear(x_MD, change_MN)

        # With something to add, the activation has a kernel of its own, which rounds differently.
        if self._has_activation and added_MN is None:
            for run in self._rows.runs:
                if run.adapter not in self._changes:
                    y_MN[run.rows] = self._linear(x_MD[run.rows])
        return y_MN


@dataclass(frozen=True)
class LayerFactors:
    """The factors (A, s B) of an adapter for the linear layers of one block, as the decoder has them: weights that are
    one product there are concatenated here. None: the adapter does not change the layer."""

    qkv: tuple[torch.Tensor, torch.Tensor] | None
    output: tuple[torch.Tensor, torch.Tensor] | None
    up: tuple[torch.Tensor, torch.Tensor] | None
    down: tuple[torch.Tensor, torch.Tensor] | None


def layer_factors(
    config: AdaptedModelConfig,
    share: Share,
    factors: Mapping[str, torch.Tensor],
    number: int,
    query_scale: float,
    residual_scale: float,
) -> LayerFactors:
    """Returns the factors of block `number` (from 0) of a model on one device.

    Args:
        factors: A (R, *input) and B (R, *output) of every adapted weight, by the name of the parameter.
        query_scale, residual_scale: what the decoder has multiplied into queries and into the ends of branches.
    """
    padding = -share.units.held % VECTOR  # hidden units, as in the base

    def pair(part: str, name: str, n_outputs: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (A (R, D), s B (N, R)) of one weight; with a rank of 0 if it has no adapter."""
        prefix = f"blocks.{number}.{part}{ADAPTERS}{name}."
        a = factors.get(f"{prefix}a")
        if a is None:
            n_inputs = {"down": config.d_ff, "output": config.n_heads * config.d_head}.get(name, config.d_model)
            new_zeros = next(iter(factors.values())).new_zeros  # with the dtype and device of all factors
            return new_zeros(0, n_inputs), new_zeros(n_outputs, 0)
        return a.flatten(1), factors[f"{prefix}b"].flatten(1).t() * (config.scale * scale)

    def concatenated(*pairs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor] | None:
        a_RD = torch.cat([a for a, _ in pairs])
        return (a_RD, torch.block_diag(*[b for _, b in pairs])) if len(a_RD) else None

    def padded(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        a_RD, b_NR = pair
        return a_RD, F.pad(b_NR, (0, 0, 0, padding))

    n_queries, n_keys = config.n_heads * config.d_head, config.kv_heads * config.d_head
    hidden = ("gate", "up") if config.is_gated else ("up",)
    down_a, down_b = pair("feed_forward", "down", config.d_model, residual_scale)
    return LayerFactors(
        qkv=concatenated(
            pair("attention", "query", n_queries, query_scale),
            pair("attention", "key", n_keys),
            pair("attention", "value", n_keys),
        ),
        output=concatenated(pair("attention", "output", config.d_model, residual_scale)),
        up=concatenated(*[padded(pair("feed_forward", name, config.d_ff)) for name in hidden]),
        down=concatenated((F.pad(down_a, (0, padding)), down_b)),
    )
