"""How many bytes of tensors are alive, at every moment of a step.

A storage is counted from the first operation that shows it until it is freed or resized. gloo's own gathering and
scattering (FSDP exchanges instead) goes through a copy of the whole tensor, which no operation shows; NCCL's does not.
"""

import weakref
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from dist_lm.dry_run.collectives import collective_of

COPIED_BY_GLOO = ("all_gather", "reduce_scatter")


class LiveMemory:
    """An observer of `Watch`. What an operation takes and frees inside is not seen."""

    def __init__(self, gloo: bool) -> None:
        self.live = 0  # bytes now
        self.peak = 0  # most bytes so far
        self._gloo = gloo
        self._sizes: dict[int, int] = {}  # by id of the storage
        self._references: dict[int, weakref.ref] = {}

    def after(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self.resized(leaf.untyped_storage())
        if self._gloo and (collective := collective_of(func, args, result)) and collective.kind in COPIED_BY_GLOO:
            self.peak = max(self.peak, self.live + collective.size)

    def resized(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        before = self._sizes.get(key)
        if before is None:
            self._references[key] = weakref.ref(storage, lambda _, key=key: self._drop(key))
        if size != before:
            self._sizes[key] = size
            self.live += size - (before or 0)
            self.peak = max(self.peak, self.live)

    def reset_peak(self) -> None:
        """Forget earlier peaks."""
        self.peak = self.live

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
        del self._references[key]
