"""Muon: the momentum of a matrix made orthogonal, so that a step moves all its directions alike.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks". For the matrices inside blocks only: what
looks tokens up, norms and biases stay with AdamW.

Dimensions: N matrices of one shape, I rows, J columns.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dist_lm.parallel.gloo import gather_by_exchange

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # steepest at 0: singular values of 0.01 to 1 come to about 0.7 to 1.2
ITERATIONS = 5
EPSILON = 1e-7
STACK_BYTES = 256 << 20  # of whole matrices that are in memory at once


def orthogonal(matrices_NIJ: torch.Tensor) -> torch.Tensor:
    """Matrices with the singular vectors of these and singular values of about 1, (N, I, J); bf16 on a GPU."""
    x_NIJ = matrices_NIJ.bfloat16() if matrices_NIJ.is_cuda else matrices_NIJ
    tall = x_NIJ.shape[-2] > x_NIJ.shape[-1]
    x_NIJ = x_NIJ.mT if tall else x_NIJ
    x_NIJ = x_NIJ / (x_NIJ.norm(dim=(-2, -1), keepdim=True) + EPSILON)
    x_NIJ = newton_schulz(x_NIJ) if x_NIJ.is_cuda else newton_schulz_of_squares(x_NIJ)
    return (x_NIJ.mT if tall else x_NIJ).to(matrices_NIJ.dtype)


def newton_schulz(x_NIJ: torch.Tensor) -> torch.Tensor:
    """x <- (a + b s + c s^2) x with s = x x^T, again and again."""
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        square_NII = x_NIJ @ x_NIJ.mT
        x_NIJ = a * x_NIJ + (b * square_NII + c * square_NII @ square_NII) @ x_NIJ
    return x_NIJ


def newton_schulz_of_squares(x_NIJ: torch.Tensor) -> torch.Tensor:
    """The same polynomial, with x multiplied once: q = a + b s + c s^2 makes q s q of s, as all of them commute.

    Half the work where rows are four times as long as there are of them. It squares the condition of x, which fp32
    bears and bf16 would not.
    """
    a, b, c = NEWTON_SCHULZ
    square_NII = x_NIJ @ x_NIJ.mT

    def factor(square_NII: torch.Tensor) -> torch.Tensor:
        found_NII = torch.baddbmm(square_NII, square_NII, square_NII, beta=b, alpha=c)
        found_NII.diagonal(dim1=-2, dim2=-1).add_(a)
        return found_NII

    product_NII = factor_NII = factor(square_NII)
    for _ in range(ITERATIONS - 1):
        square_NII = factor_NII @ square_NII @ factor_NII
        factor_NII = factor(square_NII)
        product_NII = factor_NII @ product_NII
    return product_NII @ x_NIJ


def orthogonal_steps(
    parameters: Sequence[torch.Tensor], directions: Sequence[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every parameter with its step: this rank's part of its whole direction, made orthogonal (collective).

    Ranks gather whole matrices, deal them out, and give each other what came of theirs. Every head of attention has
    matrices of its own.

    Args:
        parameters: DTensors, or plain ones where every rank holds all.
        directions: what this rank holds of each direction.
    """
    for together in _stacks(parameters):
        like = parameters[together[0]]
        whole = _whole(like, torch.stack([directions[index] for index in together]))
        steps = _own_part(like, _shared_out(whole.view(-1, *whole.shape[-2:])).view_as(whole))
        yield from zip((parameters[index] for index in together), steps, strict=True)


def _stacks(parameters: Sequence[torch.Tensor]) -> Iterator[list[int]]:
    """Numbers of parameters of one shape, cut alike, so many that they fit into `STACK_BYTES`."""
    alike: dict[Any, list[int]] = {}
    for index, parameter in enumerate(parameters):
        cut = parameter.placements if isinstance(parameter, DTensor) else ()
        alike.setdefault((parameter.shape, cut), []).append(index)
    for (shape, _), indices in alike.items():
        most = max(1, STACK_BYTES // (4 * math.prod(shape)))
        yield from (indices[start : start + most] for start in range(0, len(indices), most))


def _shared_out(stack_NIJ: torch.Tensor) -> torch.Tensor:
    """`orthogonal` of a stack that all ranks have, each working on its share."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return orthogonal(stack_NIJ)
    ranks, count = dist.get_world_size(), len(stack_NIJ)
    share = -(-count // ranks)
    start = dist.get_rank() * share
    own_NIJ = stack_NIJ.new_zeros(share, *stack_NIJ.shape[1:])
    if start < count:
        mine_NIJ = stack_NIJ[start : start + share]
        own_NIJ[: len(mine_NIJ)] = orthogonal(mine_NIJ)
    assert dist.group.WORLD is not None
    all_NIJ = stack_NIJ.new_empty(share * ranks, *stack_NIJ.shape[1:])
    if _exchanges(dist.group.WORLD):
        gather_by_exchange(all_NIJ, own_NIJ, dist.group.WORLD)
    else:
        dist.all_gather_into_tensor(all_NIJ, own_NIJ)
    return all_NIJ[:count]


def _exchanges(group: dist.ProcessGroup) -> bool:
    """Whether gloo moves tensors of the device that computes, and not NCCL, or nothing in a dry run."""
    return dist.get_backend(group) == dist.Backend.GLOO


def _whole(parameter: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """The whole of which this rank holds `own`: N tensors cut as `parameter` is. Its padding is 0 and stays so."""
    if not isinstance(parameter, DTensor):
        return own
    sharded = [axis for axis, placement in enumerate(parameter.placements) if not placement.is_replicate()]
    if len(sharded) == 1:
        placement, group = parameter.placements[sharded[0]], parameter.device_mesh.get_group(sharded[0])
        if type(placement) is Shard and parameter.shape[placement.dim] % group.size() == 0 and _exchanges(group):
            parts = own.new_empty(group.size(), *own.shape)
            gather_by_exchange(parts, own, group)
            return torch.cat(parts.unbind(0), dim=placement.dim + 1)
    placements = [Shard(one.dim + 1) if isinstance(one, Shard) else one for one in parameter.placements]
    shape = torch.Size((len(own), *parameter.shape))
    stride = (parameter.numel(), *parameter.stride())
    return DTensor.from_local(
        own, parameter.device_mesh, placements, run_check=False, shape=shape, stride=stride
    ).full_tensor()


def _own_part(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """What this rank holds of N whole tensors."""
    if not isinstance(parameter, DTensor):
        return whole
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return whole[:, *(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
