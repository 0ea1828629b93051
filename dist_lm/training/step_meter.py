"""Measurements of a training step: its time by parts, the size of its update, the slowest rank, the time left.

The trainer tells `StepMeter` when a step begins, when its batch has arrived and when it ends, and gets a line of
metrics. Measuring never makes a GPU wait. `matmul_flops` measures the peak for MFU (model FLOP/s utilisation).

Dimensions: R ranks.
"""

import math
import resource
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from dist_lm.config.cluster import HardwareConfig
from dist_lm.parallel.mesh import World
from dist_lm.parallel.values import is_first_copy, shard_of

PARTS = ("forward", "backward", "optimizer", "communication")
PRODUCTS = 5  # matrix products that measure the peak of a device
SCHEDULE = Path("/proc/thread-self/schedstat")  # nanoseconds on a core, nanoseconds waiting for a core, time slices


class StepMeter:
    """Times the steps of this rank from one line of metrics to the next, and compares ranks."""

    def __init__(self, world: World, optimizer: torch.optim.Optimizer, steps: int, blocks: Iterable[nn.Module]) -> None:
        """
        Args:
            steps: last step of the run.
            blocks: blocks of the model; timed on a GPU.
        """
        self._world = world
        self.laps: Laps = WallLaps()
        self._blocks: BlockTimes | None = None  # on a GPU, where this thread does not do the work of the passes
        if world.device.type == "cuda":
            self.laps = DeviceLaps(world.device)
            self._blocks = BlockTimes(blocks, partial(recorded, torch.cuda.current_stream(world.device)))

        self._update = UpdateSize(optimizer)
        self._eta = Eta(steps)
        self._eta_s: float | None = None
        self._began = self._data_arrived = 0.0  # on the wall clock
        self._work_began_s = 0.0  # `working_s`
        self._work_s = 0.0  # work of this rank since ranks were last compared
        self._restart()

    def begin(self, detailed: bool) -> None:
        """Notes that a step begins and asks for its batch.

        Args:
            detailed: `details` will be called after it.
        """
        if detailed:
            self._update.watch()
        self._began = time.perf_counter()

    def data_came(self) -> None:
        """Notes that the batch has arrived."""
        self._data_arrived = time.perf_counter()
        if self._blocks:
            self._blocks.measuring = True
        else:
            self._work_began_s = working_s()

    def end(self, step: int, tokens: int) -> None:
        """Notes that `step` (counted from 1) is complete, and adds its times to those of the line; nothing waits for a
        GPU. `tokens`: of all ranks, padding excluded."""
        data_wait_s = self._data_arrived - self._began
        self._steps += 1
        self._tokens += tokens
        self._data_wait_s += data_wait_s
        self._elapsed_s += time.perf_counter() - self._began
        self._eta_s = self._eta.after(step)

        lap_s = self.laps.take()
        self._part_s = {part: self._part_s[part] + lap_s.get(part, 0.0) for part in PARTS}

        # The wait for data counts as work: a rank with a slow disk is slow. Waiting for messages does not count.
        if self._blocks:
            self._blocks.measuring = False
            self._work_s += data_wait_s + self._blocks.take() + lap_s.get("optimizer", 0.0)
        else:
            self._work_s += data_wait_s + working_s() - self._work_began_s

    def line(self) -> dict[str, float]:
        """Returns means over the steps since the last line and the seconds left, by name, and begins a new line.
        Nothing is sent: times are those of this rank.

        At least one step must be complete. The seconds left are missing until the second step of an attempt is
        complete.
        """
        metrics = {
            "perf/tokens_per_s": self._tokens / self._elapsed_s,
            "perf/tokens_per_s_per_rank": self._tokens / self._elapsed_s / self._world.size,
            "perf/step_s": self._elapsed_s / self._steps,
            "perf/data_wait_s": self._data_wait_s / self._steps,
        }
        metrics |= {f"perf/{part}_s": seconds / self._steps for part, seconds in self._part_s.items()}
        if self._eta_s is not None:
            metrics["perf/eta_s"] = self._eta_s
        self._restart()
        return metrics

    def details(self) -> dict[str, float]:
        """Returns, by name, the size of the last update relative to the parameters (0 if the step was skipped or
        `begin` was not told), the slowest rank since the last details, and its work time / the median (collective). The
        work times begin again at 0."""
        world = self._world
        # One all-reduce: two sums, and one entry per rank that the rank alone fills.
        message = torch.zeros(2 + world.size, dtype=torch.float64, device=world.device)
        message[:2] = self._update.squares()
        message[2 + world.rank] = self._work_s
        dist.all_reduce(message)

        update_sq, parameter_sq, *work_s_R = message.tolist()
        self._work_s = 0.0
        slowest, ratio = slowest_of(work_s_R)
        return {
            "train/update_ratio": math.sqrt(update_sq / parameter_sq) if parameter_sq else 0.0,
            "perf/slowest_rank": slowest,
            "perf/straggler_ratio": ratio,
        }

    def _restart(self) -> None:
        self._steps = self._tokens = 0
        self._elapsed_s = self._data_wait_s = 0.0
        self._part_s = dict.fromkeys(PARTS, 0.0)


