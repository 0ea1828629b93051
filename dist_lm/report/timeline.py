"""Attempts, failures and checkpoints as spans and marks on an axis of time. Pure."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dist_lm.report.facts import RunFacts
from dist_lm.tracking.readable import counted, duration, span

MOST_MARKS = 400  # most checkpoints drawn for one run
# Distances between two ticks of the axis, in seconds.
STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 43200, 86400)

Kind = Literal["attempt", "failed", "checkpoint", "best", "stopped", "growing", "finished"]


@dataclass(frozen=True)
class Item:
    """A span or a mark on the axis; `start` and `width` are percentages of its length."""

    kind: Kind
    start: float
    width: float
    words: str

    @property
    def x(self) -> str:
        """Returns the position as SVG writes it."""
        return f"{self.start:.3f}%"

    @property
    def wide(self) -> str:
        """Returns the width as SVG writes it."""
        return f"{self.width:.3f}%"


@dataclass(frozen=True)
class Lane:
    """The row of a run on the axis."""

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
    """All runs on one axis, which starts with the earliest one."""

    lanes: tuple[Lane, ...]
    ticks: tuple[tuple[str, str], ...]  # (position, words)
    events: tuple[Event, ...]
    began: str
    left_out: int  # number of checkpoints that are not drawn


def timeline_of(runs: Sequence[RunFacts]) -> Timeline | None:
    """Returns the timeline of runs, which begins with the earliest event, checkpoint or step of any; None if no run has
    a time. A run without one has no lane, and only the newest MOST_MARKS checkpoints of a run are drawn."""
    ranges = {run.label: _range(run) for run in runs}
    known_ranges = [times for times in ranges.values() if times]

    if not known_ranges:
        return None

    start = min(first for first, _ in known_ranges)
    stop = max(last for _, last in known_ranges)
    length = max(stop - start, 1.0)

    def percent(at: float) -> float:
        return min(100.0, max(0.0, (at - start) / length * 100))

    lanes = []
    left_out = 0
    for run in runs:
        time_range = ranges[run.label]
        if time_range is None:
            continue

        items = [
            Item("attempt", percent(first), max(0.2, percent(last) - percent(first)), words)
            for first, last, words in attempts(run)
        ]

        # Many marks would cover each other, so only the newest are drawn.
        timed = [checkpoint for checkpoint in run.checkpoints if checkpoint.time]
        left_out += max(0, len(timed) - MOST_MARKS)
        for checkpoint in timed[-MOST_MARKS:]:
            kind: Kind = "best" if "best" in checkpoint.marks else "checkpoint"
            marks = f" ({checkpoint.marks})" if checkpoint.marks else ""
            items.append(Item(kind, percent(checkpoint.time), 0, f"checkpoint of step {checkpoint.step:,}{marks}"))

        items += [
            Item(event["event"], percent(event["time"]), 0, _words(event))
            for event in run.events
            if event["event"] in ("failed", "stopped", "growing", "finished")
        ]

        lanes.append(Lane(run.label, _summary(run, time_range), tuple(items)))

    return Timeline(tuple(lanes), tuple(_ticks(length)), tuple(_events(runs, start)), clock(start), left_out)


def attempts(run: RunFacts) -> list[tuple[float, float, str]]:
    """Returns (start, end, words) of each attempt, in seconds since 1970; without a journal, one for the full run, from
    its metrics and checkpoints, or none without these. An attempt without an end ends with the last sign of life."""
    time_range = _range(run)
    spans: list[tuple[float, float, str]] = []
    started: Mapping[str, Any] | None = None

    for event in run.events:
        if event["event"] == "started":
            started = event
        elif started and event["event"] in ("failed", "stopped", "finished"):
            spans.append((started["time"], event["time"], _attempt(started, event["time"])))
            started = None

    # The attempt still runs, or the launcher was killed: it ends with the last sign of life.
    if started and time_range:
        spans.append((started["time"], max(started["time"], time_range[1]), _attempt(started, time_range[1])))

    if not spans and time_range:
        spans.append((*time_range, f"training, {duration(time_range[1] - time_range[0])}"))

    return spans


def clock(at: float) -> str:
    """Formats a time in seconds since 1970 as local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _range(run: RunFacts) -> tuple[float, float] | None:
    times = [event["time"] for event in run.events] + [checkpoint.time for checkpoint in run.checkpoints]
    if len(run.clock.values):
        times += [float(run.clock.values.min()), float(run.clock.values.max())]
    if not times:
        return None
    return min(times), max(times)


def _summary(run: RunFacts, time_range: tuple[float, float]) -> str:
    failures = sum(event["event"] == "failed" for event in run.events)
    facts = [duration(time_range[1] - time_range[0])]
    if failures:
        facts.append(counted(failures, "failure"))
    facts.append(counted(len(run.checkpoints), "checkpoint"))
    return ", ".join(facts)


def _attempt(event: Mapping[str, Any], stop: float) -> str:
    return f"attempt {event.get('attempt', 0)}: {_words(event)}, {duration(stop - event['time'])}"


def _words(event: Mapping[str, Any]) -> str:
    """Returns an event of a run's journal in words; an unknown kind is named."""
    match event["event"]:
        case "started":
            nodes = counted(len(event.get("nodes", [])), "node")
            placement = f"{nodes} × {event.get('ranks_per_node', 1)} ranks, {event.get('layout')}"
            return f"from step {event.get('step', 0):,}, {placement}"

        case "failed":
            # The loss of a node belongs to no rank.
            words = str(event.get("error", ""))
            if event.get("rank") is not None:
                words = f"rank {event['rank']}: {words}"
            if isinstance(event.get("restarts_left"), int):
                words += f"; restarts left: {max(0, event['restarts_left'])}"
            return words

        case "stopped":
            return f"signal {event.get('signal')}"
        case "growing":
            return f"to {event.get('nodes')} nodes"
        case "finished":
            return f"{event.get('steps', 0):,} steps"
        case unknown:
            return str(unknown)


def _events(runs: Sequence[RunFacts], start: float) -> list[Event]:
    """Returns the events of all runs, and the checkpoints for which training waited a second or more, in order of time,
    which counts from `start` (seconds since 1970)."""
    rows = [(event["time"], run.label, event["event"], _words(event)) for run in runs for event in run.events]

    for run in runs:
        for checkpoint in run.checkpoints:
            # Shorter stalls do not matter.
            if checkpoint.stall_s is not None and checkpoint.stall_s >= 1:
                words = f"step {checkpoint.step:,}: training waited {span(checkpoint.stall_s)}"
                rows.append((checkpoint.time, run.label, "checkpoint", words))

    rows.sort(key=lambda row: row[0])
    return [Event(f"+{duration(at - start)}", label, kind, words) for at, label, kind, words in rows]


def _ticks(length: float) -> list[tuple[str, str]]:
    # At most six ticks; an axis of many days gets a multiple of a day.
    days = -(-length // (6 * 86400))
    step = next((step for step in STEPS_S if length / step <= 6), days * 86400)

    num_ticks = int(length // step) + 1
    return [(f"{index * step / length * 100:.3f}%", _short(index * step)) for index in range(num_ticks)]


def _short(seconds: float) -> str:
    if seconds == 0:
        return "0"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        # Halves are readable (1.5 h), other fractions get a smaller unit.
        if seconds >= size and seconds % (size / 2) == 0:
            return f"{seconds / size:g} {unit}"
    return f"{seconds:g} s"
