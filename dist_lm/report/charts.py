"""Which curves share a chart, and which points of a long curve are drawn: from the registry of metrics. Pure.

Of each stretch of steps the smallest and the largest value are kept at their steps: every drawn point was measured and
no spike is lost (the min-max part of M4, Jugel et al. 2014). The first values are all kept, because a logarithmic axis
shows them large.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from dist_lm.report.facts import RunFacts, Series
from dist_lm.tracking.readable import four_digits
from dist_lm.tracking.registry import Metric, UnknownMetricError, metric_of

HEAD = 64  # first values, all kept
TREND_FROM = 100  # values: shorter curves need no trend
TREND_POINTS = 120
WINDOW = 1 / 40  # share of all values behind a point of the trend
POINTS = 100_000  # of all curves of a report; bounds the size of the file
MOST_POINTS = 1000  # of one curve: more than a screen has columns
KNOTS = 200  # of the lines that map steps to tokens and hours
TOKENS = "train/tokens"
HEADLINES = (  # what a stage is for comes first; cards and visible charts show the first `SHOWN_FIRST` of a run
    "tools/call_exact",
    "preference/accuracy",
    "reward/accuracy",
    "rlhf/win_rate",
    "rlhf/reward_mean",
    "rlhf/kl",
    "generate/prompts",
    "generate/refused",
    "generate/tokens",
    "generate/tokens_per_s",
    "val/bits_per_byte",
    "val/loss",
    "train/loss",
    "perf/tokens_per_s",
    "perf/memory_gib",
)
COLOURS = 8
SHOWN_FIRST = 4


@dataclass(frozen=True)
class Curve:
    """The drawn points of a series."""

    points: Series
    trend: Series | None  # windowed means; None: a short or a smooth series
    measured: int  # values in the series
    not_finite: int  # NaN and infinite values among them


def curve_of(series: Series, most: int) -> Curve:
    """A series as about `most` points or fewer, and its trend."""
    return Curve(
        points=downsample(series, most),
        trend=trend_of(series, min(TREND_POINTS, most // 2)),
        measured=len(series.steps),
        not_finite=int(np.count_nonzero(~np.isfinite(series.values))),
    )


def downsample(series: Series, most: int) -> Series:
    """At most `most` points (at least 8): the first values, the last one, minimum and maximum of each stretch.

    A stretch without a finite value keeps one point, which is drawn as a gap.
    """
    count = len(series.steps)
    most = max(8, most)
    if count <= most:
        return series
    head = min(HEAD, most // 4)
    stretches = max(1, (most - head - 1) // 2)
    edges = np.linspace(series.steps[head], series.steps[-1] + 1, stretches + 1)
    starts = np.searchsorted(series.steps, edges)
    kept = [np.arange(head)]
    for start, stop in pairwise(starts):
        if start == stop:
            continue
        part = series.values[start:stop]
        if not np.isfinite(part).any():
            kept.append(np.array([start]))
            continue
        kept.append(start + np.unique([np.nanargmin(part), np.nanargmax(part)]))
    chosen = np.unique(np.concatenate([*kept, [count - 1]]))
    return Series(series.steps[chosen], series.values[chosen])


def trend_of(series: Series, points: int = TREND_POINTS) -> Series | None:
    """Means over a window of `WINDOW` of all values around evenly spread steps.

    None for short series and for smooth ones such as a learning rate, whose trend would equal the curve.
    """
    finite = np.isfinite(series.values)
    steps, values = series.steps[finite], series.values[finite]
    if len(values) < TREND_FROM:
        return None
    changes = np.abs(np.diff(values))
    if changes.sum() < 3 * (values.max() - values.min()):  # hardly any ups and downs
        return None
    half = max(2, int(len(values) * WINDOW / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    centres = np.unique(np.linspace(0, len(values) - 1, points).astype(np.int64))
    reach = np.minimum(half, np.minimum(centres, len(values) - 1 - centres))  # symmetric, also at both ends
    low, high = centres - reach, centres + reach + 1
    return Series(steps[centres], (sums[high] - sums[low]) / (high - low))


@dataclass(frozen=True)
class Line:
    """One curve of a chart."""

    run: int  # index of the run in the report
    label: str  # of the run, or the value of a family's slot
    colour: int
    curve: Curve


@dataclass(frozen=True)
class Chart:
    """Curves on the same axes."""

    name: str
    metric: Metric
    lines: tuple[Line, ...]

    @property
    def positive(self) -> bool:
        """Whether all values are positive, as a logarithmic axis needs."""
        return all(np.nanmin(line.curve.points.values, initial=np.inf) > 0 for line in self.lines)

    @property
    def moves(self) -> bool:
        """Whether a line has two different values."""
        return any(len(np.unique(line.curve.points.values)) > 1 for line in self.lines)

    @property
    def drawable(self) -> bool:
        """Whether any value is finite."""
        return any(np.isfinite(line.curve.points.values).any() for line in self.lines)


@dataclass(frozen=True)
class StageCharts:
    """The charts of a stage: the main ones, the others by group, and metrics without a curve."""

    stage: str
    first: tuple[Chart, ...]
    groups: Mapping[str, tuple[Chart, ...]]
    still: tuple[Chart, ...]  # measured once, or constant

    @property
    def charts(self) -> list[Chart]:
        return [*self.first, *(chart for group in self.groups.values() for chart in group)]


def known(name: str) -> Metric:
    """The registry's metric of a name; a metric of another version has a name only."""
    try:
        return metric_of(name)
    except UnknownMetricError:
        return Metric(name, "", "", "", (), "other")


