"""Charts of a report: which curves share one, and which points of a long curve are drawn. Pure.

Each stretch of steps keeps its smallest and its largest value at their steps: every drawn point was measured and no
spike is lost (the min-max part of M4, Jugel et al. 2014). All of the first values are kept, because a logarithmic axis
gives them most of its space.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from dist_lm.report.facts import RunFacts, Series
from dist_lm.tracking.readable import four_digits
from dist_lm.tracking.registry import Metric, UnknownMetricError, metric_of

HEAD = 64  # number of first values that are all kept
TREND_FROM = 100  # number of values; shorter curves need no trend
TREND_POINTS = 120  # most points of a trend
WINDOW = 1 / 40  # share of all values that a point of the trend is the mean of
POINTS = 100_000  # most points of all curves of a report; bounds the size of the file
MOST_POINTS = 1000  # most points of one curve: more than a screen has columns
KNOTS = 200  # most points of the lines that map steps to tokens and hours
TOKENS = "train/tokens"
HEADLINES = (  # most important first; cards and visible charts show the first `NUM_VISIBLE` that a run has
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
COLOURS = 8  # number of colours in the style sheet, and most lines of a chart
WORDS = {  # words of metric names that titles write out; "": the unit beside the title says it
    "approx": "approximate",
    "args": "arguments",
    "cpu": "CPU",
    "ema": "averaged weights:",
    "eta": "time left",
    "frac": "fraction",
    "gib": "",
    "gpu": "GPU",
    "grad": "gradient",
    "kl": "KL divergence",
    "logprob": "log-probability",
    "lr": "learning rate",
    "mfu": "MFU",
    "std": "standard deviation",
    "var": "variance",
}
KINDS = {  # prefix of a metric name: how titles end
    "train": ", training",
    "val": ", validation",
    "perf": "",
    "system": ", node",
}
NUM_VISIBLE = 4


@dataclass(frozen=True)
class Curve:
    """The drawn points of a series."""

    points: Series
    trend: Series | None  # windowed means; None for a short or a smooth series
    measured: int  # number of values in the series
    not_finite: int  # number of NaN and infinite values among them


def curve_of(series: Series, most: int) -> Curve:
    """Returns a series as about `most` points or fewer, and its trend."""
    return Curve(
        points=downsample(series, most),
        trend=trend_of(series, min(TREND_POINTS, most // 2)),
        measured=len(series.steps),
        not_finite=int(np.count_nonzero(~np.isfinite(series.values))),
    )


def downsample(series: Series, most: int) -> Series:
    """Returns at most `most` points (at least 8): the first values, the last one, minimum and maximum of each stretch
    of steps. A series of no more values is returned itself.

    A stretch without a finite value keeps one point, which is drawn as a gap.
    """
    num_values = len(series.steps)
    most = max(8, most)
    if num_values <= most:
        return series

    # Stretches of equal length in steps, not in number of values: values may be spread unevenly.
    head = min(HEAD, most // 4)
    num_stretches = max(1, (most - head - 1) // 2)
    edges = np.linspace(series.steps[head], series.steps[-1] + 1, num_stretches + 1)
    starts = np.searchsorted(series.steps, edges)

    indices = [np.arange(head)]
    for start, stop in pairwise(starts):
        if start == stop:
            continue
        stretch = series.values[start:stop]
        if not np.isfinite(stretch).any():
            indices.append(np.array([start]))
            continue
        indices.append(start + np.unique([np.nanargmin(stretch), np.nanargmax(stretch)]))

    chosen = np.unique(np.concatenate([*indices, [num_values - 1]]))
    return Series(series.steps[chosen], series.values[chosen])


def trend_of(series: Series, points: int = TREND_POINTS) -> Series | None:
    """Returns means of the finite values over windows of `WINDOW` of all of them, around at most `points` evenly spread
    ones; towards the ends the windows get shorter.

    Returns None for short series and for smooth ones such as a learning rate, whose trend would equal the curve.
    """
    finite = np.isfinite(series.values)
    steps = series.steps[finite]
    measured = series.values[finite]
    if len(measured) < TREND_FROM:
        return None

    # A curve that hardly moves up and down is its own trend: the way it covers is little more than its range.
    changes = np.abs(np.diff(measured))
    if changes.sum() < 3 * (measured.max() - measured.min()):
        return None

    # Means of windows from differences of cumulative sums; windows are symmetric, so they shrink at both ends.
    half_window = max(2, int(len(measured) * WINDOW / 2))
    sums = np.concatenate([[0.0], np.cumsum(measured)])
    centres = np.unique(np.linspace(0, len(measured) - 1, points).astype(np.int64))
    reach = np.minimum(half_window, np.minimum(centres, len(measured) - 1 - centres))
    low = centres - reach
    high = centres + reach + 1
    return Series(steps[centres], (sums[high] - sums[low]) / (high - low))


@dataclass(frozen=True)
class Line:
    """One curve of a chart."""

    run: int  # index of the run in the report
    label: str  # name of the run, or the value of a family's slot
    colour: int
    curve: Curve


@dataclass(frozen=True)
class Chart:
    """Curves on the same axes: at most `COLOURS`, unless all are constant."""

    name: str
    metric: Metric
    lines: tuple[Line, ...]
    part: str = ""  # such as "2 of 3", if the lines of a metric need several charts

    @property
    def title(self) -> str:
        """Returns the name for people, such as "Bits per byte, validation"."""
        return readable_title(self.name) + (f" ({self.part})" if self.part else "")

    @property
    def positive(self) -> bool:
        """Returns whether all values are positive, as a logarithmic axis needs."""
        return all(np.nanmin(line.curve.points.values, initial=np.inf) > 0 for line in self.lines)

    @property
    def moves(self) -> bool:
        """Returns whether a line has two different values."""
        return any(len(np.unique(line.curve.points.values)) > 1 for line in self.lines)

    @property
    def drawable(self) -> bool:
        """Returns whether any value is finite."""
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
        """Returns all charts with curves, in the order of the page."""
        return [*self.first, *(chart for group in self.groups.values() for chart in group)]


def readable_title(name: str) -> str:
    """Returns the name of a metric in words: `train/grad_norm` is "Gradient norm, training"."""
    kind, slash, rest = name.partition("/")
    if not slash:
        return name
    words = [WORDS.get(word, word) for word in rest.replace("/", "_").split("_")]
    # The unit beside the title says seconds.
    if words[-1] == "s":
        words[-1] = "second" if "per" in words else ""
    title = " ".join(word for word in words if word)
    return title[:1].upper() + title[1:] + KINDS.get(kind, f" ({kind})")


def registered_metric(name: str) -> Metric:
    """Returns the registry's metric of a name; a metric of another version has only a name."""
    try:
        return metric_of(name)
    except UnknownMetricError:
        return Metric(name, "", "", "", (), "other")