class Laps(Protocol):
    """Measures seconds of consecutive work, by name."""

    def start(self) -> None:
        """Discards the time since the last lap."""

    def lap(self, name: str) -> None:
        """Counts the time since the last lap, or the start, as `name`."""

    def take(self) -> dict[str, float]:
        """Returns seconds by name since the last call."""
        ...


class WallLaps:
    """Measures laps on the wall clock, for devices where work is done when a call returns."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def start(self) -> None:
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now

    def take(self) -> dict[str, float]:
        seconds, self._seconds = self._seconds, {}
        return seconds


class DeviceLaps:
    """Measures laps by events in the stream of a GPU: the time the GPU worked, whenever the work was queued.

    `take` does not wait: laps that the GPU has not finished belong to the next call. A training step reads a sum over
    all ranks after its optimizer, so all of its laps are finished then.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._marks: deque[tuple[str, torch.cuda.Event]] = deque()

    def start(self) -> None:
        self._mark("")

    def lap(self, name: str) -> None:
        self._mark(name)

    def take(self) -> dict[str, float]:
        seconds: dict[str, float] = {}
        while len(self._marks) > 1 and self._marks[1][1].query():
            _, begin = self._marks.popleft()
            name, end = self._marks[0]
            if name:
                seconds[name] = seconds.get(name, 0.0) + begin.elapsed_time(end) / 1e3
        return seconds

    def _mark(self, name: str) -> None:
        self._marks.append((name, recorded(self._stream)))


def recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Records an event with the time at which the GPU has done the work that is in `stream` now."""
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


class Event(Protocol):
    """The part of `torch.cuda.Event` that is used here."""

    def query(self) -> bool:
        """Returns whether the GPU has reached it."""
        ...

    def elapsed_time(self, end_event: Any, /) -> float:
        """Returns milliseconds from this event to `end_event`."""
        ...


class BlockTimes:
    """Measures the time in which the GPU runs the blocks of a model, in both passes.

    The time of a pass as a unit does not show a slow GPU: with FSDP all ranks wait for each other's shards before every
    block. FSDP's hooks wait before the events here are recorded. Messages inside a block count as its work, so the
    ranks of one tp group look equally slow.
    """

    def __init__(self, blocks: Iterable[nn.Module], mark: Callable[[], Event]) -> None:
        """
        Args:
            blocks: already wrapped by FSDP; the first argument and the first output of a block are its residual stream.
            mark: records an event.
        """
        self.measuring = False
        self._mark = mark
        self._spans: deque[tuple[Event, Event]] = deque()
        self._forward_begin: Event | None = None  # begin of the present block
        self._backward_begins: list[Event] = []  # begin of its backward pass; empty until that pass begins
        for block in blocks:
            block.register_forward_pre_hook(self._begin)
            block.register_forward_hook(self._end)

    def take(self) -> float:
        """Returns seconds since the last call. Blocks that the GPU has not finished belong to the next call."""
        milliseconds = 0.0
        # Spans are in stream order, so the first unfinished one ends the search.
        while self._spans and self._spans[0][1].query():
            begin, end = self._spans.popleft()
            milliseconds += begin.elapsed_time(end)
        return milliseconds / 1e3

    def _begin(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not self.measuring:
            return
        # The backward pass of a block runs from the gradient of its output to the gradient of its input.
        self._backward_begins = []
        if inputs[0].requires_grad:
            inputs[0].register_hook(partial(self._end_backward, self._backward_begins))
        self._forward_begin = self._mark()

    def _end(self, block: nn.Module, inputs: tuple[Any, ...], outputs: tuple[torch.Tensor, ...]) -> None:
        if not self.measuring or self._forward_begin is None:
            return
        self._spans.append((self._forward_begin, self._mark()))
        if outputs[0].requires_grad:
            outputs[0].register_hook(partial(self._begin_backward, self._backward_begins))

    def _begin_backward(self, begins: list[Event], gradient: torch.Tensor) -> None:
        begins.append(self._mark())

    def _end_backward(self, begins: list[Event], gradient: torch.Tensor) -> None:
        self._spans.append((begins.pop(), self._mark()))


class UpdateSize:
    """Measures how far an optimizer step moves the parameters, for any optimizer.

    From the call of the optimizer to `squares`, a copy of this rank's shards is in memory; activations are freed by
    then.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        # Copies of one shard on several ranks must not be measured twice.
        self._first_copies = [parameter for parameter in parameters if is_first_copy(parameter)]
        self._before: list[torch.Tensor] = []
        self._hook: RemovableHandle | None = None

    def watch(self) -> None:
        """Arranges that the next step is measured."""
        self._hook = self._optimizer.register_step_pre_hook(lambda *_: self._copy_parameters())

    @torch.no_grad()
    def squares(self) -> torch.Tensor:
        """Returns this rank's part of the squared L2 norms of the update and of the parameters after it: (2,) float64.

        The parts of all ranks add up. Zeros if the step was not watched; a skipped step has an update of 0. The copy is
        freed, and the next step is not measured unless `watch` is called again.
        """
        if self._hook:
            self._hook.remove()
            self._hook = None
        before, self._before = self._before, []
        if not before:
            return torch.zeros(2, dtype=torch.float64)

        after = [shard_of(parameter) for parameter in self._first_copies]
        torch._foreach_sub_(before, after)  # now `before` holds the update
        norms = [torch.stack(torch._foreach_norm(tensors)) for tensors in (before, after)]
        return torch.stack([norm.double().square().sum() for norm in norms])

    @torch.no_grad()
    def _copy_parameters(self) -> None:
        self._before = [shard_of(parameter).clone() for parameter in self._first_copies]


