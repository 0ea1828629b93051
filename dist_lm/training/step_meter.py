"""What a training step takes: its time by parts, the size of its update, the slowest rank, the time left.

`StepMeter` is told when a step begins, when its batch is there and when it ends, and answers with a line of metrics.
Measuring never makes a GPU wait. `matmul_flops` is the peak that MFU is a fraction of.

Dimensions: R ranks.
"""

import math
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

from dist_lm.config.hardware import HardwareConfig
from dist_lm.parallel.mesh import World
from dist_lm.parallel.values import is_first_copy, shard_of

PARTS = ("forward", "backward", "optimizer", "communication")
PRODUCTS = 5  # that measure the peak of a device
SCHEDULE = Path("/proc/thread-self/schedstat")  # nanoseconds on a core, nanoseconds waiting for a core, time slices


class StepMeter:
    """Times the steps of this rank from one line of metrics to the next, and compares ranks."""

    def __init__(self, world: World, optimizer: torch.optim.Optimizer, steps: int, blocks: Iterable[nn.Module]) -> None:
        """
        Args:
            steps: last step of the run.
            blocks: of the model; timed on a GPU.
        """
        self.laps: Laps = WallLaps()
        self._blocks: BlockTimes | None = None  # on a GPU, where this thread does not do the work of the passes
        if world.device.type == "cuda":
            self.laps = DeviceLaps(world.device)
            self._blocks = BlockTimes(blocks, partial(recorded, torch.cuda.current_stream(world.device)))
        self._update = UpdateSize(optimizer)
        self._eta, self._left_s = Eta(steps), None
        self._world = world
        self._began = self._data_came = self._worked = 0.0
        self._own_s = 0.0  # since ranks were last compared
        self._restart()

    def begin(self, detailed: bool) -> None:
        """A step begins and asks for its batch.

        Args:
            detailed: `details` will be called after it.
        """
        if detailed:
            self._update.watch()
        self._began = time.perf_counter()

    def data_came(self) -> None:
        """The batch is there."""
        self._data_came = time.perf_counter()
        if self._blocks:
            self._blocks.measuring = True
        else:
            self._worked = working_s()

    def end(self, step: int, tokens: int) -> None:
        """`step` is complete; `tokens`: tokens of all ranks, padding excluded."""
        waited = self._data_came - self._began
        self._steps += 1
        self._tokens += tokens
        self._waited += waited
        self._elapsed += time.perf_counter() - self._began
        self._left_s = self._eta.after(step)
        parts = self.laps.take()
        self._parts = {part: self._parts[part] + parts.get(part, 0.0) for part in PARTS}
        if self._blocks:
            self._blocks.measuring = False
            self._own_s += waited + self._blocks.take() + parts.get("optimizer", 0.0)
        else:
            self._own_s += waited + working_s() - self._worked

    def line(self) -> dict[str, float]:
        """Means over the steps since the last line, and the time left."""
        found = {
            "perf/tokens_per_s": self._tokens / self._elapsed,
            "perf/tokens_per_s_per_rank": self._tokens / self._elapsed / self._world.size,
            "perf/step_s": self._elapsed / self._steps,
            "perf/data_wait_s": self._waited / self._steps,
        }
        found |= {f"perf/{part}_s": seconds / self._steps for part, seconds in self._parts.items()}
        if self._left_s is not None:
            found["perf/eta_s"] = self._left_s
        self._restart()
        return found

    def details(self) -> dict[str, float]:
        """Relative size of the last update, and the slowest rank since the last details (collective)."""
        world = self._world
        shared = torch.zeros(2 + world.size, dtype=torch.float64, device=world.device)
        shared[:2] = self._update.squares()
        shared[2 + world.rank] = self._own_s
        dist.all_reduce(shared)
        moved, size, *own_s_R = shared.tolist()
        self._own_s = 0.0
        slowest, ratio = slowest_of(own_s_R)
        return {
            "train/update_ratio": math.sqrt(moved / size) if size else 0.0,
            "perf/slowest_rank": slowest,
            "perf/straggler_ratio": ratio,
        }

    def _restart(self) -> None:
        self._steps = self._tokens = 0
        self._elapsed = self._waited = 0.0
        self._parts = dict.fromkeys(PARTS, 0.0)


class Laps(Protocol):
    """Seconds of consecutive work, by name."""

    def start(self) -> None:
        """Discard the time since the last lap."""
        ...

    def lap(self, name: str) -> None:
        """Count the time since the last lap, or the start, as `name`."""
        ...

    def take(self) -> dict[str, float]:
        """Seconds by name since the last call."""
        ...


class WallLaps:
    """Laps on the wall clock, for devices where work is done when a call returns."""

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
        taken, self._seconds = self._seconds, {}
        return taken


