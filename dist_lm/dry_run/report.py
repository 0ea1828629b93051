"""`dry_run=true`: chosen ranks play a step, each in a process of its own; what they say, put together. No torch."""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dist_lm.config import Config
from dist_lm.config_file import save_config
from dist_lm.dry_run.estimate import is_half, micro_batches_of
from dist_lm.dry_run.work import WORLD, StepMemory, Work, step_seconds
from dist_lm.model.size import flops_per_token, parameter_count
from dist_lm.parallel.layout import AXES, Layout
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


def rows(config: Config, layout: Layout, reports: list[RankReport]) -> list[list[str]]:
    """(what, its value on each played rank) for people."""

    def row(name: str, value) -> list[str]:
        return [name, *(value(report) for report in reports)]

    where = " (host memory)" if config.parallel.cpu_offload else ""
    table = [
        row(f"parameters{where}", lambda r: gib(r.memory.parameters)),
        row(f"gradients{where}", lambda r: gib(r.memory.gradients)),
        row(f"optimizer{where}", lambda r: gib(r.memory.optimizer)),
        row("activations, buffers", lambda r: gib(r.memory.activations)),
        row("peak of tensors", lambda r: gib(r.memory.peak)),
    ]
    for axis in (*AXES, WORLD):
        if any(report.work.messages[axis] for report in reports):
            table.append(row(f"sent, {axis}", lambda r, a=axis: _traffic(r.work, a)))
    return [
        *table,
        row("computed", lambda r: f"{r.work.flops / 1e12:.3g} TFLOP"),
        row("step, estimated", lambda r: f"{step_seconds(r.work, layout, config.hardware):.3g} s"),
    ]


def summary(config: Config, layout: Layout, reports: list[RankReport]) -> dict[str, str]:
    """What holds for the run as a whole, for people."""
    hardware, stage = config.hardware, config.stage
    count = parameter_count(config.model)
    micro_batches, size = micro_batches_of(config, layout)
    seconds = max(step_seconds(report.work, layout, hardware) for report in reports)
    tokens = stage.global_batch * stage.seq_len
    peak_tflops = layout.world_size * (hardware.bf16_tflops if is_half(config) else hardware.fp32_tflops)
    mfu = tokens * flops_per_token(config.model, stage.seq_len) / seconds / (peak_tflops * 1e12)
    peak = max(report.memory.peak for report in reports)
    room = peak / 2**30 / hardware.memory_gib
    return {
        "model": f"{config.model.name}, {count:,} parameters ({readable_count(count)})",
        "layout": f"{layout} on {layout.world_size} ranks, hardware={hardware.name}, "
        f"{'bf16' if is_half(config) else 'fp32'}",
        "a step": f"{stage.global_batch} sequences of {stage.seq_len} tokens; a rank takes {micro_batches} x {size}",
        "peak memory": f"{gib(peak)} of {hardware.memory_gib:g} GiB{' - does not fit' if room > 1 else ''}",
        "estimate": f"{seconds:.3g} s a step, {readable_count(round(tokens / seconds))} tokens/s, MFU {mfu:.0%}, "
        f"{stage.steps:,} steps in {seconds * stage.steps / 3600:.3g} h",
    }


def _traffic(work: Work, axis: str) -> str:
    return f"{gib(work.sent[axis])} in {work.messages[axis]:,} messages"


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


def readable_count(count: int) -> str:
    """1,087,000,000 -> `1.09 B`."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)
