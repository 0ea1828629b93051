"""Curves of a line of text, from any number of values."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_lm.tracking.live.glyphs import ASCII, UNICODE
from dist_lm.tracking.live.series import LIMIT, Series, shrunk, sparkline

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=600)


@settings(max_examples=30, deadline=None)
@given(VALUES)
def test_a_series_stays_small_and_keeps_the_mean(values: list[float]) -> None:
    series = Series()
    for value in values:
        series.add(value)
    points = series.points()
    assert len(points) <= LIMIT
    assert min(values) - 1e-6 <= min(points) <= max(points) <= max(values) + 1e-6
    assert series.first == values[0]


def test_a_long_series_keeps_its_shape() -> None:
    series = Series()
    for step in range(100_000):
        series.add(float(step))
    points = series.points()
    assert LIMIT // 2 <= len(points) <= LIMIT
    assert points == sorted(points)
    assert sum(points) / len(points) == pytest.approx(50_000, rel=0.02)


@settings(max_examples=30, deadline=None)
@given(VALUES, st.integers(1, 200))
def test_a_sparkline_is_never_wider_than_asked(values: list[float], width: int) -> None:
    for glyphs in (UNICODE, ASCII):
        line = sparkline(values, width, glyphs.ramp)
        assert len(line) == min(width, len(values))
        assert set(line) <= set(glyphs.ramp)


def test_lowest_and_highest_are_the_ends_of_the_ramp() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8, UNICODE.ramp) == UNICODE.ramp
    assert sparkline([10, 5], 8, UNICODE.ramp, floor=0) == "█▅"
    assert sparkline([3, 3, 3], 8, UNICODE.ramp) == UNICODE.ramp[4] * 3
    assert sparkline([], 8, UNICODE.ramp) == ""


def test_neighbours_are_put_together_evenly() -> None:
    assert shrunk([1, 3, 5, 7], 2) == [2, 6]
    assert shrunk([1, 2], 5) == [1, 2]
