"""Interleaved rounds: every way once a round, so that a busy minute of the machine hits all of them alike."""

import math
import statistics
from collections.abc import Callable, Sequence

ROUND_S = 0.5
LONGEST_ROUND = 50  # steps


def order_of_round(ways: Sequence[str], index: int) -> list[str]:
    """The ways, begun with another one each round: none always follows the same one's heat or cold caches alone."""
    shift = index % len(ways)
    return [*ways[shift:], *ways[:shift]]


def seconds_per_step(
    ways: Sequence[str], rounds: int, time_steps: Callable[[str, int], float], round_s: float = ROUND_S
) -> dict[str, list[float]]:
    """Seconds of a step of each way, one figure a round.

    Args:
        time_steps: (way, steps) -> seconds those steps took.
        round_s: seconds a way should take in a round, which sets how many steps it does.
    """
    steps = {way: min(LONGEST_ROUND, max(1, math.ceil(round_s / time_steps(way, 1)))) for way in ways}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for index in range(rounds):
        for way in order_of_round(ways, index):
            seconds[way].append(time_steps(way, steps[way]) / steps[way])
    return seconds


def spread(values: Sequence[float]) -> float:
    """Distance between the quartiles as a fraction of the median; 0 for one value."""
    if len(values) < 2:
        return 0.0
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return (upper - lower) / median
