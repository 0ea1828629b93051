"""`dry_run=true`: plays a step of chosen ranks, each in its own process, and reports it for people. No torch here."""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dist_lm.config.root import Config, save_config
from dist_lm.dry_run.estimate import gradients_add_up, is_half, micro_batches_of, offloads
from dist_lm.dry_run.work import WORLD, StepMemory, Work, resident, step_seconds
from dist_lm.model.size import flops_per_token, parameter_count
from dist_lm.parallel.layout import AXES, Layout, slice_of
from dist_lm.tracking.readable import duration, four_digits, gib, percent, readable_count, span

AT_ONCE = 2  # processes of about 0.4 GiB each


@dataclass(frozen=True)
class RankReport:
    """The memory and work of a step on one rank."""

    rank: int
    memory: StepMemory
    work: Work


def play_ranks(config: Config, layout: Layout) -> list[RankReport]:
    """Play a step on the ranks that differ most.

    Raises:
        RuntimeError: a step failed; with the error output of its process.
    """
    with tempfile.TemporaryDirectory(prefix="dlm-dry-run-") as directory, ThreadPoolExecutor(AT_ONCE) as pool:
        path = Path(directory) / "config.yaml"
        save_config(config, path)
        return list(pool.map(lambda rank: _play(path, rank, layout.world_size), ranks_to_play(config, layout)))


def ranks_to_play(config: Config, layout: Layout) -> list[int]:
    """The first rank, the last rank, and the first rank with padded heads."""
    parts = [slice_of(config.model.n_heads, layout.tp, rank) for rank in range(layout.tp)]
    padded = [rank for rank, part in enumerate(parts) if part.real < part.held]
    return sorted({0, *padded[:1], layout.world_size - 1})


def _play(config: Path, rank: int, world_size: int) -> RankReport:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "dist_lm.dry_run.rehearsal", str(config), str(rank), str(world_size)],
        # one thread, because nothing is computed
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
    """(name, value on each played rank), for people."""

    def row(name: str, value) -> list[str]:
        return [name, *(value(report) for report in reports)]

    offload = offloads(config)
    where = " (host memory)" if offload else ""
    gradients = "" if gradients_add_up(config, layout) else where
    table = [
        row(f"parameters{where}", lambda r: gib(r.memory.parameters)),
        row(f"gradients{gradients}", lambda r: gib(r.memory.gradients)),
        row(f"optimizer{where}", lambda r: gib(r.memory.optimizer)),
        row("activations, buffers", lambda r: gib(r.memory.activations)),
        row("peak of tensors", lambda r: gib(r.memory.peak)),
    ]
    if config.hardware.device == "cpu":
        table.append(row("resident memory, about", lambda r: gib(resident(r.memory, config.hardware))))
    for axis in (*AXES, WORLD):
        if any(report.work.messages[axis] for report in reports):
            table.append(row(f"sent, {axis}", lambda r, a=axis: f"{gib(r.work.sent[a])} ({r.work.messages[a]:,})"))
    return [
        *table,
        row("FLOPs of the step", lambda r: f"{four_digits(r.work.flops / 1e12)} TFLOP"),
        row("step, estimated", lambda r: "-" if offload else span(step_seconds(r.work, layout, config.hardware))),
    ]


def summary(config: Config, layout: Layout, reports: list[RankReport]) -> dict[str, str]:
    """The figures of the whole run, for people."""
    hardware, stage = config.hardware, config.stage
    count = parameter_count(config.model)
    micro_batches, size = micro_batches_of(config, layout)
    seconds = max(step_seconds(report.work, layout, hardware) for report in reports)
    tokens = stage.global_batch * stage.seq_len
    peak_tflops = layout.world_size * (hardware.bf16_tflops if is_half(config) else hardware.fp32_tflops)
    mfu = tokens * flops_per_token(config.trained_shape, stage.seq_len) / seconds / (peak_tflops * 1e12)
    peak = max(resident(report.memory, hardware) for report in reports)
    room = peak / 2**30 / hardware.memory_gib
    return {
        "model": f"{config.model.name}, {count:,} parameters ({readable_count(count)})",
        "layout": f"{layout} on {layout.world_size} ranks, hardware={hardware.name}, "
        f"{'bf16' if is_half(config) else 'fp32'}",
        "a step": f"{stage.global_batch} sequences of {stage.seq_len} tokens; a rank takes {micro_batches} x {size}",
        "peak memory": f"{gib(peak)} of {hardware.memory_gib:g} GiB{' - does not fit' if room > 1 else ''}",
        "estimate": "no time is estimated with parallel.cpu_offload=true"
        if offloads(config)
        else f"{span(seconds)} a step, {four_digits(tokens / seconds)} tokens/s, MFU {percent(mfu)}, "
        f"{stage.steps:,} steps in {duration(seconds * stage.steps)}",
    }
