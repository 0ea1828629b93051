"""Every operation of a real or a fake step, shown to those that count.

Three things are not what they seem. An operation on DTensors comes again for the local tensors, and only that is
counted. To learn the shape of its result, DTensor plays it once on tensors of the whole shape, which have no memory:
not counted (they made the optimizer of a large model look 60 times its size). And FSDP2 frees and takes memory by
resizing storages, which is no operation.
"""

from typing import Any, Protocol

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode

ANSWER = 2.0
"""What a fake step reads where it asks a tensor for its value: as a gradient norm it is finite, and clipped to 1."""


class Observer(Protocol):
    """Someone who counts."""

    def after(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """An operation has run."""
        ...

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage has another size."""
        ...


class Watch(TorchDispatchMode):
    """Show observers what happens inside the block."""

    def __init__(self, *observers: Observer) -> None:
        super().__init__()
        self._observers = observers
        self._looking_ahead = False
        self._resize = torch.UntypedStorage.resize_
        self._look_ahead = ShardingPropagator._propagate_tensor_meta_non_cached

    def __enter__(self) -> "Watch":
        resize, look_ahead = self._resize, self._look_ahead

        def resize_and_tell(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            for observer in self._observers:
                observer.resized(storage)

        def look_ahead_unseen(propagator: ShardingPropagator, schema: Any) -> Any:
            self._looking_ahead = True
            try:
                return look_ahead(propagator, schema)
            finally:
                self._looking_ahead = False

        torch.UntypedStorage.resize_ = resize_and_tell  # type: ignore[method-assign]
        ShardingPropagator._propagate_tensor_meta_non_cached = look_ahead_unseen  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        ShardingPropagator._propagate_tensor_meta_non_cached = self._look_ahead  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        fake = bool(args) and isinstance(args[0], FakeTensor)
        if fake and func is torch.ops.prim.device.default:
            return args[0].fake_device  # two of three calls
        if fake and func is torch.ops.aten._local_scalar_dense.default:
            return ANSWER if args[0].is_floating_point() else round(ANSWER)
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        result = func(*args, **kwargs)
        if not self._looking_ahead:
            for observer in self._observers:
                observer.after(func, args, kwargs, result)
        return result