def charts_of(stages: Mapping[str, Sequence[RunFacts]], runs: Sequence[RunFacts]) -> list[StageCharts]:
    """Returns the charts of every stage, with as many points as the size of the report allows."""
    num_curves = sum(len(run.series) for run in runs)
    most = int(np.clip(POINTS / max(1, num_curves), 40, MOST_POINTS))
    # Equal runs may occur twice in the report, so a run is told apart by identity.
    index_of = {id(run): index for index, run in enumerate(runs)}
    return [_stage(stage, members, index_of, most) for stage, members in stages.items()]


def _stage(stage: str, runs: Sequence[RunFacts], index_of: Mapping[int, int], most: int) -> StageCharts:
    """Returns the charts of a stage; metrics without a finite value have none.

    Args:
        index_of: `id` of a run -> its index in the report.
        most: most points of a curve.
    """
    charts = [chart for title, names in _titles(runs).items() for chart in _charts(title, names, runs, index_of, most)]

    # A constant needs no chart; it is listed with its value.
    still = tuple(chart for chart in charts if chart.drawable and not chart.moves)
    moving = [chart for chart in charts if chart.drawable and chart.moves]

    # The first charts are visible at once; a stage without headlines shows any.
    headlines = [chart for name in HEADLINES for chart in moving if chart.name == name]
    first = tuple((headlines or moving)[:NUM_VISIBLE])

    groups: dict[str, list[Chart]] = {}
    for chart in moving:
        if chart not in first:
            groups.setdefault(chart.metric.group, []).append(chart)

    return StageCharts(stage, first, {group: tuple(group_charts) for group, group_charts in groups.items()}, still)


def _titles(runs: Sequence[RunFacts]) -> dict[str, list[str]]:
    """Returns the names of the metrics of each chart by its title: for one run those of a family, for several runs a
    single one."""
    names_of: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for run in runs for name in run.series):
        title = name
        if len(runs) == 1:
            title = family(registered_metric(name))
        names_of.setdefault(title, []).append(name)

    # The total stands before its parts.
    return {title: sorted(names, key=lambda name: (name != title, name)) for title, names in names_of.items()}


def _charts(
    title: str, names: Sequence[str], runs: Sequence[RunFacts], index_of: Mapping[int, int], most: int
) -> list[Chart]:
    """Returns the charts of `names`, with a line for each of them in each run that has it; more than `COLOURS` lines
    are divided among several. Each of several runs has one colour, the same in every chart; for one run each name has
    one.

    Args:
        index_of: `id` of a run -> its index in the report.
        most: most points of a curve.
    """
    several = len(runs) > 1
    curves = [(index, run, name) for index, run in enumerate(runs) for name in names if name in run.series]

    lines = []
    for position, (index, run, name) in enumerate(curves):
        label, colour = run.label, index
        # The parts of a family, such as languages, have no run to be told apart by.
        if not several:
            label, colour = name.removeprefix(title).lstrip("_/") or "all", position
        lines.append(Line(index_of[id(run)], label, colour, curve_of(run.series[name], most)))

    # A family with one part that equals the total, such as one language, needs one curve.
    if not several and len(lines) == 2 and equal_curves(lines[0].curve, lines[1].curve):
        lines = lines[:1]

    chart = Chart(title, registered_metric(names[0]), tuple(lines))
    # Constants become a list of values, which has room for all.
    if len(lines) <= COLOURS or not chart.moves:
        return [chart]

    parts = [chart.lines[begin : begin + COLOURS] for begin in range(0, len(lines), COLOURS)]
    return [replace(chart, lines=part, part=f"{number} of {len(parts)}") for number, part in enumerate(parts, start=1)]


