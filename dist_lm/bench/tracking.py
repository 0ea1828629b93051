"""What it costs a run to be followed by wandb, with a server that stalls, fails and hangs up for all of it.

Wall time would say how busy the machine is. So a step is timed by what a neighbour cannot change: the processor
seconds of the rank, and the seconds that it stood still to write its line of metrics. The rank has a core to itself,
whatever follows it another one; the ways take turns in rounds. What is left is what the launcher's side takes of its
core, and the wait at the end, which does not grow with the run.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from dist_lm.bench.case import Case, Comparison, CrewSize, configurations, describe
from dist_lm.bench.metrics import MeasuredTraining
from dist_lm.bench.tracking_follower import NOBODY, OFFLINE, TROUBLE
from dist_lm.bench.trial import Trial
from dist_lm.config.root import Config
from dist_lm.parallel.mesh import World
from dist_lm.tracking.metrics import MetricsWriter

SIDE, WAIT = "launcher's side at 20 lines/s, of its core %", "wait at the end s"
WORK = "wait at the end, on a core s"
LOOK_S, IDLE = 2.0, 0.1  # of a core: less is idle
GRACE_S = 30.0  # for a follower to end
LINES, LINE_S = 300, 0.05  # of the run whose end is waited for
SHAPES = (("model=nano", "stage.global_batch=4", "stage.seq_len=256"),)


def cases(overrides: Sequence[str], quick: bool) -> list[Case]:
    """One model, followed by nobody, by wandb offline, and by wandb with a server in trouble."""
    crew = CrewSize(1)
    followed = (OFFLINE, TROUBLE)
    return [
        Case(
            name=f"{describe(config)}, a line a step",
            config=config,
            ways=dict.fromkeys((NOBODY, *followed), crew),
            comparisons=[
                *(Comparison(own=way, peer=NOBODY) for way in followed),
                *(Comparison(own=way, fact=fact) for fact in (SIDE, WAIT, WORK) for way in followed),
            ],
            same_losses=frozenset((NOBODY, *followed)),
            rounds=12,
        )
        for config in configurations(SHAPES, overrides, quick)
    ]


def build(way: str, config: Config, world: World) -> Trial:
    """The rank's part of one way, and who follows it."""
    first, last = _cores()
    _pin(0, first)
    training = FollowedTraining(config, world)
    if way == NOBODY:
        return Trial(training.measured_step, clock=training.clock)
    training.follower = Follower(training.directory, way, last)
    return Trial(training.measured_step, lambda: of_a_run(way, last), clock=training.clock)


class CountedWriter(MetricsWriter):
    """Counts the seconds that its caller stood still."""

    waited_s = 0.0

    def write(self, step: int, metrics: Mapping[str, float], at: float | None = None) -> None:
        began, worked = time.perf_counter(), time.thread_time()
        super().write(step, metrics, at)
        self.waited_s += max(0.0, (time.perf_counter() - began) - (time.thread_time() - worked))


class FollowedTraining(MeasuredTraining):
    """The trainer on one made-up batch, and who follows its lines."""

    follower: "Follower | None" = None

    def __init__(self, config: Config, world: World) -> None:
        super().__init__(config, world, CountedWriter)

    def __del__(self) -> None:
        self.follower = None  # before the directory goes that it looks into

    def clock(self) -> float:
        """What the rank has worked and waited so far, s."""
        assert isinstance(self.writer, CountedWriter)
        return time.process_time() + self.writer.waited_s


class Follower:
    """A launcher's part, in a process and on a core of its own: follows a metrics file, and has wandb do so."""

    def __init__(self, directory: Path, way: str, core: int | None) -> None:
        """Begin; it ends with this object, or with this process."""
        command = [sys.executable, "-m", "dist_lm.bench.tracking_follower", str(os.getpid()), str(directory), way]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        _pin(self._process.pid, core)

    def ask(self, word: str) -> dict[str, float]:
        """`cost`: {lines, cpu_s} so far. `finish`: {wait_s, cpu_s} of the end, when wandb has ended."""
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


def of_a_run(way: str, core: int | None) -> dict[str, float]:
    """A run of a few seconds, to its end: processor time of who follows it, and the wait for them."""
    with tempfile.TemporaryDirectory(prefix="dlm-bench-") as directory:
        path = Path(directory)
        with MetricsWriter(path / "metrics.jsonl") as writer:
            follower = Follower(path, way, core)
            _write_lines(writer, 1, LINES // 10)
            _settle(follower, path)  # what starts at first is no part of a run's cost
            before = follower.ask("cost")
            _write_lines(writer, 1 + LINES // 10, LINES)
            after = _all_seen(follower, LINES)
        _settle(follower, path)
        end = follower.ask("finish")
        del follower
    took_s = LINE_S * (after["lines"] - before["lines"])
    return {SIDE: 100 * (after["cpu_s"] - before["cpu_s"]) / took_s, WAIT: end["wait_s"], WORK: end["cpu_s"]}


def _write_lines(writer: MetricsWriter, first: int, last: int) -> None:
    for step in range(first, last + 1):
        names = ("train/loss", "train/grad_norm", "train/lr", "perf/tokens_per_s", "perf/step_s", "perf/memory_gib")
        writer.write(step, dict.fromkeys(names, 1.0 / step))
        time.sleep(LINE_S)


def _settle(follower: Follower, directory: Path) -> None:
    """Until wandb has its file, and does no more than look now and then."""
    before = follower.ask("cost")["cpu_s"]
    while True:
        time.sleep(LOOK_S)
        now = follower.ask("cost")["cpu_s"]
        if now - before < IDLE * LOOK_S and any(directory.glob("wandb/offline-run-*/*.wandb")):
            return
        before = now


def _all_seen(follower: Follower, lines: int) -> dict[str, float]:
    while (seen := follower.ask("cost"))["lines"] < lines:
        time.sleep(LINE_S)
    return seen


@cache
def _cores() -> tuple[int | None, int | None]:
    """A core for the rank and one for those that follow it; None where there is only one, or it cannot be chosen."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return (cores[0], cores[-1]) if len(cores) > 1 else (None, None)


def _pin(process: int, core: int | None) -> None:
    if core is not None:
        os.sched_setaffinity(process, [core])
