"""Where what a rank computes meets what the other ranks compute: the regions of training, around plain layers.

Dimensions: M rows, D d_model, V vocabulary, U pieces of it that a rank holds.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812  the name the field uses

from dist_lm.generation.linear import Linear
from dist_lm.parallel.placement import Slice, slice_of
from dist_lm.parallel.tensor_axis import TensorAxis

LEADER = 0  # the rank that chooses tokens


def build_embedding(
    weight_UD: torch.Tensor, pieces: Slice, axis: TensorAxis | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """From tokens (M,) to the residual stream (M, D)."""
    if axis is None:
        whole_VD = weight_UD.clone()
        return lambda token_M: F.embedding(token_M, whole_VD)
    # a row of zeros for tokens of other ranks: a product with 0 would let through what is not a number
    held_UD = F.pad(weight_UD, (0, 0, 0, 1))

    def embed(token_M: torch.Tensor) -> torch.Tensor:
        axis.check_current()  # here a forward pass begins
        row_M = token_M - pieces.start
        held_M = (row_M >= 0) & (row_M < pieces.real)
        return axis.leave(F.embedding(row_M.where(held_M, pieces.held), held_UD))

    return embed


def leaving(linear: Linear, axis: TensorAxis) -> Linear:
    """A layer with this rank's part of the inputs: all ranks get the sum of what they compute."""

    def summed(x_MD: torch.Tensor, added_MN: torch.Tensor | None = None) -> torch.Tensor:
        y_MN = axis.leave(linear(x_MD))
        return y_MN if added_MN is None else added_MN + y_MN

    return summed


def gathering(linear: Linear, axis: TensorAxis, vocabulary: int) -> Linear:
    """The head: the leader gets the logits of all pieces (M, V), every other rank its own (M, U)."""
    real = [slice_of(vocabulary, axis.size, rank).real for rank in range(axis.size)]

    def gathered(x_MD: torch.Tensor, added_MN: torch.Tensor | None = None) -> torch.Tensor:
        assert added_MN is None
        part_MU = linear(x_MD)
        if axis.rank != LEADER:
            dist.gather(part_MU, group=axis.group, group_dst=LEADER)
            return part_MU
        parts = list(part_MU.new_empty(axis.size, *part_MU.shape).unbind())
        dist.gather(part_MU, parts, group=axis.group, group_dst=LEADER)
        return torch.cat([part[:, :n] for part, n in zip(parts, real, strict=True)], dim=1)

    return gathered
