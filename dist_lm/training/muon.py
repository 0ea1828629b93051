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

from dist_lm.parallel.gloo import gather_by_exchange
from dist_lm.parallel.mesh import lacks_bf16
from dist_lm.parallel.values import shard_box

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # steepest at 0: singular values from 0.01 to 1 become about 0.7 to 1.2
ITERATIONS = 5
EPSILON = 1e-7
VARIANCE_EPSILON = 1e-8
STACK_BYTES = 256 << 20  # most bytes of unsharded matrices in memory at once


def orthogonal(matrices_NIJ: torch.Tensor) -> torch.Tensor:
    """Returns matrices with the same singular vectors and singular values of about 0.7 to 1.2, (N, I, J), in the same
    dtype.

    It is computed in bf16 on a GPU that has it. The input stays as it is.
    """
    x_NIJ = matrices_NIJ
    if x_NIJ.is_cuda and not lacks_bf16(x_NIJ.device):
        x_NIJ = x_NIJ.bfloat16()

    # x x^T is smaller for a wide matrix.
    is_tall = x_NIJ.shape[-2] > x_NIJ.shape[-1]
    if is_tall:
        x_NIJ = x_NIJ.mT

    x_NIJ = x_NIJ / (x_NIJ.norm(dim=(-2, -1), keepdim=True) + EPSILON)
    x_NIJ = newton_schulz(x_NIJ) if x_NIJ.is_cuda else newton_schulz_of_squares(x_NIJ)

    if is_tall:
        x_NIJ = x_NIJ.mT
    return x_NIJ.to(matrices_NIJ.dtype)


def newton_schulz(x_NIJ: torch.Tensor) -> torch.Tensor:
    """Returns x after ITERATIONS times x <- (a + b s + c s^2) x with s = x x^T; the Frobenius norm of x must be at most
    1."""
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        square_NII = x_NIJ @ x_NIJ.mT
        x_NIJ = a * x_NIJ + (b * square_NII + c * square_NII @ square_NII) @ x_NIJ
    return x_NIJ


def newton_schulz_of_squares(x_NIJ: torch.Tensor) -> torch.Tensor:
    """Returns the same as `newton_schulz` with a single product with x: q = a + b s + c s^2 turns s into q s q, because
    all of these matrices commute.

    It takes half the work if J is four times I. It squares the condition number of x, which fp32 allows and bf16 does
    not.
    """
    a, b, c = NEWTON_SCHULZ

    def factor(square_NII: torch.Tensor) -> torch.Tensor:
        q_NII = torch.baddbmm(square_NII, square_NII, square_NII, beta=b, alpha=c)
        q_NII.diagonal(dim1=-2, dim2=-1).add_(a)
        return q_NII

    square_NII = x_NIJ @ x_NIJ.mT
    product_NII = factor_NII = factor(square_NII)
    for _ in range(ITERATIONS - 1):
        square_NII = factor_NII @ square_NII @ factor_NII
        factor_NII = factor(square_NII)
        product_NII = factor_NII @ product_NII
    return product_NII @ x_NIJ


@dataclass(frozen=True)
class Variance:
    """NorMuon of one parameter."""

    # Average over the steps of the sum of squares of each neuron's update, of `neuron_shape`, on `device_of_whole`.
    neuron_sq: torch.Tensor
    beta: float

    def normalise_(self, step: torch.Tensor) -> None:
        """Moves `neuron_sq` towards the squares of the update, then divides the update of each neuron by its root; both
        in place.

        The norm of each matrix stays, as in the authors' normuon.py and in nanochat; algorithm 1 of Li et al. 2025 sets
        it to 0.2 sqrt(I J). The sum of squares, where they have the mean, cancels out.

        Args:
            step: unsharded orthogonal directions of the parameter; entries outside `neuron_sq` are padding and 0.
        """
        input_dim = -1 if self.neuron_sq.shape[-1] == 1 else -2
        squares = step.square().sum(input_dim, keepdim=True)
        logical = tuple(slice(size) for size in self.neuron_sq.shape)
        self.neuron_sq.lerp_(squares[logical], 1 - self.beta)

        factor = torch.zeros_like(squares)
        factor[logical] = 1 / (self.neuron_sq.sqrt() + VARIANCE_EPSILON)

        # The matrix keeps its norm, so a learning rate means the same with and without NorMuon.
        norm = step.norm(dim=(-2, -1), keepdim=True)
        step.mul_(factor)
        step.mul_(norm / (step.norm(dim=(-2, -1), keepdim=True) + VARIANCE_EPSILON))


