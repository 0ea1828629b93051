"""How busy a node is: processors, memory, and GPUs where NVIDIA's library (package `nvidia-ml-py`) is installed."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil

GIB = 1 << 30
EVERY_S = 5.0


@dataclass(frozen=True)
class GpuUsage:
    """One GPU, whoever uses it."""

    index: int  # as the driver counts
    busy_percent: float
    memory_gib: float


@dataclass(frozen=True)
class NodeUsage:
    """A whole node, whoever uses it; the processors over the time since it was last looked at."""

    cpu_percent: float  # of all cores together
    memory_percent: float
    memory_gib: float
    gpus: tuple[GpuUsage, ...] = ()


class UsageMeter:
    """Looks at the node it runs on, every few seconds at most."""

    def __init__(self) -> None:
        psutil.cpu_percent()  # the first answer is of no time at all
        self._at = time.monotonic()
        self._usage: NodeUsage | None = None
        self._nvml = _nvml()

    def read(self) -> NodeUsage | None:
        """The newest look; None until `EVERY_S` have passed."""
        if time.monotonic() - self._at >= EVERY_S:
            self._at = time.monotonic()
            memory = psutil.virtual_memory()
            used = memory.total - memory.available
            self._usage = NodeUsage(psutil.cpu_percent(), memory.percent, used / GIB, self._gpus())
        return self._usage

    def _gpus(self) -> tuple[GpuUsage, ...]:
        if self._nvml is None:
            return ()
        found = []
        for index in range(self._nvml.nvmlDeviceGetCount()):
            try:
                gpu = self._nvml.nvmlDeviceGetHandleByIndex(index)
                memory = self._nvml.nvmlDeviceGetMemoryInfo(gpu).used
                busy = self._nvml.nvmlDeviceGetUtilizationRates(gpu).gpu
            except self._nvml.NVMLError:  # it has fallen off the bus, or does not say: the ranks will tell of it
                continue
            found.append(GpuUsage(index, float(busy), memory / GIB))
        return tuple(found)


def usage_metrics(usages: Mapping[str, NodeUsage]) -> dict[str, float]:
    """Metrics of nodes by host, under the names of the registry."""
    metrics: dict[str, float] = {}
    for host, usage in usages.items():
        metrics[f"system/cpu_percent_{host}"] = usage.cpu_percent
        metrics[f"system/memory_percent_{host}"] = usage.memory_percent
        metrics[f"system/memory_gib_{host}"] = usage.memory_gib
        for gpu in usage.gpus:
            metrics[f"system/gpu_percent_{host}.{gpu.index}"] = gpu.busy_percent
            metrics[f"system/gpu_memory_gib_{host}.{gpu.index}"] = gpu.memory_gib
    return metrics


def _nvml() -> Any:
    """NVIDIA's library, ready; None without it or without a driver."""
    try:
        import pynvml  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
