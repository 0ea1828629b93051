"""What the operations of a step cost: their arithmetic, the memory they move, and what they send to other ranks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from dist_lm.config.hardware import HardwareConfig
from dist_lm.dry_run.collectives import collective_of
from dist_lm.dry_run.work import WORLD, Work

aten = torch.ops.aten
FREE = (  # memory without values, and waiting for a message that is counted itself
    *(aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default),
    torch.ops._c10d_functional.wait_tensor.default,
)


class StepMeter:
    """An observer of `Watch` that counts the work of every part of a step; a new part begins with `next_part`."""

    def __init__(self, hardware: HardwareConfig, axes: Mapping[str, str]) -> None:
        """
        Args:
            axes: name of a process group -> axis of the mesh.
        """
        self.parts = [Work()]
        self._hardware = hardware
        self._axes = axes

    def next_part(self) -> None:
        """Count what comes apart from what was."""
        self.parts.append(Work())

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Costs nothing."""

    def after(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if collective := collective_of(func, args, result):
            axis = self._axes.get(collective.group, WORLD)
            self.parts[-1].collective(collective.kind, axis, collective.ranks, collective.size)
        else:
            self._operation(func, args, kwargs, result)

    def _operation(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        if _is_free(func, outputs):
            return
        if func._schema.is_mutable and not outputs:  # foreach and fused operations write to their arguments
            outputs = _written(func, args, kwargs)
        flops = _flops(func._overloadpacket, args, kwargs, result)
        half = any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in inputs)
        moved = sum(map(_bytes, inputs)) + sum(map(_bytes, outputs))
        self.parts[-1].operation(flops, moved, self._hardware, half)


def _is_free(func: Any, outputs: list[torch.Tensor]) -> bool:
    """Whether nothing is computed: the result is another look at an argument, or memory without values."""
    if func in FREE:
        return True
    if func._schema.is_mutable:
        return False
    return not outputs or all(r.alias_info is not None for r in func._schema.returns)


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The arguments that `func` writes to."""
    given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return _tensors([given[name] for name in names if name in given])


def _flops(packet: Any, args: Any, kwargs: Any, result: Any) -> float:
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
    return flop_registry[packet](*args, **kwargs, out_val=result) if packet in flop_registry else 0


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
