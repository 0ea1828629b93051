"""How long a run still takes, by the pace of this attempt."""

import time
from collections.abc import Callable


class Eta:
    """Told of every step. The first one of an attempt may compile and is left out of its pace."""

    def __init__(self, steps: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """`steps`: of the whole run."""
        self._steps, self._clock = steps, clock
        self._first: tuple[int, float] | None = None  # step and time at its end

    def after(self, step: int) -> float | None:
        """Seconds to the last step, evaluations and checkpoints at the rate at which they came so far; None after the
        first step of an attempt."""
        now = self._clock()
        if self._first is None:
            self._first = (step, now)
            return None
        first_step, since = self._first
        return (now - since) / (step - first_step) * (self._steps - step)
