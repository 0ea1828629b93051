"""What a machine can do, in numbers: for estimates of a step that is not taken."""

from dataclasses import dataclass

from dist_lm.errors import require


@dataclass
class HardwareConfig:
    """What a rank runs on: for the dry run, parallel=auto, the ceiling of perf/mfu. The defaults are hardware=cpu."""

    name: str = "cpu"  # one of conf/hardware; a GPU's is part of what its driver calls it
    device: str = "cpu"  # cuda | cpu
    bf16_tflops: float = 0.2  # dense matrix products, of one device
    fp32_tflops: float = 0.083
    attainable: float = 0.9  # share of those that large matrix products reach
    memory_gib: float = 8.0  # of one device
    memory_gb_s: float = 12.0  # bandwidth of that memory, 1e9 bytes/s
    devices_per_node: int = 2
    intra_node_gb_s: float = 0.5  # what a device sends to others of its node, 1e9 bytes/s, one direction
    intra_node_us: float = 200.0  # latency of a message
    inter_node_gb_s: float = 0.5  # what a device sends to other nodes
    inter_node_us: float = 300.0
    overlap: float = 0.0  # share of the data axes' messages that runs beside computation

    def __post_init__(self) -> None:
        require(self.device in ("cuda", "cpu"), "hardware.device", self.device, "cuda or cpu")
        for name in ("bf16_tflops", "fp32_tflops", "memory_gib", "memory_gb_s", "intra_node_gb_s", "inter_node_gb_s"):
            require(getattr(self, name) > 0, f"hardware.{name}", getattr(self, name), "a positive number")
        for name in ("intra_node_us", "inter_node_us"):
            require(getattr(self, name) >= 0, f"hardware.{name}", getattr(self, name), "microseconds, >= 0")
        require(self.devices_per_node > 0, "hardware.devices_per_node", self.devices_per_node, "a positive integer")
        require(0 < self.attainable <= 1, "hardware.attainable", self.attainable, "in (0, 1]")
        require(0 <= self.overlap <= 1, "hardware.overlap", self.overlap, "in [0, 1]")