class DeviceLaps:
    """Laps by events in the stream of a GPU: the time the GPU worked, whenever the work was queued.

    `take` does not wait: laps that the GPU has not finished belong to the next call. A training step reads a sum over
    all ranks after its backward pass, so only the optimizer comes one step late.
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
            _, before = self._marks.popleft()
            name, after = self._marks[0]
            if name:
                seconds[name] = seconds.get(name, 0.0) + before.elapsed_time(after) / 1e3
        return seconds

    def _mark(self, name: str) -> None:
        self._marks.append((name, recorded(self._stream)))


def recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """An event with the time at which the GPU has done what is in `stream` now."""
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


class Event(Protocol):
    """What is used of `torch.cuda.Event`."""

    def query(self) -> bool:
        """Whether the GPU has reached it."""
        ...

    def elapsed_time(self, end_event: Any, /) -> float:
        """Milliseconds from this event to another one."""
        ...


class BlockTimes:
    """The time in which the GPU runs the blocks of a model, in both passes.

    The time of a whole pass does not show a slow GPU: with FSDP all ranks wait for each other's shards before every
    block. FSDP's hooks wait before the events here are recorded. Messages inside a block count as its work, so the
    ranks of one tp group look equally slow.
    """

    def __init__(self, blocks: Iterable[nn.Module], mark: Callable[[], Event]) -> None:
        """
        Args:
            blocks: already wrapped by FSDP; the first argument and the first result of a block are its residual stream.
            mark: records an event.
        """
        self.measuring = False
        self._mark = mark
        self._spans: deque[tuple[Event, Event]] = deque()
        self._forward: Event | None = None  # begin of the present block
        self._backward: list[Event] = []  # begin of its backward pass, once that has begun
        for block in blocks:
            block.register_forward_pre_hook(self._begin)
            block.register_forward_hook(self._end)

    def take(self) -> float:
        """Seconds since the last call. Does not wait: blocks that the GPU has not finished belong to the next call."""
        milliseconds = 0.0
        while self._spans and self._spans[0][1].query():
            begin, end = self._spans.popleft()
            milliseconds += begin.elapsed_time(end)
        return milliseconds / 1e3

    def _begin(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not self.measuring:
            return
        self._backward = []
        if inputs[0].requires_grad:
            inputs[0].register_hook(partial(self._end_backward, self._backward))
        self._forward = self._mark()

    def _end(self, block: nn.Module, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        if not self.measuring or self._forward is None:
            return
        self._spans.append((self._forward, self._mark()))
        if output[0].requires_grad:
            output[0].register_hook(partial(self._begin_backward, self._backward))

    def _begin_backward(self, begins: list[Event], gradient: torch.Tensor) -> None:
        begins.append(self._mark())

    def _end_backward(self, begins: list[Event], gradient: torch.Tensor) -> None:
        self._spans.append((begins.pop(), self._mark()))


class UpdateSize:
    """How far an optimizer step moves the parameters, for any optimizer.

    From the call of the optimizer to `squares`, a copy of this rank's shards is in memory; activations are gone.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._counted = [parameter for parameter in parameters if is_first_copy(parameter)]
        self._before: list[torch.Tensor] = []
        self._hook: RemovableHandle | None = None

    def watch(self) -> None:
        """Measure the next step."""
        self._hook = self._optimizer.register_step_pre_hook(lambda *_: self._remember())

    @torch.no_grad()
    def squares(self) -> torch.Tensor:
        """This rank's part of the squared L2 norms of the update and of the parameters after it: (2,) float64.

        The parts of all ranks add up. Zeros if the step was skipped.
        """
        if self._hook:
            self._hook.remove()
            self._hook = None
        before, self._before = self._before, []
        if not before:
            return torch.zeros(2, dtype=torch.float64)
        now = [shard_of(parameter) for parameter in self._counted]
        torch._foreach_sub_(before, now)
        norms = [torch.stack(torch._foreach_norm(part)) for part in (before, now)]
        return torch.stack([part.double().square().sum() for part in norms])

    @torch.no_grad()
    def _remember(self) -> None:
        self._before = [shard_of(parameter).clone() for parameter in self._counted]


class Eta:
    """Time left, from the pace of this attempt without its first step, which may compile."""

    def __init__(self, steps: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """`steps`: last step of the run."""
        self._steps, self._clock = steps, clock
        self._first: tuple[int, float] | None = None  # step, and the time at its end

    def after(self, step: int) -> float | None:
        """Seconds from the end of `step` to the end of the run, evaluations and checkpoints included at their rate so
        far; None after the first step of an attempt."""
        now = self._clock()
        if self._first is None:
            self._first = (step, now)
            return None
        first_step, since = self._first
        return (now - since) / (step - first_step) * (self._steps - step)


def working_s() -> float:
    """Seconds that this thread ran on a core or waited for a core; not sleep, and not waiting for messages.

    Ranks wait for each other in every layer, so all take the same wall time. Work time shows which rank is slow, also
    if another process takes its core. Without the scheduler figures of Linux: seconds on a core.
    """
    try:
        running, in_line, _ = SCHEDULE.read_text().split()
    except FileNotFoundError:
        return time.thread_time()
    return (int(running) + int(in_line)) / 1e9


def slowest_of(own_s_R: Sequence[float]) -> tuple[int, float]:
    """The rank with the most work time, and its time relative to the median rank; 1 if no rank worked."""
    slowest = max(range(len(own_s_R)), key=own_s_R.__getitem__)
    median = statistics.median(own_s_R)
    return slowest, own_s_R[slowest] / median if median > 0 else 1.0


def matmul_flops(device: torch.device, dtype: torch.dtype, hardware: HardwareConfig) -> float:
    """Peak FLOP/s of one device: from `hardware` if it describes this GPU, else of the fastest of some products of two
    square matrices.

    CPUs are timed in seconds that the threads ran on a core, so other processes on the machine do not count.
    """
    if device.type == "cuda" and hardware.name in torch.cuda.get_device_name(device).lower():
        return (hardware.bf16_tflops if dtype == torch.bfloat16 else hardware.fp32_tflops) * 1e12

    def clock() -> float:
        return time.perf_counter() if device.type == "cuda" else time.process_time() / torch.get_num_threads()

    size = 8192 if device.type == "cuda" else 1024  # a GPU takes longer to start a small product than to compute it
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(PRODUCTS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = clock()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, clock() - started)
    return 2 * size**3 / best