def orthogonal_steps(
    parameters: Sequence[torch.Tensor],
    directions: Sequence[torch.Tensor],
    variances: Sequence[Variance | None] | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields every parameter with this rank's shard of its step, the orthogonalised direction (collective).

    Ranks gather unsharded matrices, each rank orthogonalises a share of them, and all exchange these. Every attention
    head has a matrix per projection. Offloaded directions go to the GPU of the mesh, and their steps come back.
    Parameters come in the order of their stacks, not in that of `parameters`.

    Args:
        parameters: DTensors, or plain tensors if every rank holds all of them.
        directions: this rank's shard of every direction, with padding; not changed.
        variances: NorMuon of the parameters that have it, the same on every rank; they are updated.
    """
    # Parameters of one kind go through in stacks: few messages, few kernels.
    for indices in _stacks(parameters):
        like = parameters[indices[0]]
        stack = _unshard(like, torch.stack([directions[index] for index in indices]))
        stack = _orthogonal_on_all_ranks(stack.view(-1, *stack.shape[-2:])).view_as(stack)

        for step, index in zip(stack, indices, strict=True):
            if variances is not None and (variance := variances[index]) is not None:
                variance.normalise_(step)

        shards = stack[:, *shard_box(like)].to(directions[indices[0]].device)
        yield from zip((parameters[index] for index in indices), shards, strict=True)


def _stacks(parameters: Sequence[torch.Tensor]) -> Iterator[list[int]]:
    """Yields indices of parameters with the same shape and placement, in groups of at most `STACK_BYTES` (at least
    one)."""
    alike: dict[Any, list[int]] = {}
    for index, parameter in enumerate(parameters):
        placements = getattr(parameter, "placements", ())  # a plain tensor has none
        alike.setdefault((parameter.shape, placements), []).append(index)
    for (shape, _), indices in alike.items():
        # Unsharded fp32 matrices: a stack must not fill the memory that FSDP saves.
        stack_size = max(1, STACK_BYTES // (4 * math.prod(shape)))
        yield from (indices[start : start + stack_size] for start in range(0, len(indices), stack_size))


def _orthogonal_on_all_ranks(stack_NIJ: torch.Tensor) -> torch.Tensor:
    """Returns `orthogonal` of a stack that all ranks have; each rank computes an equal share (collective)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return orthogonal(stack_NIJ)

    n_ranks, n_matrices = dist.get_world_size(), len(stack_NIJ)
    share = -(-n_matrices // n_ranks)
    start = dist.get_rank() * share
    part_NIJ = stack_NIJ.new_zeros(share, *stack_NIJ.shape[1:])  # the last shares may be shorter or empty
    if start < n_matrices:
        matrices_NIJ = stack_NIJ[start : start + share]
        part_NIJ[: len(matrices_NIJ)] = orthogonal(matrices_NIJ)

    assert dist.group.WORLD is not None
    gathered_NIJ = stack_NIJ.new_empty(share * n_ranks, *stack_NIJ.shape[1:])
    if _uses_gloo(dist.group.WORLD):
        gather_by_exchange(gathered_NIJ, part_NIJ, dist.group.WORLD)
    else:
        dist.all_gather_into_tensor(gathered_NIJ, part_NIJ)
    return gathered_NIJ[:n_matrices]


def _uses_gloo(group: dist.ProcessGroup) -> bool:
    """Returns whether the group uses gloo, and neither NCCL nor the fake backend of a dry run."""
    return dist.get_backend(group) == dist.Backend.GLOO


def _unshard(parameter: torch.Tensor, shards: torch.Tensor) -> torch.Tensor:
    """Returns N unsharded tensors (N, ...) like `parameter`, of which this rank has `shards`, in the placement of
    `parameter` (collective). A plain tensor's shards are returned as they are.

    Padding stays 0.
    """
    if not isinstance(parameter, DTensor):
        return shards

    # Exchange takes less CPU time than gloo's own collective, but needs equal shards on one axis.
    sharded_axes = [axis for axis, placement in enumerate(parameter.placements) if not placement.is_replicate()]
    if len(sharded_axes) == 1:
        axis = sharded_axes[0]
        placement, group = parameter.placements[axis], parameter.device_mesh.get_group(axis)
        if type(placement) is Shard and parameter.shape[placement.dim] % group.size() == 0 and _uses_gloo(group):
            gathered = shards.new_empty(group.size(), *shards.shape)
            gather_by_exchange(gathered, shards, group)
            return torch.cat(gathered.unbind(0), dim=placement.dim + 1)

    # The stack has one dimension more than the parameter.
    placements = [Shard(p.dim + 1) if isinstance(p, Shard) else p for p in parameter.placements]
    shape = torch.Size((len(shards), *parameter.shape))
    stride = (parameter.numel(), *parameter.stride())
    return DTensor.from_local(
        shards, parameter.device_mesh, placements, run_check=False, shape=shape, stride=stride
    ).full_tensor()


def device_of_whole(parameter: torch.Tensor) -> torch.device | str:
    """Returns the device on which `orthogonal_steps` computes: the GPU of the mesh also for a shard in host memory."""
    if isinstance(parameter, DTensor):
        return parameter.device_mesh.device_type
    return parameter.device
