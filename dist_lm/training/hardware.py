"""What this device can do at most: the ceiling that MFU is a fraction of."""

import time

import torch

# dense bf16 FLOP/s from the vendors' data sheets
BF16_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one device: from the data sheet of a known GPU, else measured with a large matrix product."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for card, peak in BF16_PEAK.items():
            if card in name:
                return peak
    return measured_matmul_flops(device, dtype)


def measured_matmul_flops(device: torch.device, dtype: torch.dtype, size: int = 1024, rounds: int = 5) -> float:
    """Best of `rounds` products of two (size, size) matrices."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(rounds):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
