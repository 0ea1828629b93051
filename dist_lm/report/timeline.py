"""Attempts, failures and checkpoints as spans and marks on an axis of time. Pure."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dist_lm.report.facts import RunFacts
from dist_lm.tracking.readable import counted, duration, span

MOST_MARKS = 400  # checkpoints drawn for one run
STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 43200, 86400)

Kind = Literal["attempt", "failed", "checkpoint", "best", "stopped", "growing", "finished"]


@dataclass(frozen=True)
class Item:
    """A span or a mark; `start` and `width` are per cent of the axis."""

    kind: Kind
    start: float
    width: float
    words: str

    @property
    def x(self) -> str:
        return f"{self.start:.3f}%"

    @property
    def wide(self) -> str:
        return f"{self.width:.3f}%"


@dataclass(frozen=True)
class Lane:
    """A run on the axis."""

    label: str
    words: str  # duration, failures, checkpoints
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Event:
    """A row of the table below the axis."""

    at: str
    label: str
    kind: str
    words: str


@dataclass(frozen=True)
class Timeline:
    """All runs on one axis, which begins with the earliest one."""

    lanes: tuple[Lane, ...]
    ticks: tuple[tuple[str, str], ...]  # (position, words)
    events: tuple[Event, ...]
    began: str
    left_out: int  # checkpoints not drawn


def timeline_of(runs: Sequence[RunFacts]) -> Timeline | None:
    """The timeline of runs; None if no run has a time."""
    ranges = {run.label: _range(run) for run in runs}
    known = [times for times in ranges.values() if times]
    if not known:
        return None
    start, stop = min(first for first, _ in known), max(last for _, last in known)
    length = max(stop - start, 1.0)

    def percent(at: float) -> float:
        return min(100.0, max(0.0, (at - start) / length * 100))

    lanes, left_out = [], 0
    for run in runs:
        times = ranges[run.label]
        if times is None:
            continue
        items = [
            Item("attempt", percent(first), max(0.2, percent(last) - percent(first)), words)
            for first, last, words in attempts(run)
        ]
        drawn = [point for point in run.checkpoints if point.time]
        left_out += max(0, len(drawn) - MOST_MARKS)
        for point in drawn[-MOST_MARKS:]:
            kind: Kind = "best" if "best" in point.marks else "checkpoint"
            marks = f" ({point.marks})" if point.marks else ""
            items.append(Item(kind, percent(point.time), 0, f"checkpoint of step {point.step:,}{marks}"))
        items += [
            Item(event["event"], percent(event["time"]), 0, _words(event))
            for event in run.events
            if event["event"] in ("failed", "stopped", "growing", "finished")
        ]
        lanes.append(Lane(run.label, _summary(run, times), tuple(items)))
    return Timeline(tuple(lanes), tuple(_ticks(length)), tuple(_events(runs, start)), clock(start), left_out)


def attempts(run: RunFacts) -> list[tuple[float, float, str]]:
    """(start, end, words) of each attempt; without a journal the whole run, from its metrics."""
    times = _range(run)
    found: list[tuple[float, float, str]] = []
    open_at: Mapping[str, Any] | None = None
    for event in run.events:
        if event["event"] == "started":
            open_at = event
        elif open_at and event["event"] in ("failed", "stopped", "finished"):
            found.append((open_at["time"], event["time"], _attempt(open_at, event["time"])))
            open_at = None
    if open_at and times:
        found.append((open_at["time"], max(open_at["time"], times[1]), _attempt(open_at, times[1])))
    if not found and times:
        found.append((*times, f"training, {duration(times[1] - times[0])}"))
    return found


def clock(at: float) -> str:
    """Local time for people."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _range(run: RunFacts) -> tuple[float, float] | None:
    times = [event["time"] for event in run.events] + [point.time for point in run.checkpoints]
    if len(run.clock.values):
        times += [float(run.clock.values.min()), float(run.clock.values.max())]
    return (min(times), max(times)) if times else None


def _summary(run: RunFacts, times: tuple[float, float]) -> str:
    failures = sum(event["event"] == "failed" for event in run.events)
    parts = [duration(times[1] - times[0])]
    parts += [counted(failures, "failure")] if failures else []
    parts += [counted(len(run.checkpoints), "checkpoint")]
    return ", ".join(parts)


def _attempt(event: Mapping[str, Any], stop: float) -> str:
    return f"attempt {event.get('attempt', 0)}: {_words(event)}, {duration(stop - event['time'])}"


def _words(event: Mapping[str, Any]) -> str:
    match event["event"]:
        case "started":
            nodes = counted(len(event.get("nodes", [])), "node")
            where = f"{nodes} × {event.get('ranks_per_node', 1)} ranks, {event.get('layout')}"
            return f"from step {event.get('step', 0):,}, {where}"
        case "failed":
            where = f"rank {event['rank']}: " if event.get("rank") is not None else ""
            left = event.get("restarts_left")
            more = f"; restarts left: {max(0, left)}" if isinstance(left, int) else ""
            return f"{where}{event.get('error', '')}{more}"
        case "stopped":
            return f"signal {event.get('signal')}"
        case "growing":
            return f"to {event.get('nodes')} nodes"
        case "finished":
            return f"{event.get('steps', 0):,} steps"
        case other:
            return str(other)


def _events(runs: Sequence[RunFacts], start: float) -> list[Event]:
    found = [(event["time"], run.label, event["event"], _words(event)) for run in runs for event in run.events]
    for run in runs:
        for point in run.checkpoints:
            if point.stall_s is not None and point.stall_s >= 1:  # shorter stalls do not matter
                words = f"step {point.step:,}: training waited {span(point.stall_s)}"
                found.append((point.time, run.label, "checkpoint", words))
    found.sort(key=lambda row: row[0])
    return [Event(f"+{duration(at - start)}", label, kind, words) for at, label, kind, words in found]


def _ticks(length: float) -> list[tuple[str, str]]:
    step = next((step for step in STEPS_S if length / step <= 6), None)
    if step is None:
        days = -(-length // (6 * 86400))
        step = days * 86400
    count = int(length // step) + 1
    return [(f"{number * step / length * 100:.3f}%", _short(number * step)) for number in range(count)]


def _short(seconds: float) -> str:
    if seconds == 0:
        return "0"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size and seconds % (size / 2) == 0:
            return f"{seconds / size:g} {unit}"
    return f"{seconds:g} s"
