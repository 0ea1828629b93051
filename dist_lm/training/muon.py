"""Muon: the update of a matrix is its momentum made orthogonal, so a step moves all singular directions equally.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks". Muon steps the matrices inside blocks;
AdamW steps embedding, head, norms and biases. NorMuon (Li et al. 2025, arXiv 2510.05491) then divides the update of
each neuron by the root of its mean square over the steps.

A matrix is orthogonalised whole. This module steps matrices that one rank holds whole; with several ranks, shards go to
an owner and steps come back (`training.muon_exchange`).

Dimensions: N matrices of one shape, I rows, J columns.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from dist_lm.parallel.mesh import lacks_bf16
from dist_lm.parallel.owners import BUCKET_BYTES, CPU_FLOPS_PER_BYTE, GPU_FLOPS_PER_BYTE, ITERATIONS
from dist_lm.parallel.values import shard_of

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # steepest at 0: singular values from 0.01 to 1 become about 0.7 to 1.2
ALL_ITERATIONS = range(ITERATIONS)
EPSILON = 1e-7
VARIANCE_EPSILON = 1e-8
STACK_BYTES = 256 << 20  # most bytes of whole matrices that a single rank handles at once


@dataclass(frozen=True)
class Arithmetic:
    """The arithmetic by which a kind of device orthogonalises matrices, and the most that it does at once."""

    dtype: torch.dtype | None  # dtype of matrices, also in messages; None: that of the gradients
    by_squares: bool  # whether it takes `newton_schulz_of_squares`
    flops_per_byte: float  # FLOPs in the time that one byte takes to come from another replica
    bucket_bytes: int = BUCKET_BYTES  # most bytes of matrices that a rank owns in one exchange


CPU = Arithmetic(None, True, CPU_FLOPS_PER_BYTE)
GPU = Arithmetic(torch.bfloat16, False, GPU_FLOPS_PER_BYTE)
GPU_WITHOUT_BF16 = Arithmetic(None, False, 1_000.0)  # V100: 0.7 of 16 TFLOP/s beside 12.5 GB/s


def arithmetic_of(device: torch.device) -> Arithmetic:
    """Returns how a device orthogonalises."""
    if device.type != "cuda":
        return CPU
    return GPU_WITHOUT_BF16 if lacks_bf16(device) else GPU


def orthogonal(
    matrices_NIJ: torch.Tensor, arithmetic: Arithmetic | None = None, iterations: range = ALL_ITERATIONS
) -> torch.Tensor:
    """Returns matrices with the same singular vectors and singular values of about 0.7 to 1.2, (N, I, J), in the same
    dtype. The input stays as it is.

    Args:
        arithmetic: None: that of the device of the matrices.
        iterations: fewer than all: another call goes on with the result of the one before. Not by squares.
    """
    arithmetic = arithmetic or arithmetic_of(matrices_NIJ.device)
    x_NIJ = matrices_NIJ.to(arithmetic.dtype or matrices_NIJ.dtype)

    # x x^T is smaller for a wide matrix.
    is_tall = x_NIJ.shape[-2] > x_NIJ.shape[-1]
    if is_tall:
        x_NIJ = x_NIJ.mT

    if iterations.start == 0:
        x_NIJ = x_NIJ / (x_NIJ.norm(dim=(-2, -1), keepdim=True) + EPSILON)
    if arithmetic.by_squares:
        assert iterations == ALL_ITERATIONS, "squares are taken once for all iterations"
        x_NIJ = newton_schulz_of_squares(x_NIJ)
    else:
        x_NIJ = newton_schulz(x_NIJ, len(iterations))

    if is_tall:
        x_NIJ = x_NIJ.mT
    return x_NIJ.to(matrices_NIJ.dtype)


def newton_schulz(x_NIJ: torch.Tensor, n_iterations: int = ITERATIONS) -> torch.Tensor:
    """Returns x after n_iterations times x <- (a + b s + c s^2) x with s = x x^T; the Frobenius norm of x must be at
    most 1 before the first one."""
    a, b, c = NEWTON_SCHULZ
    for _ in range(n_iterations):
        # Sums inside products: fewer passes over the matrices, and fewer roundings in bf16.
        square_NII = x_NIJ @ x_NIJ.mT
        factor_NII = torch.baddbmm(square_NII, square_NII, square_NII, beta=b, alpha=c)
        x_NIJ = torch.baddbmm(x_NIJ, factor_NII, x_NIJ, beta=a)
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
    is_skipped: torch.Tensor | None = None  # bool scalar: the step is dropped, and `neuron_sq` must stay

    def normalise_(self, step: torch.Tensor) -> None:
        """Moves `neuron_sq` towards the squares of the update, then divides the update of each neuron by its root; both
        in place.

        The norm of each matrix stays, as in the authors' normuon.py and in nanochat; algorithm 1 of Li et al. 2025 sets
        it to 0.2 sqrt(I J). The sum of squares, where they have the mean, cancels out.

        Args:
            step: whole orthogonal directions of the parameter; entries outside `neuron_sq` are padding and 0.
        """
        input_dim = -1 if self.neuron_sq.shape[-1] == 1 else -2
        # Squares in the dtype of `neuron_sq`, also of a step in bf16.
        lengths = torch.linalg.vector_norm(step, dim=input_dim, keepdim=True, dtype=self.neuron_sq.dtype)
        squares = lengths.square()
        logical = tuple(slice(size) for size in self.neuron_sq.shape)
        new_squares = squares[logical]
        if self.is_skipped is not None:
            new_squares = torch.where(self.is_skipped, self.neuron_sq, new_squares)
        self.neuron_sq.lerp_(new_squares, 1 - self.beta)

        factor = torch.zeros_like(squares)
        factor[logical] = 1 / (self.neuron_sq.sqrt() + VARIANCE_EPSILON)

        # The matrix keeps its norm, so a learning rate means the same with and without NorMuon.
        norm = squares.sum(dim=(-2, -1), keepdim=True).sqrt()
        divided_norm = (squares * factor.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
        step.mul_(factor * (norm / (divided_norm + VARIANCE_EPSILON)))


@dataclass(frozen=True)
class Stepped:
    """A parameter that Muon steps, and what its step depends on."""

    parameter: torch.Tensor  # a DTensor, or a plain tensor if every rank holds all of it
    gradient: torch.Tensor  # this rank's shard, with padding
    average: torch.Tensor  # this rank's shard of the momentum
    momentum: float
    variance: Variance | None  # NorMuon

    def direction(self, part: slice = slice(None)) -> torch.Tensor:
        """Returns Nesterov's momentum for a part of this rank's shard, in the shape of the part.

        Args:
            part: rows, along the first dimension.
        """
        return self.gradient[part].lerp(self.average[part], self.momentum)


def orthogonal_steps(stepped: Sequence[Stepped]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yields (number in `stepped`, this rank's shard of the parameter, its step) for parameters that this rank holds
    whole.

    The step is the orthogonalised direction. Every attention head has a matrix per projection. Variances are updated.
    """
    # Parameters of one shape go through in stacks: few kernels.
    for numbers in _stacks(stepped):
        shards = [shard_of(stepped[number].parameter) for number in numbers]
        directions = torch.stack([stepped[number].direction() for number in numbers])
        directions = directions.to(device_of_whole(stepped[numbers[0]].parameter))
        stack = orthogonal(directions.view(-1, *directions.shape[-2:])).view_as(directions)

        for number, shard, step in zip(numbers, shards, stack, strict=True):
            if (variance := stepped[number].variance) is not None:
                variance.normalise_(step)
            yield number, shard, step.to(shard.device)


def _stacks(stepped: Sequence[Stepped]) -> Iterator[list[int]]:
    """Yields numbers of parameters with the same shape, in groups of at most `STACK_BYTES` (at least one)."""
    alike: dict[torch.Size, list[int]] = {}
    for number, moved in enumerate(stepped):
        alike.setdefault(moved.parameter.shape, []).append(number)
    for shape, numbers in alike.items():
        # Whole fp32 matrices: a stack must not fill the memory that activations have left.
        stack_size = max(1, STACK_BYTES // (4 * math.prod(shape)))
        yield from (numbers[start : start + stack_size] for start in range(0, len(numbers), stack_size))


def device_of_whole(parameter: torch.Tensor) -> torch.device | str:
    """Returns the device on which `orthogonal_steps` computes: the GPU of the mesh also for a shard in host memory."""
    if isinstance(parameter, DTensor):
        return parameter.device_mesh.device_type
    return parameter.device
