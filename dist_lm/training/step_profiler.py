"""Traces of some steps of a run for Perfetto and `dist-lm profile summarize`, and the memory of the GPU in these steps.

Profiling changes no number of a run, but profiled steps take longer: every operator is recorded. Training waits
while the trace is written, so a run that is interrupted inside the window writes none.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dist_lm.training.step_meter import Laps

log = logging.getLogger(__name__)

STEP = "ProfilerStep#"  # annotation around a step; torch's tools know the name
LAP = "end of "  # annotation where a lap of a step ends
START = "start of passes"  # annotation where the first lap of a step begins
MEMORY_EVENTS = 100_000  # newest allocations and frees in a memory snapshot


class StepProfiler:
    """Records some steps, and writes their trace after the last one.

    Leaving it as a context manager drops a recording that is not complete.
    """

    def __init__(self, steps: Sequence[int], on_gpu: bool, trace: Path, memory: Path) -> None:
        """
        Args:
            steps: first and last step that is recorded.
            trace: file of this rank's trace, `.json.gz`.
            memory: file of this rank's memory snapshot in torch's format (a pickle), if `on_gpu`.
        """
        self._first, self._last = steps
        self._trace, self._memory = trace, memory
        self._on_gpu = on_gpu
        self._profile: profile | None = None
        self._step: record_function | None = None  # annotation of the current step, if it is recorded

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._step:
            log.warning("no trace of profile.steps=[%d,%d]: the run stops inside them", self._first, self._last)
            self._stop()
            self._profile = None

    def reached(self, completed: int) -> None:
        """Notes that step `completed` is complete and the next one begins: starts, goes on or ends recording.

        One step before the window it prepares the profiler, which takes seconds. After the last step of the window it
        writes the trace, which may take minutes. At other steps it does nothing.
        """
        step = completed + 1
        if self._step and step > self._last:
            self._write_trace()
        if not max(1, self._first - 1) <= step <= self._last:
            return

        # The profiler takes seconds to start, so it is prepared one step early.
        if self._profile is None:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._on_gpu
            self._profile = profile(activities=activities)
            self._profile.prepare_trace()

        if self._step:
            self._step.__exit__(None, None, None)
        elif step >= self._first:
            self._profile.start_trace()
            if self._on_gpu:
                torch.cuda.memory._record_memory_history(stacks="python", max_entries=MEMORY_EVENTS)
        if step >= self._first:
            self._step = record_function(f"{STEP}{step}")
            self._step.__enter__()

    def marked(self, laps: Laps) -> Laps:
        """Returns `laps`; while a step is recorded they also appear in the trace."""
        return MarkedLaps(laps) if self._step else laps

    def _stop(self) -> profile:
        assert self._profile
        assert self._step
        self._step.__exit__(None, None, None)
        self._step = None
        self._profile.stop_trace()
        return self._profile

    def _write_trace(self) -> None:
        """Ends the recording, writes the trace, on a GPU also a snapshot of its memory, and logs where. The folder of
        the trace is made; its parent must exist."""
        recording = self._stop()
        self._profile = None
        self._trace.parent.mkdir(exist_ok=True)
        recording.export_chrome_trace(str(self._trace))
        if self._on_gpu:
            torch.cuda.memory._dump_snapshot(str(self._memory))
            torch.cuda.memory._record_memory_history(enabled=None)
        log.info("profile of steps %d to %d: %s", self._first, self._last, self._trace)


class MarkedLaps:
    """Measures laps and leaves an annotation in the trace at the end of each one."""

    def __init__(self, laps: Laps) -> None:
        self._laps = laps

    def start(self) -> None:
        """See `Laps`."""
        with record_function(START):
            self._laps.start()

    def lap(self, name: str) -> None:
        """See `Laps`."""
        with record_function(LAP + name):
            self._laps.lap(name)

    def take(self) -> dict[str, float]:
        """See `Laps`."""
        return self._laps.take()
