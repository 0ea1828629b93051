"""Tensors of safetensors files that are read or written one at a time."""

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch

from dist_lm.errors import ArtefactError
from dist_lm.model.size import Shape
from dist_lm.training.checkpoint_tensors import ComputedTensor, StoredTensor

DTYPES = {"bf16": ("BF16", torch.bfloat16), "fp32": ("F32", torch.float32)}  # names in safetensors and torch
TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
FILE_BYTES = 4 << 30  # most weights in one file
Read = Callable[[str], torch.Tensor]  # a parameter of ours by its name


def in_files(
    tensors: Mapping[str, StoredTensor | ComputedTensor], file_bytes: int
) -> Iterator[dict[str, StoredTensor | ComputedTensor]]:
    """Yields the tensors of each file, in order: a new file starts when a tensor does not fit into `file_bytes`."""
    # A tensor larger than `file_bytes` gets a file of its own.
    part: dict[str, StoredTensor | ComputedTensor] = {}
    for name, tensor in tensors.items():
        if part and sum(stored.bytes for stored in part.values()) + tensor.bytes > file_bytes:
            yield part
            part = {}
        part[name] = tensor
    yield part


def as_torch(tensor: StoredTensor | ComputedTensor, name: str) -> torch.Tensor:
    """Returns a stored tensor.

    Raises:
        ArtefactError: its dtype is none of fp32, fp16 and bf16; names the tensor.
    """
    if tensor.dtype not in TORCH:
        file = f"{tensor.parts[0].file}: " if isinstance(tensor, StoredTensor) else ""
        raise ArtefactError(f"{file}{name} is {tensor.dtype}: expected {', '.join(TORCH)}")
    return torch.from_numpy(tensor.read()).view(TORCH[tensor.dtype]).view(tensor.shape)


def made(dtype: str, shape: Shape, make: Callable[[], torch.Tensor]) -> ComputedTensor:
    """Returns a tensor of a file, computed when it is written. `dtype`: name of safetensors."""
    torch_dtype = TORCH[dtype]
    return ComputedTensor(dtype, shape, math.prod(shape) * torch_dtype.itemsize, lambda: _bytes(make().to(torch_dtype)))


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()
