"""Tensors that leave the memory of a GPU for a while: their values wait in host memory.

Two programs that take turns on one GPU need its memory only while they work. The tensors stay the same objects, and so
do their views: the memory behind them is given back and allocated anew, as FSDP does with gathered parameters.
"""

from collections.abc import Iterable

import torch


class HostCopies:
    """Values of tensors that are away from their device, each in host memory of its own."""

    def __init__(self) -> None:
        # They stay: allocating locked memory takes longer than the copy.
        self._buffers: dict[int, torch.Tensor] = {}
        self._away: list[tuple[torch.Tensor, torch.Tensor]] = []  # (tensor without memory, its values)

    @property
    def n_bytes(self) -> int:
        """The bytes that are away."""
        return sum(values.nbytes for _, values in self._away)

    def move(self, tensors: Iterable[torch.Tensor]) -> None:
        """Moves the values of tensors to the host and frees their memory on the device. They cannot be used until
        `restore` or `forget`.

        Args:
            tensors: each has memory of its own, and all of it.
        """
        assert not self._away, "tensors are away already"
        away = []
        for number, tensor in enumerate(tensors):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, "a view does not have its memory alone"
            buffer = self._buffers.get(number)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty_like(tensor, device="cpu")
                if tensor.device.type == "cuda":
                    buffer = buffer.pin_memory()
                self._buffers[number] = buffer
            buffer.copy_(tensor, non_blocking=True)
            away.append((tensor, buffer))

        # All copies must have ended before their sources are freed.
        if any(tensor.device.type == "cuda" for tensor, _ in away):
            torch.cuda.current_stream().synchronize()
        for tensor, _ in away:
            tensor.untyped_storage().resize_(0)
        self._away = away

    def restore(self) -> None:
        """Gives all tensors their memory and values back."""
        for tensor, values in self._away:
            tensor.untyped_storage().resize_(values.nbytes)
            tensor.copy_(values, non_blocking=True)
        self._away = []

    def forget(self) -> None:
        """Leaves the tensors without memory: others take their place."""
        self._away = []
