"""Counts live bytes, arithmetic, memory traffic and messages of the operations of a step, real or fake.

`Watch` reports every operation to observers; `LiveMemory` and `WorkCounter` are observers.
"""

import itertools
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from dist_lm.config.cluster import HardwareConfig
from dist_lm.dry_run.heap import BETWEEN_TENSORS, Heap
from dist_lm.dry_run.work import WORLD, Work

ANSWER = 2.0
"""The value of every fake tensor that a step reads: a gradient norm that is finite and clipped to 1."""
COPIED_BY_GLOO = ("all_gather", "reduce_scatter")  # collectives for which gloo copies the full tensor
aten = torch.ops.aten
WAIT = torch.ops._c10d_functional.wait_tensor.default
FREE = (  # allocations, and waiting for a message that is counted by itself
    *(aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default),
    WAIT,
)
ATTENTION = (  # kernels of fake tensors on the CPU
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
)
RESULT = -1  # the full tensor is the result, not an argument
c10d, functional = torch.ops.c10d, torch.ops._c10d_functional

# Operator -> (kind, position of the argument with the full tensor: the gathered one, or the one to be scattered).
COLLECTIVES: Mapping[Any, tuple[str, int]] = {
    c10d._allgather_base_: ("all_gather", 0),
    c10d.allgather_: ("all_gather", 0),
    c10d.allgather_into_tensor_coalesced_: ("all_gather", 0),
    c10d._reduce_scatter_base_: ("reduce_scatter", 1),
    c10d.reduce_scatter_tensor_coalesced_: ("reduce_scatter", 1),
    c10d.alltoall_base_: ("all_to_all", 1),
    c10d.send: ("send", 0),  # received bytes are counted at the sender
    c10d.allreduce_: ("all_reduce", 0),
    c10d.allreduce_coalesced_: ("all_reduce", 0),
    c10d.broadcast_: ("broadcast", 0),
    functional.all_gather_into_tensor: ("all_gather", RESULT),
    functional.reduce_scatter_tensor: ("reduce_scatter", 0),
    functional.all_to_all_single: ("all_to_all", 0),
    functional.all_reduce: ("all_reduce", 0),
    functional.all_reduce_: ("all_reduce", 0),
    functional.broadcast: ("broadcast", 0),
}


class Watch(TorchDispatchMode):
    """A context manager that reports every operation in the block to observers.

    An operation on DTensors is counted once, for the local tensors. To learn the shape of the result, DTensor also runs
    it on meta tensors of the full shape; these are not counted (they made a large optimizer look 60 times its size).
    FSDP2 frees and allocates memory by resizing storages, which is not an operation.
    """

    def __init__(self, *observers: "LiveMemory | WorkCounter") -> None:
        super().__init__()
        self._observers = observers
        self._looking_ahead = False
        self._resize = torch.UntypedStorage.resize_
        self._look_ahead = ShardingPropagator._propagate_tensor_meta_non_cached

    def __enter__(self) -> "Watch":
        """Begins to watch; until the end of the block, resizing storages and the look ahead of DTensor are replaced in
        the whole process.
        """

        def resize_and_tell(storage: torch.UntypedStorage, size: int) -> None:
            self._resize(storage, size)
            for observer in self._observers:
                observer.resized(storage)

        def look_ahead_unseen(propagator: ShardingPropagator, schema: Any) -> Any:
            self._looking_ahead = True
            try:
                return self._look_ahead(propagator, schema)
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
            # A shortcut, because two of three calls ask this.
            return args[0].fake_device

        # A fake tensor has no values, but the step reads the gradient norm.
        if fake and func is torch.ops.aten._local_scalar_dense.default:
            return ANSWER if args[0].is_floating_point() else round(ANSWER)

        # DTensor calls again with its local tensors, which are counted.
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented

        result = func(*args, **kwargs)

        if not self._looking_ahead:
            for observer in self._observers:
                observer.after(func, args, kwargs, result)

        return result


