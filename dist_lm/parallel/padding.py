"""The logical part of a padded tensor: what checkpoints hold, and what `full_tensor()` of a parameter means.

Tensor parallelism pads a dimension of n to `tp * ceil(n / tp)`, so a rank's shard is what `torch.chunk` of the unpadded
tensor would give it, followed by zeros: the first entries of a padded shard *are* the shard of the logical tensor.
"""

import math
from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def logical(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A tensor of logical `shape` that shares its memory with `tensor` (a parameter, or a moment of it).

    Scalars, plain tensors and DTensors without padding come back as they are. The shards of the result may be uneven,
    empty, and not contiguous.
    """
    shape = torch.Size(shape)
    if tensor.dim() == 0 or tensor.shape == shape:
        return tensor
    assert isinstance(tensor, DTensor), f"shape {tuple(tensor.shape)}, expected {tuple(shape)}"
    own, _ = compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)
    part = shard_of(tensor)[tuple(slice(size) for size in own)]
    stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return DTensor.from_local(part, tensor.device_mesh, tensor.placements, run_check=False, shape=shape, stride=stride)


def shard_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, padding included, outside autograd."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
