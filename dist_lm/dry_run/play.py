"""`dry_run=true`: plays a step of chosen ranks, each in its own process, and reports it. Imports no torch."""

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
from dist_lm.dry_run.work import WORLD, StepMemory, Work, peak_tflops_of, share_of_device, step_seconds
from dist_lm.model.size import flops_per_token, parameter_count
from dist_lm.parallel.layout import AXES, Layout, rank_slice
from dist_lm.parallel.owners import plan_of_model
from dist_lm.tracking.readable import duration, four_digits, gib, percent, readable_count, span

AT_ONCE = 2  # number of processes at a time; each takes about 0.4 GiB


@dataclass(frozen=True)
class RankReport:
    """The memory and work of a step on one rank."""

    rank: int
    memory: StepMemory
    work: Work


def play_ranks(config: Config, layout: Layout) -> list[RankReport]:
    """Plays a step on the ranks that differ most (`ranks_to_play`); returns a report for each, in their order.

    Each rank is a process that this waits for, AT_ONCE of them at a time.

    Raises:
        RuntimeError: a step failed; the message has the error output of its process.
    """
    with tempfile.TemporaryDirectory(prefix="dlm-dry-run-") as directory, ThreadPoolExecutor(AT_ONCE) as pool:
        path = Path(directory) / "config.yaml"
        save_config(config, path)
        return list(pool.map(lambda rank: _play(path, rank, layout.world_size), ranks_to_play(config, layout)))


def ranks_to_play(config: Config, layout: Layout) -> list[int]:
    """Returns the first rank, the last rank, the first rank with padded heads, and the rank with most work of Muon."""
    slices = [rank_slice(config.model.n_heads, layout.tp, rank) for rank in range(layout.tp)]
    padded = [rank for rank, heads in enumerate(slices) if heads.real < heads.held]
    busiest = []
    if config.stage.muon.is_on:
        flops = plan_of_model(config.trained_shape, layout.of_parameters, config.hardware.device).flops()
        busiest.append(flops.index(max(flops)))
    return sorted({0, *padded[:1], *busiest, layout.world_size - 1})


def _play(config: Path, rank: int, world_size: int) -> RankReport:
    """Plays a step of one rank in a process, without a time limit, and returns its report.

    Raises:
        RuntimeError: the process failed; the message has its error output.
    """
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "dist_lm.dry_run.rehearsal", str(config), str(rank), str(world_size)],
        # One thread is enough, because nothing is computed.
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )

    if process.returncode:
        raise RuntimeError(f"the dry run of rank {rank} failed:\n{process.stderr}")

    # Libraries may print before the result, which is the last line.
    report = json.loads(process.stdout.splitlines()[-1])
    work = report["work"] | {key: Counter(report["work"][key]) for key in ("sent", "messages")}

    return RankReport(rank, StepMemory(**report["memory"]), Work(**work))


def rows(config: Config, layout: Layout, reports: list[RankReport]) -> list[list[str]]:
    """Returns rows of (name, text for each played rank), for people: memory, messages by axis, FLOPs, and the time of
    the step; `-` for the time with parallel.cpu_offload."""

    def row(name: str, text_of) -> list[str]:
        return [name, *(text_of(report) for report in reports)]

    # Gradients that add up over micro-batches stay on the device.
    offload = offloads(config)
    in_host = gradients_in_host = ""
    if offload:
        in_host = " (host memory)"
    if not gradients_add_up(config, layout):
        gradients_in_host = in_host

    table = [
        row(f"parameters{in_host}", lambda r: gib(r.memory.parameters)),
        row(f"gradients{gradients_in_host}", lambda r: gib(r.memory.gradients)),
        row(f"optimizer{in_host}", lambda r: gib(r.memory.optimizer)),
        row("activations, buffers", lambda r: gib(r.memory.activations)),
        row("peak of tensors", lambda r: gib(r.memory.peak)),
    ]

    if config.hardware.device == "cpu":
        table.append(row("resident memory, about", lambda r: gib(r.memory.resident)))

    for axis in (*AXES, WORLD):
        if any(report.work.messages[axis] for report in reports):
            table.append(row(f"sent, {axis}", lambda r, a=axis: f"{gib(r.work.sent[a])} ({r.work.messages[a]:,})"))

    return [
        *table,
        row("FLOPs of the step", lambda r: f"{four_digits(r.work.flops / 1e12)} TFLOP"),
        row("step, estimated", lambda r: "-" if offload else span(step_seconds(r.work, layout, config.hardware))),
    ]


def summary(config: Config, layout: Layout, reports: list[RankReport]) -> dict[str, str]:
    """Returns the figures of the full run, text by name, for people: model, layout, a step, peak memory and time, both
    of the played rank that has most. No time with parallel.cpu_offload."""
    hardware = config.hardware
    stage = config.stage

    num_parameters = parameter_count(config.model)
    micro_batches, sequences = micro_batches_of(config, layout)
    seconds = max(step_seconds(report.work, layout, hardware) for report in reports)

    tokens = stage.global_batch * stage.seq_len
    peak_tflops = layout.world_size * peak_tflops_of(hardware, is_half(config))
    mfu = tokens * flops_per_token(config.trained_shape, stage.seq_len) / seconds / (peak_tflops * 1e12)
    peak = max(report.memory.resident for report in reports)

    estimate = "no time is estimated with parallel.cpu_offload=true"
    if not offloads(config):
        estimate = (
            f"{span(seconds)} a step, {four_digits(tokens / seconds)} tokens/s, MFU {percent(mfu)}, "
            f"{stage.steps:,} steps in {duration(seconds * stage.steps)}"
        )
        if not stage.steps:
            estimate = estimate.rpartition(", ")[0] + f"; the steps of {stage.epochs:g} epochs follow from the corpus"

    dtype = "bf16" if is_half(config) else "fp32"
    batch = f"{stage.global_batch} sequences of {stage.seq_len} tokens; a rank takes {micro_batches} x {sequences}"
    return {
        "model": f"{config.model.name}, {num_parameters:,} parameters ({readable_count(num_parameters)})",
        "layout": f"{layout} on {layout.world_size} ranks, hardware={hardware.name}, {dtype}",
        "a step": batch,
        "peak memory": share_of_device(peak, hardware),
        "estimate": estimate,
    }
