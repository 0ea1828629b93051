"""The state that the live view draws: stages of a pipeline, work in progress, a training stage, the last warning.

The launcher updates it with lines of the metrics file and with heartbeats of the ranks; `live_view` draws it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from dist_lm.tracking.metrics import is_late
from dist_lm.tracking.readable import four_digits, listed, passes_in_words, percent, three_decimals

LIMIT = 256  # most points of a series: more than a terminal has columns
StageState = Literal["waiting", "running", "done"]


class Series:
    """The curve of a metric as at most `LIMIT` means of equally many neighbours: constant memory for any run."""

    def __init__(self) -> None:
        self._points: list[float] = []
        self._stretch = 1  # number of values that a point is the mean of
        # sum and count of the newest point, which is not complete yet
        self._sum = 0.0
        self._count = 0
        self.first: float | None = None
        self.count = 0  # number of values added

    def add(self, value: float) -> None:
        """Appends a finite value; at `LIMIT` points neighbours are merged, so a point is the mean of twice as many."""
        if self.first is None:
            self.first = value
        self.count += 1

        self._sum += value
        self._count += 1
        if self._count < self._stretch:
            return

        self._points.append(self._sum / self._count)
        self._sum = 0.0
        self._count = 0

        # Halve the resolution when the limit is reached.
        if len(self._points) == LIMIT:
            self._points = shrunk(self._points, LIMIT // 2)
            self._stretch *= 2

    def points(self) -> list[float]:
        """Returns the means, the incomplete last one included."""
        if not self._count:
            return [*self._points]
        return [*self._points, self._sum / self._count]


def shrunk(points: Sequence[float], width: int) -> list[float]:
    """Returns at most `width` means of neighbouring points."""
    n = len(points)
    if n <= width:
        return list(points)

    # Integer cuts differ by at most one value, so that every point is a mean of about as many.
    cuts = [index * n // width for index in range(width + 1)]
    return [sum(points[start:stop]) / (stop - start) for start, stop in pairwise(cuts)]


@dataclass(frozen=True)
class Figure:
    """A metric with a row of its own in the live view."""

    metric: str
    label: str  # first word of the row
    form: Callable[[float], str]
    unit: str = ""
    floor: float | None = None  # start of the vertical axis; None: the curve's minimum
    plain: str = ""  # format in a plain progress line; empty: not in it
    importance: int = 3  # 0: the last row that a small terminal drops


FIGURES = (
    Figure("train/loss", "loss", three_decimals, plain="loss {}", importance=0),
    Figure("val/bits_per_byte", "val", three_decimals, "bits/byte", plain="val {} bits/byte", importance=2),
    Figure("preference/accuracy", "accuracy", percent, "held out", plain="val accuracy {}", importance=2),
    Figure("reward/accuracy", "accuracy", percent, "held out", plain="val accuracy {}", importance=2),
    Figure("tools/call_exact", "calls", percent, "exact"),
    Figure("rlhf/reward_mean", "reward", three_decimals, plain="reward {}", importance=0),
    Figure("rlhf/kl", "kl", three_decimals, "nats", floor=0.0, plain="kl {}"),
    Figure("rlhf/win_rate", "wins", percent, "held out"),
    Figure("perf/tokens_per_s", "speed", four_digits, "tokens/s", floor=0.0, plain="{} tokens/s", importance=1),
    Figure("train/lr", "lr", four_digits, floor=0.0, importance=9),
)
"""Rows of a training stage, in this order; a metric that the stage does not have gets no row."""

EPOCHS = "train/epochs"
NAMED_CORPORA = 3  # corpora of a mix that a line names

HEADLINES = (
    ("rlhf/win_rate", "wins {}", percent),
    ("rlhf/reward_mean", "reward {}", three_decimals),
    ("preference/accuracy", "accuracy {}", percent),
    ("reward/accuracy", "accuracy {}", percent),
    ("tools/call_exact", "calls {} exact", percent),
    ("val/bits_per_byte", "val {} bits/byte", three_decimals),
    ("val/loss", "val loss {}", three_decimals),
    ("train/loss", "loss {}", three_decimals),
)
"""The result of a finished stage is the first of these metrics that it has."""


@dataclass(frozen=True)
class GangFacts:
    """The nodes and ranks of an attempt."""

    hosts: tuple[str, ...]  # one host name for each node
    ranks_per_node: int
    device: str
    layout: str
    attempt: int = 1


@dataclass(frozen=True)
class RankPulse:
    """The last heartbeat of a rank."""

    rank: int
    step: int  # completed steps
    doing: str
    age_s: float  # age of the heartbeat when it was read


@dataclass
class TrainingState:
    """The progress of a training stage."""

    steps: int
    since: float = 0.0  # seconds since 1970: lines with an earlier time belong to an earlier attempt
    step: int = 0
    newest: dict[str, tuple[float, int]] = field(default_factory=dict)  # metric -> (last finite value, its step)
    series: dict[str, Series] = field(default_factory=dict)  # metric -> curve, for the metrics of `FIGURES`
    gang: GangFacts | None = None
    ranks: tuple[RankPulse, ...] = ()
    ranks_at: float = 0.0  # time of the last `hear`, by the clock of the view
    saved: tuple[int, float | None] | None = None  # (step, time) of the newest checkpoint, by the same clock
    best: tuple[int, float] | None = None  # (step, val/loss) of the lowest val/loss
    _time: float = 0.0
    _first: tuple[int, float] | None = None  # (step, time in s) of the first line of this attempt

    def take(self, line: Mapping[str, Any]) -> bool:
        """Updates the state with one line of the metrics file.

        A line whose step is before the last one's, as after a resumed run has cut the file, clears curves, newest
        values and the best loss first. A late line (`is_late`) changes nothing.

        Returns:
            False for a line of an earlier attempt (before `since`), which does not count for the estimate of the time
            left.
        """
        step = line["step"]
        at = line.get("time", self._time)
        # Scores of tasks may arrive after later steps, so they move neither the step nor the clock.
        if is_late(line):
            return at >= self.since

        # A resumed run has cut the metrics file, which is then read again from its start.
        if step < self.step:
            self.newest = {}
            self.series = {}
            self.best = None

        # Only steps of this attempt tell how long a step takes now.
        earlier = at < self.since
        if earlier:
            self._first = None
        elif self._first is None or step < self.step:
            self._first = (step, at)
        self.step = step
        self._time = at

        finite = {
            name: value for name, value in line.items() if isinstance(value, int | float) and math.isfinite(value)
        }
        self.newest.update({name: (value, step) for name, value in finite.items()})

        for figure in FIGURES:
            if figure.metric in finite:
                self.series.setdefault(figure.metric, Series()).add(finite[figure.metric])

        loss = finite.get("val/loss")
        if loss is not None and (self.best is None or loss < self.best[1]):
            self.best = (step, loss)

        return not earlier

    def shown(self, metric: str, words: str, form: Callable[[float], str]) -> str:
        """Returns the newest value of a metric in `words`; an older value is followed by its step: `val 3.421 @ 400`.

        The text is empty if the metric has no value.
        """
        if metric not in self.newest:
            return ""

        value, step = self.newest[metric]
        text = words.format(form(value))
        if step != self.step:
            text += f" @ {step:,}"
        return text

    @property
    def epochs(self) -> str:
        """The passes over the corpora so far: `1.2`, or `1.2 (language 0.30)` with a mix; empty if not known."""
        if EPOCHS not in self.newest:
            return ""
        mixed = sorted(name for name in self.newest if name.startswith(EPOCHS + "_"))
        others = [f"{name.removeprefix(EPOCHS + '_')} {passes_in_words(self.newest[name][0])}" for name in mixed]
        text = passes_in_words(self.newest[EPOCHS][0])
        return f"{text} ({listed(others, NAMED_CORPORA)})" if others else text

    def hear(self, ranks: Sequence[RankPulse], now: float) -> None:
        """Records the heartbeats of all ranks."""
        self.ranks, self.ranks_at = tuple(ranks), now

    def save(self, step: int, at: float | None) -> None:
        """Records the step of the newest checkpoint (0: there is none) and its time (None: unknown)."""
        if step and (self.saved is None or self.saved[0] != step):
            self.saved = (step, at)

    def start(self, gang: GangFacts, since: float = 0.0) -> None:
        """Begins another attempt at `since`, in seconds since 1970; lines of earlier attempts may be read again."""
        self.gang = gang
        self.ranks = ()
        if since > self.since:
            self.since = since
            self._first = None

    def seconds_left(self) -> float | None:
        """Estimates the time left in seconds from the mean step time of this attempt; None: unknown yet, or
        finished."""
        if self._first is None or self.step <= self._first[0] or self.step >= self.steps:
            return None

        step_s = (self._time - self._first[1]) / (self.step - self._first[0])
        return step_s * (self.steps - self.step)

    def headline(self) -> str:
        """Returns the result of the stage in a few words."""
        return next(filter(None, (self.shown(name, words, form) for name, words, form in HEADLINES)), "")


@dataclass
class Work:
    """One piece of work in progress; it may be counted."""

    label: str
    total: int | None
    began: float  # seconds, by the clock of the view
    done: int = 0
    text: Callable[[], str] = str  # returns the progress text; called only when it is drawn
    training: TrainingState | None = None
    result: str | None = None  # None until it ends well
    seconds_left: Callable[[], float | None] | None = None  # None: estimated from the count

    def show(self, done: int, text: Callable[[], str], seconds_left: Callable[[], float | None] | None = None) -> None:
        """Records the progress; the view draws it at its own pace.

        Args:
            seconds_left: returns the time left, None while it is unknown. Needed where the count tells less: units of
                several sizes, or some that an earlier command has done.
        """
        self.done, self.text, self.seconds_left = done, text, seconds_left

    def finish(self, text: str) -> None:
        """Records the result."""
        self.result = text


@dataclass
class StageLine:
    """A stage of the pipeline."""

    name: str
    state: StageState
    detail: str  # the plan before the stage runs, its result afterwards
    began: float | None = None
    ended: float | None = None


@dataclass
class LiveState:
    """The full state of the live view. Times are in seconds, by one clock."""

    began: float
    title: str = ""
    stages: list[StageLine] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)  # works in progress, the innermost last
    over: list[str] = field(default_factory=list)  # results of finished works of the running stage
    warning: str = ""
    warnings: int = 0
    warned_at: float = 0.0

    def begin(self, name: str, now: float) -> None:
        """Marks a stage as running."""
        stage = self._stage(name)
        stage.state = "running"
        stage.began = now
        self.over = []

    def done(self, name: str, now: float, detail: str = "") -> None:
        """Marks a stage as done; without `detail` the result of its last work remains."""
        stage = self._stage(name)
        stage.state = "done"
        stage.ended = now
        stage.detail = detail or stage.detail

    def close(self, work: Work) -> None:
        """Removes a piece of work from those in progress. A result becomes the detail of the running stage, that of a
        training as its headline; without one, or outside a pipeline, nothing else changes."""
        self.works.remove(work)

        # An interrupted work has no result to show, and work outside a pipeline has no row.
        running = self.running
        if work.result is None or running is None:
            return

        if work.training:
            running.detail = work.training.headline() or work.result
        else:
            self.over.append(f"{work.label}: {work.result}")
            running.detail = self.over[-1]

    def warn(self, text: str, now: float) -> None:
        """Records the newest warning and counts all warnings."""
        self.warning = text
        self.warnings += 1
        self.warned_at = now

    @property
    def running(self) -> StageLine | None:
        """Returns the running stage; None if no stage runs."""
        return next((stage for stage in self.stages if stage.state == "running"), None)

    @property
    def training(self) -> TrainingState | None:
        """Returns the training in progress; None if there is none."""
        return next((work.training for work in reversed(self.works) if work.training), None)

    def _stage(self, name: str) -> StageLine:
        return next(stage for stage in self.stages if stage.name == name)