class LiveMemory:
    """An observer of `Watch` that counts the bytes of live tensors.

    A storage counts from the first operation that returns it until it is freed. Memory that an operation allocates and
    frees inside is not seen, with one exception: gloo's gather and scatter copy the full tensor (NCCL's do not).
    """

    def __init__(self, gloo: bool, heap: Heap | None = None) -> None:
        """
        Args:
            gloo: whether gloo carries the messages.
            heap: of the CPU rank; its blocks follow the tensors.
        """
        self.live = 0  # bytes that are live now
        self.peak = 0  # largest `live` since `reset_peak`
        self.heap_peak = 0  # most resident bytes of the heap since `reset_peak`
        self._gloo = gloo
        self._heap = heap
        self._addresses: dict[int, int] = {}  # number of an allocation -> address in the heap
        self._sizes: dict[int, int] = {}  # number of an allocation -> bytes
        self._holders: Counter[int] = Counter()  # number of an allocation -> live storages that stand for it
        self._allocation: dict[int, int] = {}  # id of a live storage -> number of its allocation
        self._references: dict[int, weakref.ref] = {}  # id of a live storage -> reference that reports its end
        self._numbers = itertools.count()

    def after(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Counts the storages of an operation's result, except on `meta`; with gloo, also its copy in a collective,
        which only raises the peak."""
        # A wait returns the tensor of the message itself; only fake tensors have two storages for it.
        if func is WAIT:
            sent = _tensors(args)[0].untyped_storage()
            self._hold(result.untyped_storage(), self._allocation.get(id(sent)))
        for tensor in _tensors(result):
            if tensor.device.type != "meta":
                self.resized(tensor.untyped_storage())

        if self._gloo and (collective := collective_of(func, args, result)) and collective.kind in COPIED_BY_GLOO:
            self.peak = max(self.peak, self.live + collective.size)
            self._allocate(-1, collective.size)
            self._allocate(-1, 0)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Counts a storage at its present size until it is freed, and raises the peak if need be."""
        # Operations on views return a storage that is counted already.
        self._hold(storage, None)
        allocation, size = self._allocation[id(storage)], storage.nbytes()
        if size != self._sizes.get(allocation, 0):
            self._allocate(allocation, size)
        self.live += size - self._sizes.get(allocation, 0)
        self._sizes[allocation] = size
        self.peak = max(self.peak, self.live)

    def _hold(self, storage: torch.UntypedStorage, allocation: int | None) -> None:
        """Notes that a storage stands for an allocation, None for a new one, until it is freed; a known one stays as it
        is."""
        key = id(storage)
        if key in self._allocation:
            return
        allocation = next(self._numbers) if allocation is None else allocation
        self._allocation[key] = allocation
        self._holders[allocation] += 1
        self._references[key] = weakref.ref(storage, lambda _: self._drop(key))

    def reset_peak(self) -> None:
        """Starts new peaks at the bytes that are live and resident now."""
        self.peak = self.live
        self.heap_peak = self._heap.resident if self._heap else 0

    def _allocate(self, allocation: int, size: int) -> None:
        """Replaces the block of an allocation in the heap by one of `size` bytes, or by none."""
        if self._heap is None:
            return
        if allocation in self._addresses:
            self._heap.free(self._addresses.pop(allocation))
        if size:
            self._addresses[allocation] = self._heap.allocate(size + BETWEEN_TENSORS)
        self.heap_peak = max(self.heap_peak, self._heap.resident)

    def _drop(self, key: int) -> None:
        del self._references[key]
        allocation = self._allocation.pop(key)
        self._holders[allocation] -= 1
        if self._holders[allocation] == 0:
            del self._holders[allocation]
            self._allocate(allocation, 0)
            self.live -= self._sizes.pop(allocation, 0)


class WorkCounter:
    """An observer of `Watch` that counts the work of each part of a step."""

    def __init__(self, hardware: HardwareConfig, axes: Mapping[str, str]) -> None:
        """Starts with one part.

        Args:
            hardware: hardware whose speed determines the time of an operation.
            axes: name of a process group -> axis of the mesh.
        """
        self.parts = [Work()]
        self._hardware = hardware
        self._axes = axes

    def next_part(self) -> None:
        """Starts a new part."""
        self.parts.append(Work())

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Ignores a resize, which is no work."""

    def after(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Counts an operation, or a message of a collective."""
        if collective := collective_of(func, args, result):
            axis = self._axes.get(collective.group, WORLD)
            self.parts[-1].collective(collective.kind, axis, collective.ranks, collective.size)
        else:
            self._operation(func, args, kwargs, result)

    def _operation(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Adds FLOPs and memory traffic of an operation to the last part; nothing for views and empty memory."""
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        if _is_free(func, outputs):
            return

        # Foreach and fused operations.
        if func._schema.is_mutable and not outputs:
            outputs = _written(func, args, kwargs)

        flops = _flops(func._overloadpacket, args, kwargs, result)
        half = any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in inputs)
        moved = sum(tensor.nbytes for tensor in (*inputs, *outputs))
        is_attention = func._overloadpacket in ATTENTION
        self.parts[-1].operation(flops, moved, self._hardware, half, is_attention)


@dataclass(frozen=True)
class Collective:
    """One call of a collective."""

    kind: str  # all_gather | reduce_scatter | all_to_all | send | all_reduce | broadcast
    group: str  # name of the process group
    ranks: int  # ranks of the group
    size: int  # bytes of the full tensor


def collective_of(func: Any, args: Any, result: Any) -> Collective | None:
    """Returns the collective that `func(*args)` was; None for any other operation.

    Its size is that of the full tensor, over all ranks, also where a rank sends a part.
    """
    if func._overloadpacket not in COLLECTIVES:
        return None

    kind, position = COLLECTIVES[func._overloadpacket]
    full_tensor = result if position == RESULT else args[position]
    group = next((argument for argument in reversed(args) if isinstance(argument, str)), None) or _group_of(args)
    ranks = dist.distributed_c10d._resolve_process_group(cast(Any, group)).size()
    return Collective(kind, group, ranks, sum(tensor.nbytes for tensor in _tensors(full_tensor)))


def _group_of(args: Any) -> str:
    scripts = [
        argument
        for argument in args
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type())
    ]
    return dist.ProcessGroup.unbox(scripts[0]).group_name


def _is_free(func: Any, outputs: list[torch.Tensor]) -> bool:
    """Returns whether nothing is computed: the result is a view, or memory without values."""
    if func in FREE:
        return True
    if func._schema.is_mutable:
        return False
    return not outputs or all(output.alias_info is not None for output in func._schema.returns)


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Returns the tensors among the arguments that `func` writes to, lists of tensors flattened."""
    argument_of = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    names = [
        argument.name
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return _tensors([argument_of[name] for name in names if name in argument_of])


def _flops(packet: Any, args: Any, kwargs: Any, result: Any) -> float:
    """Returns the FLOPs of an operation by torch's formulas; 0 for one without a formula, such as elementwise ones."""
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
    if packet in flop_registry:
        return flop_registry[packet](*args, **kwargs, out_val=result)
    return 0


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
