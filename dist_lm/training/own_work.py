"""How long ranks work by themselves, so that one that holds up the others is found.

Ranks wait for each other in every layer, so their passes take equally long by the clock on the wall, whoever is slow.
What tells them apart is the time that is not spent waiting. Dimensions: R ranks.
"""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

SCHEDULE = Path("/proc/thread-self/schedstat")  # nanoseconds on a core, nanoseconds in line for one, slices


def working_s() -> float:
    """Seconds that this thread was on a core or stood in line for one: all but sleeping and waiting for messages.

    A neighbour that takes the core shows in it. Without Linux's figures of the scheduler: seconds on a core.
    """
    try:
        running, in_line, _ = SCHEDULE.read_text().split()
    except FileNotFoundError:
        return time.thread_time()
    return (int(running) + int(in_line)) / 1e9


def slowest_of(own_s_R: Sequence[float]) -> tuple[int, float]:
    """The rank that worked longest, and its time as a multiple of the median rank's; 1 where nobody worked."""
    slowest = max(range(len(own_s_R)), key=own_s_R.__getitem__)
    median = statistics.median(own_s_R)
    return slowest, own_s_R[slowest] / median if median > 0 else 1.0
