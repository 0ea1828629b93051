"""The conf group `hardware`: speed and memory of a machine, for dry runs and MFU."""

from dataclasses import dataclass

from dist_lm.errors import require


@dataclass
class HardwareConfig:
    """The hardware of a rank, for the dry run, parallel=auto and perf/mfu. The defaults are hardware=cpu."""

    name: str = "cpu"  # a file of conf/hardware; for GPUs a part of the driver's name of the card
    device: str = "cpu"  # cuda | cpu
    bf16_tflops: float = 0.2  # dense matrix products on one device
    fp32_tflops: float = 0.083
    attainable: float = 0.9  # share of these figures that large matrix products reach
    memory_gib: float = 8.0  # memory of one device
    memory_gb_s: float = 12.0  # bandwidth of that memory, 1e9 bytes/s
    devices_per_node: int = 2
    intra_node_gb_s: float = 0.5  # bandwidth of a device inside its node, 1e9 bytes/s, one direction
    intra_node_us: float = 200.0  # latency of a message
    inter_node_gb_s: float = 0.5  # bandwidth of a device to other nodes
    inter_node_us: float = 300.0
    overlap: float = 0.0  # share of the data axes' messages that overlaps computation

    def __post_init__(self) -> None:
        require(self.device in ("cuda", "cpu"), "hardware.device", self.device, "cuda or cpu")
        require(self.devices_per_node > 0, "hardware.devices_per_node", self.devices_per_node, "a positive integer")

        for name in ("bf16_tflops", "fp32_tflops", "memory_gib", "memory_gb_s", "intra_node_gb_s", "inter_node_gb_s"):
            require(getattr(self, name) > 0, f"hardware.{name}", getattr(self, name), "a positive number")
        for name in ("intra_node_us", "inter_node_us"):
            require(getattr(self, name) >= 0, f"hardware.{name}", getattr(self, name), "microseconds, >= 0")

        require(0 < self.attainable <= 1, "hardware.attainable", self.attainable, "in (0, 1]")
        require(0 <= self.overlap <= 1, "hardware.overlap", self.overlap, "in [0, 1]")
