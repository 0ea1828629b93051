"""Muon: the update of a matrix is its momentum made orthogonal, so a step moves all singular directions equally.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks". Muon steps the matrices inside blocks;
AdamW steps embedding, head, norms and biases. NorMuon (Li et al. 2025, arXiv 2510.05491) then divides the update of
each neuron by the root of its mean square over the steps.

Dimensions: N matrices of one shape, I rows, J columns.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dist_lm.parallel.gloo import gather_by_exchange
from dist_lm.parallel.mesh import lacks_bf16

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # steepest at 0: singular values from 0.01 to 1 become about 0.7 to 1.2
ITERATIONS = 5
EPSILON = 1e-7
VARIANCE_EPSILON = 1e-8
STACK_BYTES = 256 << 20  # of whole matrices in memory at once


def orthogonal(matrices_NIJ: torch.Tensor) -> torch.Tensor:
    """Matrices with the same singular vectors and singular values of about 1, (N, I, J); computed in bf16 on a GPU that
    has it."""
    half = matrices_NIJ.is_cuda and not lacks_bf16(matrices_NIJ.device)
    x_NIJ = matrices_NIJ.bfloat16() if half else matrices_NIJ
    tall = x_NIJ.shape[-2] > x_NIJ.shape[-1]
    x_NIJ = x_NIJ.mT if tall else x_NIJ
    x_NIJ = x_NIJ / (x_NIJ.norm(dim=(-2, -1), keepdim=True) + EPSILON)
    x_NIJ = newton_schulz(x_NIJ) if x_NIJ.is_cuda else newton_schulz_of_squares(x_NIJ)
    return (x_NIJ.mT if tall else x_NIJ).to(matrices_NIJ.dtype)


def newton_schulz(x_NIJ: torch.Tensor) -> torch.Tensor:
    """Iterates x <- (a + b s + c s^2) x with s = x x^T."""
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        square_NII = x_NIJ @ x_NIJ.mT
        x_NIJ = a * x_NIJ + (b * square_NII + c * square_NII @ square_NII) @ x_NIJ
    return x_NIJ


def newton_schulz_of_squares(x_NIJ: torch.Tensor) -> torch.Tensor:
    """The same iteration with a single product with x: q = a + b s + c s^2 turns s into q s q, because all of these
    matrices commute.

    It takes half the work if J is four times I. It squares the condition number of x, which fp32 allows and bf16 does
    not.
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


@dataclass(frozen=True)
class Variance:
    """NorMuon of one parameter."""

    # average over the steps of the sum of squares of each neuron's update, of `neuron_shape`, on `device_of_whole`
    neuron_sq: torch.Tensor
    beta: float

    def normalise_(self, step: torch.Tensor) -> None:
        """Divide the update of each neuron, in place, by the root of `neuron_sq`, which takes it in first.

        The norm of each matrix stays, as in the authors' normuon.py and in nanochat; algorithm 1 of Li et al. 2025 sets
        it to 0.2 sqrt(I J). The sum of squares, where they have the mean, cancels out.

        Args:
            step: whole orthogonal directions of the parameter; entries beyond those of `neuron_sq` are padding and 0.
        """
        summed_dim = -1 if self.neuron_sq.shape[-1] == 1 else -2
        squares = step.square().sum(summed_dim, keepdim=True)
        logical = tuple(slice(size) for size in self.neuron_sq.shape)
        self.neuron_sq.lerp_(squares[logical], 1 - self.beta)
        factor = torch.zeros_like(squares)
        factor[logical] = 1 / (self.neuron_sq.sqrt() + VARIANCE_EPSILON)
        norm = step.norm(dim=(-2, -1), keepdim=True)
        step.mul_(factor)
        step.mul_(norm / (step.norm(dim=(-2, -1), keepdim=True) + VARIANCE_EPSILON))


def orthogonal_steps(
    parameters: Sequence[torch.Tensor],
    directions: Sequence[torch.Tensor],
    variances: Sequence[Variance | None] | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every parameter with this rank's part of its step, the orthogonalised direction (collective).

    Ranks gather whole matrices, each rank orthogonalises a share of them, and all exchange the results. Every attention
    head has matrices of its own. Offloaded directions go to the GPU of the mesh, and their steps come back.

    Args:
        parameters: DTensors, or plain tensors if every rank holds all of them.
        directions: this rank's shard of every direction.
        variances: NorMuon of the parameters that have it, the same on every rank.
    """
    for together in _stacks(parameters):
        like = parameters[together[0]]
        whole = _whole(like, torch.stack([directions[index] for index in together]))
        whole = _shared_out(whole.view(-1, *whole.shape[-2:])).view_as(whole)
        for step, index in zip(whole, together, strict=True):
            if variances is not None and (variance := variances[index]) is not None:
                variance.normalise_(step)
        steps = _own_part(like, whole).to(directions[together[0]].device)
        yield from zip((parameters[index] for index in together), steps, strict=True)


def _stacks(parameters: Sequence[torch.Tensor]) -> Iterator[list[int]]:
    """Indices of parameters with the same shape and placement, in groups of at most `STACK_BYTES`."""
    alike: dict[Any, list[int]] = {}
    for index, parameter in enumerate(parameters):
        cut = parameter.placements if isinstance(parameter, DTensor) else ()
        alike.setdefault((parameter.shape, cut), []).append(index)
    for (shape, _), indices in alike.items():
        most = max(1, STACK_BYTES // (4 * math.prod(shape)))
        yield from (indices[start : start + most] for start in range(0, len(indices), most))


def _shared_out(stack_NIJ: torch.Tensor) -> torch.Tensor:
    """`orthogonal` of a stack that all ranks have; each rank computes a share."""
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
    """Whether the group uses gloo, and neither NCCL nor the fake backend of a dry run."""
    return dist.get_backend(group) == dist.Backend.GLOO


def _whole(parameter: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """The whole of N tensors with the placement of `parameter`, of which this rank holds `own`. Padding stays 0."""
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


def device_of_whole(parameter: torch.Tensor) -> torch.device | str:
    """Where `orthogonal_steps` computes: on the GPU of the mesh also for a shard in host memory."""
    return parameter.device_mesh.device_type if isinstance(parameter, DTensor) else parameter.device


def _own_part(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """This rank's shard of N whole tensors, with the placement of `parameter`."""
    if not isinstance(parameter, DTensor):
        return whole
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return whole[:, *(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
