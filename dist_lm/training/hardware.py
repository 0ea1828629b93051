"""What this device can do at most: the ceiling that MFU is a fraction of."""

import time

import torch

from dist_lm.config.hardware import HardwareConfig


def matmul_flops(device: torch.device, dtype: torch.dtype, hardware: HardwareConfig) -> float:
    """FLOP/s of one device: from the table if it is the GPU that `hardware` names, else by a large matrix product."""
    if device.type == "cuda" and hardware.name in torch.cuda.get_device_name(device).lower():
        return (hardware.bf16_tflops if dtype == torch.bfloat16 else hardware.fp32_tflops) * 1e12
    return measured_matmul_flops(device, dtype)


def measured_matmul_flops(device: torch.device, dtype: torch.dtype, rounds: int = 5) -> float:
    """Best of `rounds` products of two square matrices, the first of which also warms up.

    On CPUs in seconds that the threads were on a core: what they can do, not what a busy machine leaves them.
    """

    def clock() -> float:
        return time.perf_counter() if device.type == "cuda" else time.process_time() / torch.get_num_threads()

    size = 8192 if device.type == "cuda" else 1024  # a GPU takes longer to start a small product than to compute it
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(rounds):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = clock()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, clock() - started)
    return 2 * size**3 / best
