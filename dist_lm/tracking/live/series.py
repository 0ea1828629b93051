"""Many values kept as a few, and drawn in a line of text."""

from collections.abc import Sequence
from itertools import pairwise

LIMIT = 256  # points kept: more than a terminal is wide


class Series:
    """Means of equal stretches of all values that were added: memory does not grow with a run."""

    def __init__(self) -> None:
        self._points: list[float] = []
        self._stretch = 1  # values behind a point
        self._sum, self._count = 0.0, 0  # of the stretch under way
        self.first: float | None = None
        self.count = 0  # of values that were added

    def add(self, value: float) -> None:
        """Append a finite value."""
        if self.first is None:
            self.first = value
        self.count += 1
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count < self._stretch:
            return
        self._points.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self._points) == LIMIT:
            self._points = shrunk(self._points, LIMIT // 2)
            self._stretch *= 2

    def points(self) -> list[float]:
        """From the first to the last, the stretch under way included."""
        return self._points + ([self._sum / self._count] if self._count else [])


def shrunk(values: Sequence[float], width: int) -> list[float]:
    """At most `width` means of neighbours, of stretches as equal as can be."""
    n = len(values)
    if n <= width:
        return list(values)
    cuts = [place * n // width for place in range(width + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]


def sparkline(values: Sequence[float], width: int, ramp: str, floor: float | None = None) -> str:
    """Values as characters of `ramp`, lowest first, at most `width` of them.

    Args:
        floor: what the lowest character stands for; None: the least value.
    """
    shown = shrunk(values, max(1, width))
    if not shown or width < 1:
        return ""
    low = min(shown) if floor is None else min(floor, *shown)
    high = max(shown)
    if high <= low:
        return ramp[len(ramp) // 2] * len(shown)
    return "".join(ramp[min(len(ramp) - 1, int((value - low) / (high - low) * len(ramp)))] for value in shown)
