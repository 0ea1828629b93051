"""How many ranks a node runs when the configuration leaves it open."""

import os
from pathlib import Path

from dist_lm.config.cluster import ClusterConfig

CPU_RANKS = 2  # enough for every code path of many; more would only share the same cores


def ranks_per_node(config: ClusterConfig, gpus: int | None = None) -> int:
    """`cluster.ranks_per_node`, with -1 as one a GPU, or on CPUs 2 (1 on a single core).

    Args:
        gpus: of a node; none: those of this machine.
    """
    if config.ranks_per_node != -1:
        return config.ranks_per_node
    return (local_gpus() if gpus is None else gpus) or min(CPU_RANKS, os.cpu_count() or 1)


def local_gpus() -> int:
    """NVIDIA GPUs of this machine, as the driver's device files say."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))
