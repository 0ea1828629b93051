"""Long curves in few points, so that nothing that stands out is lost. Pure.

Of each stretch of steps the smallest and the largest value are kept, at the steps where they were measured: every point
of a curve is a measured one. (The min-max part of M4, Jugel et al. 2014.) The first steps are kept as they are, because
a logarithmic axis shows them large.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dist_lm.report.facts import Series

HEAD = 64  # values at the start that are kept as they are
TREND_FROM = 100  # values: fewer are seen at a glance
TREND_POINTS = 120
WINDOW = 1 / 40  # of all values, that a point of the trend is the mean of


@dataclass(frozen=True)
class Curve:
    """What is drawn of a series."""

    points: Series
    trend: Series | None  # means over a window around each step; None: too few values, or they do not jitter
    measured: int  # values there were
    not_finite: int  # of them


def curve_of(series: Series, most: int) -> Curve:
    """A series as at most about `most` points, and its trend."""
    return Curve(
        points=downsample(series, most),
        trend=trend_of(series, min(TREND_POINTS, most // 2)),
        measured=len(series.steps),
        not_finite=int(np.count_nonzero(~np.isfinite(series.values))),
    )


def downsample(series: Series, most: int) -> Series:
    """At most `most` points (but never fewer than 8): all, or head, last, minimum and maximum of each stretch.

    A stretch without a finite value keeps one of its points, which is a gap in the curve.
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
    """Means of about `WINDOW` of all values around steps that are evenly spread, from all values, not only the drawn.

    None for short series and for those that run smoothly (a learning rate), whose trend would be the curve again.
    """
    finite = np.isfinite(series.values)
    steps, values = series.steps[finite], series.values[finite]
    if len(values) < TREND_FROM:
        return None
    changes = np.abs(np.diff(values))
    if changes.sum() < 3 * (values.max() - values.min()):  # it goes up and down no more than a few times
        return None
    half = max(2, int(len(values) * WINDOW / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    centres = np.unique(np.linspace(0, len(values) - 1, points).astype(np.int64))
    reach = np.minimum(half, np.minimum(centres, len(values) - 1 - centres))  # even on both sides, also at the ends
    low, high = centres - reach, centres + reach + 1
    return Series(steps[centres], (sums[high] - sums[low]) / (high - low))
