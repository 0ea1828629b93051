"""What a step asks of one rank, as numbers, and the time that takes on a machine that is not here. No torch.

The time is a model, not a measurement: an operation takes as long as its arithmetic or its memory traffic, whichever is
longer (Williams et al. 2009, the roofline); a collective takes what a ring sends over its slowest link, and a latency
for each of log2(n) hops. Messages of tensor parallelism are waited for. Those of the data axes run beside computation.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from dist_lm.config.hardware import HardwareConfig
from dist_lm.parallel.layout import AXES, Layout

CPU_RESIDENT = 1.14
"""Resident memory of a CPU rank by byte of tensors: the allocator keeps what is freed (measured: 1.10 to 1.19)."""

WORLD = "world"
"""The axis of messages between all ranks: a few numbers a step."""

SENT_PER_BYTE: dict[str, Callable[[int], float]] = {
    "all_gather": lambda n: (n - 1) / n,  # of the gathered tensor
    "reduce_scatter": lambda n: (n - 1) / n,  # of the tensor before it is scattered
    "all_to_all": lambda n: (n - 1) / n,
    "send": lambda n: 1.0,
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "broadcast": lambda n: (n - 1) / n,
}
"""Bytes a rank sends, and as many it receives, for each byte of the whole tensor, in a ring of n."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes of tensors on one rank."""

    parameters: int  # its shards of the fp32 master weights
    gradients: int  # while micro-batches add up, or of the last one: whichever is more
    optimizer: int  # its shards of both moments
    activations: int  # what the peak holds beside those three: activations, gathered parameters, buffers of messages
    host: int = 0  # of the first three, what lies in host memory

    @property
    def peak(self) -> int:
        """Of the device."""
        return self.parameters + self.gradients + self.optimizer + self.activations - self.host

    def offloaded(self, adds_up: bool) -> "StepMemory":
        """The same step under parallel.cpu_offload.

        Args:
            adds_up: whole gradients add up over micro-batches: on the device.
        """
        host = self.parameters + self.optimizer + (0 if adds_up else self.gradients)
        return replace(self, host=host)


@dataclass
class Work:
    """Work of one rank; a sum of parts."""

    flops: float = 0.0
    device_s: float = 0.0  # seconds of its device by the roofline, messages apart
    sent: Counter[str] = field(default_factory=Counter)  # axis -> bytes sent, and as many received
    messages: Counter[str] = field(default_factory=Counter)  # axis -> collectives

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.flops + other.flops,
            self.device_s + other.device_s,
            self.sent + other.sent,
            self.messages + other.messages,
        )

    def __mul__(self, times: int) -> "Work":
        return Work(
            self.flops * times,
            self.device_s * times,
            Counter({axis: count * times for axis, count in self.sent.items()}),
            Counter({axis: count * times for axis, count in self.messages.items()}),
        )

    def operation(self, flops: float, moved: float, hardware: HardwareConfig, half: bool) -> None:
        """Add one operation.

        Args:
            moved: bytes it reads and writes.
            half: its inputs are bf16, not fp32.
        """
        self.flops += flops
        self.device_s += max(flops / matmul_flops(hardware, half), moved / (hardware.memory_gb_s * 1e9))

    def collective(self, kind: str, axis: str, ranks: int, size: int, times: int = 1) -> None:
        """Add collectives over `ranks` ranks, each on a whole tensor of `size` bytes; one rank sends nothing."""
        if ranks > 1:
            self.sent[axis] += round(SENT_PER_BYTE[kind](ranks) * size) * times
            self.messages[axis] += times


def matmul_flops(hardware: HardwareConfig, half: bool) -> float:
    """FLOP/s that large matrix products reach."""
    return hardware.attainable * (hardware.bf16_tflops if half else hardware.fp32_tflops) * 1e12


def message_seconds(work: Work, axis: str, layout: Layout, hardware: HardwareConfig) -> float:
    """Seconds that the messages of one axis take, one after the other."""
    if not work.messages[axis]:
        return 0.0
    ranks, stride = _extent(axis, layout)
    in_node = max(1, min(ranks, hardware.devices_per_node // stride))  # of a group, on one node
    crosses = in_node < ranks
    latency_us = hardware.inter_node_us if crosses else hardware.intra_node_us
    # a ring through a node leaves it once, over the links of all its members
    rate = hardware.intra_node_gb_s
    if crosses:
        rate = min(rate, hardware.inter_node_gb_s * in_node)
    hops = max(1, math.ceil(math.log2(ranks)))
    return work.messages[axis] * hops * latency_us * 1e-6 + work.sent[axis] / (rate * 1e9)


def resident(memory: StepMemory, hardware: HardwareConfig) -> int:
    """Bytes that the peak takes from the device, the allocator's own share on a CPU included."""
    return round(memory.peak * (CPU_RESIDENT if hardware.device == "cpu" else 1))


def step_seconds(work: Work, layout: Layout, hardware: HardwareConfig) -> float:
    """Seconds of a step."""
    data = sum(message_seconds(work, axis, layout, hardware) for axis in ("dp_shard", "dp_replicate"))
    waited = sum(message_seconds(work, axis, layout, hardware) for axis in ("tp", WORLD))
    return work.device_s + waited + data - hardware.overlap * min(data, work.device_s)


def _extent(axis: str, layout: Layout) -> tuple[int, int]:
    """(ranks of a group of `axis`, distance between neighbours in it)."""
    if axis == WORLD:
        return layout.world_size, 1
    sizes = (layout.dp_replicate, layout.dp_shard, layout.tp)
    index = AXES.index(axis)
    return sizes[index], math.prod(sizes[index + 1 :])
