"""Measures the cost of wandb for a training run, offline and with a server that stalls, fails and hangs up.

Wall time depends on how busy the machine is. So a step is timed by values that other processes do not change: the CPU
seconds of the rank, and the seconds that it was blocked while writing its line of metrics. The rank and its follower
each get a core, if there are two; the variants take turns in rounds. The facts report the CPU share of the launcher's
side and the wait at the end of a run, which does not grow with the run.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from dist_lm.bench.case import Case, Comparison, GroupSize, configurations, describe
from dist_lm.bench.metrics import MeasuredTraining
from dist_lm.bench.rank import Trial, pin, two_cores
from dist_lm.bench.tracking_follower import NOBODY, OFFLINE, TROUBLE
from dist_lm.config.root import Config
from dist_lm.parallel.mesh import World
from dist_lm.tracking.metrics import MetricsWriter

SIDE, WAIT = "launcher's side at 20 lines/s, of its core %", "wait at the end s"
POLL_S, IDLE = 2.0, 0.1  # seconds between two looks; share of a core below which a process counts as idle
GRACE_S = 30.0  # for a follower to exit
LINES, LINE_S = 300, 0.05  # lines of the run in `facts_of_run`, seconds between two
SHAPES = (("model=nano", "stage.global_batch=4", "stage.seq_len=256"),)


def cases(overrides: Sequence[str], quick: bool) -> list[Case]:
    """Returns a case of one model, followed by nobody, by wandb offline, and by wandb with a server in trouble.

    Raises:
        ConfigError, ArtefactError, UserError: as `compose_config`.
    """
    size = GroupSize(1)
    followed = (OFFLINE, TROUBLE)

    return [
        Case(
            name=f"{describe(config)}, a line a step",
            config=config,
            variants=dict.fromkeys((NOBODY, *followed), size),
            comparisons=[
                *(Comparison(variant=variant, peer=NOBODY) for variant in followed),
                *(Comparison(variant=variant, fact=fact) for fact in (SIDE, WAIT) for variant in followed),
            ],
            same_losses=frozenset((NOBODY, *followed)),
            rounds=12,
        )
        for config in configurations(SHAPES, overrides, quick)
    ]


def build(variant: str, config: Config, world: World) -> Trial:
    """Builds one variant in one process, with its follower in another; this process is kept on a core of its own from
    now on.

    Raises:
        ConfigError: bf16 is asked for on a GPU without it.
    """
    rank_core, follower_core = two_cores()
    # Rank and follower share no core, so that the follower does not slow the step it is measured beside.
    pin(0, rank_core)
    training = FollowedTraining(config, world)
    if variant == NOBODY:
        return Trial(training.measured_step, clock=training.clock)

    training.follower = Follower(training.directory, variant, follower_core)
    return Trial(training.measured_step, lambda: facts_of_run(variant, follower_core), clock=training.clock)


class CountedWriter(MetricsWriter):
    """A writer of metrics that counts the seconds for which its caller was blocked."""

    waited_s = 0.0

    def write(self, step: int, metrics: Mapping[str, float], at: float | None = None) -> None:
        wall_before, cpu_before = time.perf_counter(), time.thread_time()
        super().write(step, metrics, at)

        wall_s, cpu_s = time.perf_counter() - wall_before, time.thread_time() - cpu_before
        # While the thread was blocked, wall time passed and its CPU time did not.
        self.waited_s += max(0.0, wall_s - cpu_s)


class FollowedTraining(MeasuredTraining):
    """Runs the trainer on one made-up batch, with a follower of its metrics."""

    follower: "Follower | None" = None

    def __init__(self, config: Config, world: World) -> None:
        super().__init__(config, world, CountedWriter)

    def __del__(self) -> None:
        # The follower must end before the directory that it reads is removed.
        self.follower = None

    def clock(self) -> float:
        """Returns CPU seconds plus blocked seconds of the rank so far."""
        assert isinstance(self.writer, CountedWriter)
        return time.process_time() + self.writer.waited_s


class Follower:
    """The launcher's side in a process and on a core of its own: it follows a metrics file and feeds wandb."""

    def __init__(self, directory: Path, variant: str, core: int | None) -> None:
        """Starts the process; it ends with this object, or with this process."""
        command = [sys.executable, "-m", "dist_lm.bench.tracking_follower", str(os.getpid()), str(directory), variant]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        pin(self._process.pid, core)

    def ask(self, word: str) -> dict[str, float]:
        """Sends a word and waits, without a limit, for the answer.

        `cost` gives {lines, cpu_s} so far: lines of metrics that wandb got, and CPU seconds of the process and its
        descendants. `finish` gives {wait_s}, the wait for the end of wandb in seconds, and ends the process.

        Raises:
            BrokenPipeError, ValueError: the process has ended.
        """
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def __del__(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def facts_of_run(variant: str, core: int | None) -> dict[str, float]:
    """Follows a made-up run of LINES lines (about LINES x LINE_S seconds, and the start of wandb) to its end. Returns
    SIDE, the CPU time of the follower in per cent of a core, and WAIT, the wait for its end in seconds."""
    with tempfile.TemporaryDirectory(prefix="dlm-bench-") as directory:
        path = Path(directory)
        with MetricsWriter(path / "metrics.jsonl") as writer:
            follower = Follower(path, variant, core)

            # The first lines and the wait take the start of wandb out of the cost per line.
            _write_lines(writer, 1, LINES // 10)
            _settle(follower, path)

            before = follower.ask("cost")
            _write_lines(writer, 1 + LINES // 10, LINES)
            after = _all_seen(follower, LINES)
        _settle(follower, path)
        end = follower.ask("finish")
        del follower

    took_s = LINE_S * (after["lines"] - before["lines"])
    return {SIDE: 100 * (after["cpu_s"] - before["cpu_s"]) / took_s, WAIT: end["wait_s"]}


def _write_lines(writer: MetricsWriter, first: int, last: int) -> None:
    for step in range(first, last + 1):
        names = ("train/loss", "train/grad_norm", "train/lr", "perf/tokens_per_s", "perf/step_s", "perf/memory_gib")
        writer.write(step, dict.fromkeys(names, 1.0 / step))
        time.sleep(LINE_S)


def _settle(follower: Follower, directory: Path) -> None:
    """Waits until wandb has its file and is idle: until it uses less than the share IDLE of a core for POLL_S
    seconds."""
    # wandb starts a process of its own, which works on for a while after the first line.
    before = follower.ask("cost")["cpu_s"]
    while True:
        time.sleep(POLL_S)
        now = follower.ask("cost")["cpu_s"]
        if now - before < IDLE * POLL_S and any(directory.glob("wandb/offline-run-*/*.wandb")):
            return
        before = now


def _all_seen(follower: Follower, lines: int) -> dict[str, float]:
    """Waits until the follower has read `lines` lines; returns its cost so far."""
    while (cost := follower.ask("cost"))["lines"] < lines:
        time.sleep(LINE_S)
    return cost
