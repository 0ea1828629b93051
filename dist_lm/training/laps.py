"""Where the time of a step goes: seconds by the name of its parts, without making a GPU wait."""

import time
from collections import deque
from typing import Protocol

import torch


class Laps(Protocol):
    """Seconds by name, one after the other."""

    def start(self) -> None:
        """What came before is nobody's."""
        ...

    def lap(self, name: str) -> None:
        """All since the last lap, or the start, was `name`."""
        ...

    def take(self) -> dict[str, float]:
        """Seconds by name since they were last taken."""
        ...


class WallLaps:
    """By the clock on the wall: where work is done when a call returns."""

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
    """By events in the stream of a GPU: between two of them is what it did, whenever it was asked to.

    `take` waits for nothing: what the GPU has not come to yet is part of the next one. A training step reads a sum of
    all ranks behind its backward pass, so only its optimizer comes a step later.
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
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        self._marks.append((name, event))


def laps_on(device: torch.device) -> Laps:
    """What times work on a device."""
    return DeviceLaps(device) if device.type == "cuda" else WallLaps()
