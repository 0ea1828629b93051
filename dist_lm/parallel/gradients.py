"""Gradients of which ranks hold parts: sums over the tensor-parallel axis, and the norms of their parts."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from dist_lm.parallel.padding import shard_of
from dist_lm.parallel.tensor_parallel import TensorParallelTransformer


@torch.no_grad()
def reduce_partial_gradients(model: nn.Module) -> None:
    """Sum over tp the gradients of parameters that every tp rank holds but uses a part of (collective).

    Once a step, after the last micro-batch, all in one message. The shards of FSDP are summed: both sums are linear, so
    their order does not matter.
    """
    if not isinstance(model, TensorParallelTransformer):
        return
    parameters = dict(model.named_parameters())
    gradients = [shard_of(gradient) for name in model.partial if (gradient := parameters[name].grad) is not None]
    assert len(gradients) == len(model.partial), "every parameter takes part in every step"
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=model.axis.group)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def squared_norms(parts: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """This rank's part of the squared L2 norm of each part of the gradients: (len(parts),) float64; those of all ranks
    add up. At least one part has a gradient."""
    counted = [[shard_of(gradient) for gradient in part if is_first_copy(gradient)] for part in parts]
    flat = [shard for part in counted for shard in part]
    if not flat:
        device = next(gradient.device for part in parts for gradient in part)
        return torch.zeros(len(parts), dtype=torch.float64, device=device)
    squares = torch.stack(torch._foreach_norm(flat)).double().square()
    return torch.stack([part.sum() for part in squares.split([len(part) for part in counted])])


def is_first_copy(tensor: torch.Tensor) -> bool:
    """Whether this rank is the first of those that hold the same shard."""
    if not isinstance(tensor, DTensor):
        return True
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    return all(
        index == 0 for index, placement in zip(coordinate, tensor.placements, strict=True) if placement.is_replicate()
    )