class Eta:
    """Estimates the time left, from the pace of this attempt without its first step, which may compile."""

    def __init__(self, steps: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """
        Args:
            steps: last step of the run.
        """
        self._steps = steps
        self._clock = clock
        self._first: tuple[int, float] | None = None  # step, and the time at its end

    def after(self, step: int) -> float | None:
        """Returns seconds from the end of `step` to the end of the run; None after the first step of an attempt.

        Evaluations and checkpoints are included at their rate so far.
        """
        now = self._clock()
        if self._first is None:
            self._first = (step, now)
            return None
        first_step, since = self._first
        return (now - since) / (step - first_step) * (self._steps - step)


def working_s() -> float:
    """Returns the seconds that this thread ran on a core or waited for a core; not sleep, nor waiting for messages.

    Ranks wait for each other in every layer, so all take the same wall time. Work time shows which rank is slow, also
    if another process takes its core. Without the scheduler figures of Linux: seconds on a core.
    """
    try:
        running_ns, runnable_ns, _ = SCHEDULE.read_text().split()
    except FileNotFoundError:
        return time.thread_time()
    return (int(running_ns) + int(runnable_ns)) / 1e9


def slowest_of(work_s_R: Sequence[float]) -> tuple[int, float]:
    """Returns the rank with the most work time, and its time relative to the median rank; 1 if no rank worked."""
    slowest = max(range(len(work_s_R)), key=work_s_R.__getitem__)
    median = statistics.median(work_s_R)
    if median > 0:
        return slowest, work_s_R[slowest] / median
    return slowest, 1.0


def peak_memory_gib(device: torch.device) -> float:
    """Returns the peak memory of this rank in GiB: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def matmul_flops(device: torch.device, dtype: torch.dtype, hardware: HardwareConfig) -> float:
    """Returns the peak FLOP/s of one device in `dtype`: from `hardware` if it describes this GPU, else from the fastest
    of some products of two square matrices, which it runs here.

    CPUs are timed in seconds that the threads ran on a core, so other processes on the machine do not count.
    """
    if device.type == "cuda" and hardware.name in torch.cuda.get_device_name(device).lower():
        tflops = hardware.bf16_tflops if dtype == torch.bfloat16 else hardware.fp32_tflops
        return tflops * 1e12

    def clock() -> float:
        if device.type != "cuda":
            return time.process_time() / torch.get_num_threads()
        torch.cuda.synchronize(device)  # a product is only queued when its call returns
        return time.perf_counter()

    size = 8192 if device.type == "cuda" else 1024  # a GPU takes longer to start a small product than to compute it
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    # The best of some products, because the clock speed rises under load and other work disturbs.
    best_s = float("inf")
    for _ in range(PRODUCTS):
        started = clock()
        torch.mm(matrix, matrix)
        best_s = min(best_s, clock() - started)
    return 2 * size**3 / best_s