def charts_of(stages: Mapping[str, Sequence[RunFacts]], runs: Sequence[RunFacts]) -> list[StageCharts]:
    """The charts of every stage, with as many points as the size of the report allows."""
    curves = sum(len(run.series) for run in runs)
    most = int(np.clip(POINTS / max(1, curves), 40, MOST_POINTS))
    place = {id(run): number for number, run in enumerate(runs)}
    return [_stage(stage, members, place, most) for stage, members in stages.items()]


def _stage(stage: str, runs: Sequence[RunFacts], place: Mapping[int, int], most: int) -> StageCharts:
    charts = [_chart(title, names, runs, place, most) for title, names in _titles(runs).items()]
    still = tuple(chart for chart in charts if chart.drawable and not chart.moves)
    moving = [chart for chart in charts if chart.drawable and chart.moves]
    headlines = [chart for name in HEADLINES for chart in moving if chart.name == name]
    first = tuple((headlines or moving)[:SHOWN_FIRST])
    groups: dict[str, list[Chart]] = {}
    for chart in moving:
        if chart not in first:
            groups.setdefault(chart.metric.group, []).append(chart)
    return StageCharts(stage, first, {group: tuple(members) for group, members in groups.items()}, still)


def _titles(runs: Sequence[RunFacts]) -> dict[str, list[str]]:
    """The metrics of each chart: a family of one run, or one metric of several runs."""
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for run in runs for name in run.series):
        found.setdefault(name if len(runs) > 1 else family(known(name)), []).append(name)
    return {title: sorted(names, key=lambda name: (name != title, name)) for title, names in found.items()}


def _chart(title: str, names: Sequence[str], runs: Sequence[RunFacts], place: Mapping[int, int], most: int) -> Chart:
    """The curves of `names`. Several runs have their colours, the same ones in every chart."""
    several = len(runs) > 1
    found = [(number, run, name) for number, run in enumerate(runs) for name in names if name in run.series]
    lines = tuple(
        Line(
            place[id(run)],
            run.label if several else name.removeprefix(title).lstrip("_/") or "all",
            number if several else count,
            curve_of(run.series[name], most),
        )
        for count, (number, run, name) in enumerate(found)
    )
    the_part_is_the_whole = not several and len(lines) == 2 and same(lines[0].curve, lines[1].curve)
    return Chart(title, known(names[0]), lines[:1] if the_part_is_the_whole else lines)


