"""How the loss of steps has moved of late, and whether a step's stands out. Pure."""

import math
from dataclasses import dataclass

WINDOW = 128  # steps
SEEN_ENOUGH = 32  # steps before which nothing is a spike
DEVIATIONS = 6.0


@dataclass(frozen=True)
class LossTrend:
    """Mean and variance of the first `WINDOW` losses, from then on with weights that fall by 1 - 1/WINDOW a step.

    A value of a few numbers, so that a checkpoint can hold it and a resumed run goes on with the same.
    """

    seen: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def is_spike(self, loss: float) -> bool:
        """Whether a loss lies more than `DEVIATIONS` standard deviations above the mean; never before
        `SEEN_ENOUGH` losses, nor for one that is not finite (its step was skipped, and is counted as such)."""
        if self.seen < SEEN_ENOUGH or not math.isfinite(loss):
            return False
        return loss > self.mean + DEVIATIONS * math.sqrt(self.variance)

    def after(self, loss: float) -> "LossTrend":
        """With one more loss (West 1979, incremental mean and variance); one that is not finite is left out."""
        if not math.isfinite(loss):
            return self
        weight = 1 / min(self.seen + 1, WINDOW)
        off = loss - self.mean
        return LossTrend(self.seen + 1, self.mean + weight * off, (1 - weight) * (self.variance + weight * off * off))
