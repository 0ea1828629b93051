"""Memory and work of a step on one rank, and the time of the work on planned hardware. Imports no torch.

The time is a model, not a measurement. An operation takes as long as its arithmetic or its memory traffic, whichever is
longer (roofline, Williams et al. 2009). A collective takes the transfer of a ring over its slowest link plus a latency
for each of log2(n) hops. Computation waits for messages of tensor parallelism and overlaps those of the data axes.
"""

import math
from collections import Counter
from dataclasses import dataclass, field, replace

from dist_lm.config.cluster import HardwareConfig
from dist_lm.parallel.layout import Layout
from dist_lm.tracking.readable import gib

WORLD = "world"
"""The axis of messages between all ranks (a few numbers a step)."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes of tensors on one rank."""

    parameters: int  # shards of the fp32 master weights, and a base in four bits
    gradients: int  # the larger of accumulated gradients and those of the last micro-batch
    optimizer: int  # shards of the moments
    activations: int  # the rest of the peak: activations, gathered parameters, message buffers
    host: int = 0  # the part of the first three that is in host memory
    overhead: int = 0  # of a CPU rank: what its allocator and libraries hold beside the tensors

    @property
    def peak(self) -> int:
        """Returns the peak of the device in bytes."""
        return self.parameters + self.gradients + self.optimizer + self.activations - self.host

    @property
    def resident(self) -> int:
        """Returns the peak of the device in bytes, with the overhead of a CPU rank."""
        return self.peak + self.overhead

    def offloaded(self, adds_up: bool) -> "StepMemory":
        """Returns the memory of the same step under parallel.cpu_offload: only `host` differs.

        Args:
            adds_up: whether unsharded gradients accumulate on the device.
        """
        host = self.parameters + self.optimizer
        # Gradients that add up stay on the device until the last micro-batch.
        if not adds_up:
            host += self.gradients
        return replace(self, host=host)


@dataclass
class Work:
    """Work of one rank; parts can be added."""

    flops: float = 0.0
    device_s: float = 0.0  # device time by the roofline, messages excluded
    sent: Counter[str] = field(default_factory=Counter)  # bytes by axis
    messages: Counter[str] = field(default_factory=Counter)  # collectives by axis

    def __add__(self, work: "Work") -> "Work":
        return Work(
            self.flops + work.flops, self.device_s + work.device_s, self.sent + work.sent, self.messages + work.messages
        )

    def __mul__(self, factor: int) -> "Work":
        return Work(
            self.flops * factor,
            self.device_s * factor,
            Counter({axis: count * factor for axis, count in self.sent.items()}),
            Counter({axis: count * factor for axis, count in self.messages.items()}),
        )

    def operation(
        self, flops: float, moved: float, hardware: HardwareConfig, half: bool, is_attention: bool = False
    ) -> None:
        """Adds one operation, in place.

        Args:
            flops: arithmetic of the operation.
            moved: bytes that it reads and writes.
            half: whether its inputs are bf16, not fp32.
            is_attention: whether it is a kernel of attention, not a matrix product.
        """
        self.flops += flops
        rate = matmul_flops(hardware, half)
        if is_attention and hardware.attention_attainable is not None:
            rate *= hardware.attention_attainable / hardware.attainable

        # An operation takes as long as its arithmetic or its memory traffic, whichever is longer.
        self.device_s += max(flops / rate, moved / (hardware.memory_gb_s * 1e9))

    def collective(self, kind: str, axis: str, ranks: int, size: int, times: int = 1) -> None:
        """Adds `times` collectives over `ranks` ranks on a full tensor of `size` bytes."""
        if ranks > 1:
            # Bytes that a rank sends (and receives) for each byte of the full tensor, in a ring.
            share = {"send": 1, "all_reduce": 2 * (ranks - 1) / ranks}.get(kind, (ranks - 1) / ranks)
            self.sent[axis] += round(share * size) * times
            self.messages[axis] += times


def matmul_flops(hardware: HardwareConfig, half: bool) -> float:
    """Returns the attainable FLOP/s of large matrix products."""
    return hardware.attainable * peak_tflops_of(hardware, half) * 1e12


def peak_tflops_of(hardware: HardwareConfig, half: bool) -> float:
    """Returns the TFLOP/s of matrix products that the maker states, in bf16 (`half`) or fp32."""
    return hardware.bf16_tflops if half else hardware.fp32_tflops


def message_seconds(work: Work, axis: str, layout: Layout, hardware: HardwareConfig) -> float:
    """Returns the time in seconds of all messages of one axis, one after the other; 0 without messages.

    Args:
        axis: one of `layout.AXES`, or WORLD.
    """
    if not work.messages[axis]:
        return 0.0

    ranks, stride = _extent(axis, layout)
    # Ranks of a group on one node.
    in_node = max(1, min(ranks, hardware.devices_per_node // stride))

    # A ring leaves each node once, over the links of all its members.
    latency_us, rate = hardware.intra_node_us, hardware.intra_node_gb_s
    if in_node < ranks:
        latency_us, rate = hardware.inter_node_us, min(rate, hardware.inter_node_gb_s * in_node)

    # The latency of a collective grows with the depth of a tree over its ranks.
    hops = max(1, math.ceil(math.log2(ranks)))
    return work.messages[axis] * hops * latency_us * 1e-6 + work.sent[axis] / (rate * 1e9)


def share_of_device(memory: int, hardware: HardwareConfig) -> str:
    """Returns `memory` bytes beside the memory of a device, for people."""
    text = f"{gib(memory)} of {hardware.memory_gib:g} GiB"
    if memory > hardware.memory_gib * 2**30:
        return f"{text} - does not fit"
    return text


def step_seconds(work: Work, layout: Layout, hardware: HardwareConfig) -> float:
    """Returns the time of a step in seconds."""
    data_s = sum(message_seconds(work, axis, layout, hardware) for axis in ("dp_shard", "dp_replicate"))
    waited_s = sum(message_seconds(work, axis, layout, hardware) for axis in ("cp", "tp", WORLD))
    return work.device_s + waited_s + data_s - hardware.overlap * min(data_s, work.device_s)


def _extent(axis: str, layout: Layout) -> tuple[int, int]:
    """Returns (ranks of a group of `axis`, distance between neighbouring ranks)."""
    if axis == WORLD:
        return layout.world_size, 1

    # Parameters are split over the ranks of dp_shard and of cp.
    return {
        "dp_replicate": (layout.dp_replicate, layout.shards * layout.tp),
        "dp_shard": (layout.shards, layout.tp),
        "cp": (layout.cp, layout.tp),
        "tp": (layout.tp, 1),
    }[axis]
