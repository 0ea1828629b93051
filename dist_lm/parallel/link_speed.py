"""The first collective of a run: shows that all ranks reach each other over what training will use, and how fast."""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dist_lm.parallel.mesh import World

BYTES = 4 << 20
ROUNDS = 3


@dataclass(frozen=True)
class LinkSpeed:
    """What an all-reduce over all ranks took."""

    ranks: int
    bytes: int
    seconds: float  # the best of a few
    bus_gb_per_s: float  # bytes a rank sends and receives in it, per second: 2 (n - 1) / n * bytes (as in nccl-tests)


def measure_all_reduce(world: World) -> LinkSpeed:
    """All-reduce a few MiB (collective); the largest time of any rank counts."""
    values = torch.ones(BYTES // 4, dtype=torch.float32, device=world.device)
    times = []
    for _ in range(1 + ROUNDS):  # the first one sets up connections
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(values)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        times.append(time.perf_counter() - started)
    seconds = torch.tensor([min(times[1:])], dtype=torch.float64, device=world.device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    slowest = float(seconds)
    sent = 2 * (world.size - 1) / world.size * BYTES
    return LinkSpeed(world.size, BYTES, slowest, sent / slowest / 1e9)