def same(one: Curve, other: Curve) -> bool:
    """Whether two curves have equal points."""
    return np.array_equal(one.points.steps, other.points.steps) and np.array_equal(
        one.points.values, other.points.values, equal_nan=True
    )


def family(metric: Metric) -> str:
    """The chart of a metric: `val/loss_{corpus}` shares that of `val/loss`."""
    return metric.name.partition("{")[0].rstrip("_/") if metric.slot else metric.name


@dataclass(frozen=True)
class Still:
    """The value of a metric without a curve."""

    label: str
    colour: int
    value: str
    when: str  # the step of a single measurement


def still_values(chart: Chart) -> list[Still]:
    """The values of a chart without a curve."""
    found = []
    for line in chart.lines:
        points = line.curve.points
        finite = points.values[np.isfinite(points.values)]
        value = four_digits(float(finite[-1])) if len(finite) else "not finite"
        when = f"step {int(points.steps[0]):,}" if line.curve.measured == 1 else ""
        found.append(Still(line.label, line.colour % COLOURS, value, when))
    if len({line.run for line in chart.lines}) == 1 and len({(one.value, one.when) for one in found}) == 1:
        parts = f"all {len(found)} parts" if len(found) > 1 else ""
        return [replace(found[0], label="", when=", ".join(part for part in (found[0].when, parts) if part))]
    return found


class Numbers:
    """Lists of steps; curves with the same steps share a list."""

    def __init__(self) -> None:
        self.lists: list[list[float | None]] = []
        self._place: dict[bytes, int] = {}

    def keep(self, numbers: np.ndarray) -> int:
        """Add a list and return its index."""
        key = numbers.tobytes()
        if key not in self._place:
            self._place[key] = len(self.lists)
            self.lists.append(numbers.tolist())
        return self._place[key]


def as_data(stages: Sequence[StageCharts], runs: Sequence[RunFacts]) -> dict[str, Any]:
    """The data of the page's script, ready for JSON: `charts`, `steps` (shared lists), `runs` (their axes)."""
    numbers = Numbers()
    charts = [
        {
            "name": chart.name,
            "unit": chart.metric.unit,
            "positive": chart.positive,
            "lines": [_line(line, numbers) for line in chart.lines],
        }
        for stage in stages
        for chart in stage.charts
    ]
    return {"charts": charts, "runs": [_axes(run) for run in runs], "steps": numbers.lists}


def _line(line: Line, numbers: Numbers) -> dict[str, Any]:
    data = {
        "run": line.run,
        "label": line.label,
        "colour": line.colour,
        "x": numbers.keep(line.curve.points.steps),
        "y": _rounded(line.curve.points.values),
    }
    if line.curve.trend:
        data["trend"] = {"x": numbers.keep(line.curve.trend.steps), "y": _rounded(line.curve.trend.values)}
    return data


def _axes(run: RunFacts) -> dict[str, Any]:
    """Knots of the maps from step to tokens and to hours since the run began."""
    began = run.clock.values[0] if len(run.clock.values) else 0.0
    hours = Series(run.clock.steps, np.maximum.accumulate(run.clock.values - began) / 3600)
    return {"tokens": _knots(run.series.get(TOKENS)), "hours": _knots(hours)}


def _knots(series: Series | None) -> dict[str, list] | None:
    if series is None or len(series.steps) < 2:
        return None
    chosen = np.unique(np.linspace(0, len(series.steps) - 1, KNOTS).astype(np.int64))
    return {"x": series.steps[chosen].tolist(), "y": _rounded(series.values[chosen], digits=7)}


def _rounded(values: np.ndarray, digits: int = 6) -> list[float | None]:
    """Six digits, more than a screen can show; None (a gap) for a value that is not finite."""
    shown = (float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in values.tolist())
    return [int(value) if value is not None and value.is_integer() else value for value in shown]
