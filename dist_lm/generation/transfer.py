"""Copies between the host and the device of an engine: few, because each costs microseconds of a decode step.

Several tensors travel in one copy, as bytes one after the other. Uploads start in pinned memory, so that the host does
not wait for them; in a download it waits for the device. On a CPU nothing is copied.
"""

from collections.abc import Sequence

import torch


def upload(device: torch.device, *arrays: torch.Tensor) -> Sequence[torch.Tensor]:
    """Returns host tensors on the device, in their order, shapes and dtypes, sent in one copy. The host does not wait.

    On a CPU the tensors themselves are returned.

    Args:
        arrays: tensors of the widest dtype first, so that all are aligned.
    """
    if device.type == "cpu":
        return arrays
    # The allocator of pinned memory reuses the block only after the copy has ended.
    return _unpack(_pack(arrays).pin_memory().to(device, non_blocking=True), arrays)


def download(*arrays: torch.Tensor) -> Sequence[torch.Tensor]:
    """Returns tensors of one device on the host, in their order, shapes and dtypes, sent in one copy. The host waits
    until the device has computed them. On a CPU the tensors themselves are returned.

    Args:
        arrays: tensors of the widest dtype first, so that all are aligned.
    """
    if arrays[0].device.type == "cpu":
        return arrays
    return _unpack(_pack(arrays).cpu(), arrays)


def concatenated(parts: list[torch.Tensor]) -> torch.Tensor:
    """Returns the parts one after the other along dimension 0; a single part is returned itself, without a copy."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts)


def _pack(arrays: Sequence[torch.Tensor]) -> torch.Tensor:
    # Bytes, because the tensors have different dtypes.
    return torch.cat([array.flatten().view(torch.uint8) for array in arrays])


def _unpack(packed: torch.Tensor, arrays: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns views of the packed bytes with the dtypes and shapes of `arrays`."""
    views, begin = [], 0
    for array in arrays:
        assert begin % array.itemsize == 0, "arrays with the largest numbers come first"
        views.append(packed[begin : begin + array.nbytes].view(array.dtype).view(array.shape))
        begin += array.nbytes
    return views
