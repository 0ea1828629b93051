"""The tensor-parallel axis as modules see it: activations enter a parallel region, and leave it.

Without sequence parallelism every rank holds the whole residual stream. Entering is free and its backward pass sums
gradients; leaving sums the parts of the ranks (Shoeybi et al. 2019, figure 3: `f` and `g`, from fairscale). With
sequence parallelism a rank holds 1/tp of the tokens of each sequence. Entering gathers the tokens; leaving sums the
parts and keeps the tokens of the rank (Korthikanti et al. 2022, figure 5).

Dimensions: B sequences, T tokens (of a rank, under sequence parallelism), D d_model.
"""

from dataclasses import dataclass

import torch
from fairscale.nn.model_parallel.initialize import get_model_parallel_group
from fairscale.nn.model_parallel.mappings import copy_to_model_parallel_region, reduce_from_model_parallel_region
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import (
    all_gather_single_autograd,
    all_reduce,
    reduce_scatter_single_autograd,
    wait_tensor,
)
from torch.distributed.tensor import DTensor

TOKEN_DIM = 1


@dataclass(frozen=True)
class TensorAxis:
    """The ranks that share every layer of one copy of the model."""

    group: ProcessGroup
    size: int
    rank: int
    sp: bool  # sequence parallelism
    functional: bool  # sum into a new tensor, not in place, so that selective checkpointing can keep it

    def check_current(self) -> None:
        """Checks that the regions of fairscale use this group.

        Raises:
            RuntimeError: another mesh with other tensor-parallel groups was built since.
        """
        if get_model_parallel_group() is not self.group:
            raise RuntimeError(
                "this process has built another mesh since it built the mesh of this model: fairscale has one "
                "tensor-parallel group per process, so all models of a process must share a mesh"
            )

    def enter(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Returns the residual stream of all tokens, as input of this rank's part of a layer; it is gathered with
        sequence parallelism, and its gradient is summed over ranks (collective)."""
        if self.sp:
            return wait_tensor(all_gather_single_autograd(x_BTD, TOKEN_DIM, self.group))
        return copy_to_model_parallel_region(x_BTD)

    def leave(self, part_BTD: torch.Tensor) -> torch.Tensor:
        """Returns the sum of the parts of all ranks, as residual stream (collective): with sequence parallelism that of
        the tokens of this rank. It may overwrite `part_BTD`."""
        if self.sp:
            return wait_tensor(reduce_scatter_single_autograd(part_BTD, "sum", TOKEN_DIM, self.group))
        if self.functional:
            return _AllReduce.apply(part_BTD, self.group)
        return reduce_from_model_parallel_region(part_BTD)

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """Returns the sum of the parts of all ranks, in their shape (collective). Every rank must give the sum the same
        gradient."""
        return _AllReduce.apply(part, self.group)

    def sum_of_shares(self, part: torch.Tensor) -> torch.Tensor:
        """Returns the sum of the parts of all ranks, from which each rank computes its own share of a layer: the
        gradient is the sum over ranks too."""
        return _SharedAllReduce.apply(part, self.group)

    def first_held_index(self, n_tokens: int) -> int:
        """Returns the index, in its sequence of `n_tokens`, of the first token that this rank holds in its stream."""
        if not self.sp:
            return 0
        assert n_tokens % self.size == 0, f"{n_tokens} tokens over {self.size} ranks"
        return self.rank * n_tokens // self.size


class _AllReduce(torch.autograd.Function):
    """An all-reduce whose sum has the same gradient on every rank, so its backward pass sends nothing."""

    @staticmethod
    def forward(ctx, part: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        return wait_tensor(all_reduce(part, "sum", group))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _SharedAllReduce(torch.autograd.Function):
    """An all-reduce whose sum has another gradient on every rank."""

    @staticmethod
    def forward(ctx, part: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return wait_tensor(all_reduce(part, "sum", group))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return wait_tensor(all_reduce(gradient.contiguous(), "sum", ctx.group)), None


def local(parameter: torch.Tensor) -> torch.Tensor:
    """Returns this rank's shard, with padding; its gradient is a DTensor with the placements of the parameter."""
    if not isinstance(parameter, DTensor):
        return parameter
    if torch.compiler.is_compiling():
        return parameter.to_local()  # the compiler knows it, unlike `_Shard`
    return _Shard.apply(parameter)


class _Shard(torch.autograd.Function):
    """`DTensor.to_local` without its checks, which took 10 % of the step time of a small model."""

    @staticmethod
    def forward(ctx, parameter: DTensor) -> torch.Tensor:
        ctx.spec = parameter._spec
        return parameter._local_tensor.detach()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> DTensor:
        return DTensor(gradient, ctx.spec, requires_grad=False)
