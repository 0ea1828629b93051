"""Chosen ranks play a step, each in a process of its own. No torch in this one."""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dist_lm.config.file import save_config
from dist_lm.config.root import Config
from dist_lm.dry_run.work import StepMemory, Work
from dist_lm.parallel.layout import Layout
from dist_lm.parallel.placement import slice_of

AT_ONCE = 2  # processes; each takes about 0.4 GiB


@dataclass(frozen=True)
class RankReport:
    """A step of one rank."""

    rank: int
    memory: StepMemory
    work: Work


def play_ranks(config: Config, layout: Layout) -> list[RankReport]:
    """Play the ranks that differ most.

    Raises:
        RuntimeError: a step cannot be played; with what the process said.
    """
    with tempfile.TemporaryDirectory(prefix="dlm-dry-run-") as directory, ThreadPoolExecutor(AT_ONCE) as pool:
        path = Path(directory) / "config.yaml"
        save_config(config, path)
        return list(pool.map(lambda rank: _play(path, rank, layout.world_size), ranks_to_play(config, layout)))


def ranks_to_play(config: Config, layout: Layout) -> list[int]:
    """The first rank, the last, and the first whose part of the heads is filled up with zeros."""
    parts = [slice_of(config.model.n_heads, layout.tp, rank) for rank in range(layout.tp)]
    padded = [rank for rank, part in enumerate(parts) if part.real < part.held]
    return sorted({0, *padded[:1], layout.world_size - 1})


def _play(config: Path, rank: int, world_size: int) -> RankReport:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "dist_lm.dry_run.fake_rank", str(config), str(rank), str(world_size)],
        # one thread: nothing is computed
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the dry run of rank {rank} failed:\n{done.stderr}")
    said = json.loads(done.stdout.splitlines()[-1])
    work = said["work"] | {key: Counter(said["work"][key]) for key in ("sent", "messages")}
    return RankReport(rank, StepMemory(**said["memory"]), Work(**work))
