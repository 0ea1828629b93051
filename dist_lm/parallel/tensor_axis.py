"""The tensor-parallel axis as modules see it: where activations enter a parallel region, and where they leave it.

Without sequence parallelism every rank holds the whole residual stream: entering is free and its gradients are added
up, leaving adds up the parts (Shoeybi et al. 2019, figure 3: fairscale's `f` and `g`). With it a rank holds
1/tp of the tokens of each sequence: entering gathers them, leaving adds up the parts and keeps the own tokens
(Korthikanti et al. 2022, figure 5).

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
    functional: bool  # reduce into a new tensor, which selective checkpointing can keep, not in place

    def check_current(self) -> None:
        """Refuse to compute where fairscale's regions would use another group.

        Raises:
            RuntimeError: a mesh with other tensor-parallel groups was built since.
        """
        if get_model_parallel_group() is not self.group:
            raise RuntimeError(
                "another mesh was built in this process since this model's: fairscale's regions know one "
                "tensor-parallel group, so models of one process have to share a mesh"
            )

    def enter(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """The residual stream, whole, as input of this rank's part of a layer."""
        if self.sp:
            return wait_tensor(all_gather_single_autograd(x_BTD, TOKEN_DIM, self.group))
        return copy_to_model_parallel_region(x_BTD)

    def leave(self, part_BTD: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' parts, as the residual stream holds it; `part_BTD` may be overwritten."""
        if self.sp:
            return wait_tensor(reduce_scatter_single_autograd(part_BTD, "sum", TOKEN_DIM, self.group))
        if self.functional:
            return _SumOfParts.apply(part_BTD, self.group)
        return reduce_from_model_parallel_region(part_BTD)

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' parts, the same on all of them, whose gradient is too."""
        return _SumOfParts.apply(part, self.group)

    def first_token(self, n_tokens: int) -> int:
        """Index of the first token that the residual stream holds here, in sequences of `n_tokens`."""
        assert not self.sp or n_tokens % self.size == 0, f"{n_tokens} tokens over {self.size} ranks"
        return self.rank * n_tokens // self.size if self.sp else 0


class _SumOfParts(torch.autograd.Function):
    """All-reduce, whose gradient is the same on every rank already."""

    @staticmethod
    def forward(ctx, part: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        return wait_tensor(all_reduce(part, "sum", group))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def local(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's shard, padding included; its gradient is a DTensor with the parameter's placements."""
    if not isinstance(parameter, DTensor):
        return parameter
    # the compiler knows to_local
    return parameter.to_local() if torch.compiler.is_compiling() else _Shard.apply(parameter)


class _Shard(torch.autograd.Function):
    """`DTensor.to_local` without its checks, which took a tenth of a step of a small model."""

    @staticmethod
    def forward(ctx, parameter: DTensor) -> torch.Tensor:
        ctx.spec = parameter._spec
        return parameter._local_tensor.detach()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> DTensor:
        return DTensor(gradient, ctx.spec, requires_grad=False)