def equal_curves(first: Curve, second: Curve) -> bool:
    """Returns whether two curves have equal points."""
    return np.array_equal(first.points.steps, second.points.steps) and np.array_equal(
        first.points.values, second.points.values, equal_nan=True
    )


def family(metric: Metric) -> str:
    """Returns the name of a metric's chart: `val/loss_{corpus}` is in the chart of `val/loss`."""
    if not metric.slot:
        return metric.name
    return metric.name.partition("{")[0].rstrip("_/")


@dataclass(frozen=True)
class Still:
    """The last value of a metric without a curve."""

    label: str
    colour: int
    value: str
    when: str  # the step of a single measurement


def still_values(chart: Chart) -> list[Still]:
    """Returns the last finite value of each line of a chart without a curve; `not finite` if it has none.

    If the chart has one run and all values are equal, they become one without a label.
    """
    stills = []
    for line in chart.lines:
        points = line.curve.points

        last_value = "not finite"
        if len(points.finite):
            last_value = four_digits(float(points.finite[-1]))
        when = f"step {int(points.steps[0]):,}" if line.curve.measured == 1 else ""
        stills.append(Still(line.label, line.colour % COLOURS, last_value, when))

    # Equal values of all parts of a family, such as languages, are one line.
    one_run = len({line.run for line in chart.lines}) == 1
    if one_run and len({(still.value, still.when) for still in stills}) == 1:
        parts = f"all {len(stills)} parts" if len(stills) > 1 else ""
        notes = [note for note in (stills[0].when, parts) if note]
        return [replace(stills[0], label="", when=", ".join(notes))]

    return stills


class Numbers:
    """Lists of steps for the page's script; curves with the same steps share a list, which keeps the file small."""

    def __init__(self) -> None:
        self.lists: list[list[float | None]] = []
        self._index_of: dict[bytes, int] = {}

    def keep(self, numbers: np.ndarray) -> int:
        """Adds a list and returns its index; a list that exists is not added again."""
        key = numbers.tobytes()
        if key not in self._index_of:
            self._index_of[key] = len(self.lists)
            self.lists.append(numbers.tolist())
        return self._index_of[key]


def as_data(stages: Sequence[StageCharts], runs: Sequence[RunFacts]) -> dict[str, Any]:
    """Returns the data of the page's script, ready for JSON, under three keys; without stages and runs all are empty.

    - `charts`: the charts of all stages in one list, each with `name`, `unit`, `positive` (whether all values are) and
      `lines`, see `_line`.
    - `steps`: lists of steps, which lines name by their index.
    - `runs`: for each of `runs`, in this order, the maps of its axes, `tokens` and `hours`, see `_axes`.

    A value that is not finite is None.
    """
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
    """Returns a line for the page's script: run, label, colour, `x`, the index of its steps in `numbers`, which gets
    them, `y`, its values, and `trend` with both if it has one."""
    fields = {
        "run": line.run,
        "label": line.label,
        "colour": line.colour,
        "x": numbers.keep(line.curve.points.steps),
        "y": _rounded(line.curve.points.values),
    }

    if line.curve.trend:
        fields["trend"] = {"x": numbers.keep(line.curve.trend.steps), "y": _rounded(line.curve.trend.values)}

    return fields


def _axes(run: RunFacts) -> dict[str, Any]:
    """Returns the knots of the maps from step to `tokens`, and to `hours` since the run began.

    Each is `{"x": steps, "y": values}`, or None if it has fewer than two points.
    """
    # Time must not run backwards on an axis: a resumed run repeats steps.
    hours = Series(run.clock.steps, np.maximum.accumulate(run.clock.values - run.clock.values[:1]) / 3600)
    return {"tokens": _knots(run.series.get(TOKENS)), "hours": _knots(hours)}


def _knots(series: Series | None) -> dict[str, list] | None:
    if series is None or len(series.steps) < 2:
        return None

    indices = np.unique(np.linspace(0, len(series.steps) - 1, KNOTS).astype(np.int64))
    return {"x": series.steps[indices].tolist(), "y": _rounded(series.values[indices], digits=7)}


def _rounded(numbers: np.ndarray, digits: int = 6) -> list[float | None]:
    """Rounds to six digits, more than a screen can show; None (a gap) stands for a value that is not finite."""
    rounded = (float(f"{number:.{digits}g}") if np.isfinite(number) else None for number in numbers.tolist())
    # JSON writes an integer shorter than the same number as a float.
    return [int(number) if number is not None and number.is_integer() else number for number in rounded]
