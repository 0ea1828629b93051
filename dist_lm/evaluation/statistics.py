"""Computes figures of sampled answers with their uncertainty: pass@k, intervals, and paired tests of two models.

Everything is a function of its inputs: the bootstrap draws from a generator with a fixed seed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 10_000
AT_ONCE = 1 << 18  # items drawn at a time, so that a block stays in the CPU's cache
LEVEL = 0.95  # confidence level of intervals
SEED = 0
BISECTIONS = 50  # give a precision of 1e-15


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks, with its interval."""

    value: float
    low: float
    high: float
    tasks: int

    def __str__(self) -> str:
        """Returns `0.420 [0.280, 0.560]`."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class PairedTest:
    """The difference of two models on the same tasks, with its interval and p value."""

    difference: float  # mean over tasks, second model minus first
    low: float
    high: float
    p: float  # two-sided, under equal models
    method: str  # McNemar, or permutation for values other than 0 and 1


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Estimates the probability that one of k samples passes, without bias: Chen et al. 2021, equation 1.

    Args:
        samples: number of samples of a task, at least k; `passed` of them pass.
    """
    assert 0 <= passed <= samples >= k > 0
    # Every choice of k samples has one that passes.
    if samples - passed < k:
        return 1.0
    return 1.0 - math.prod((samples - passed - i) / (samples - i) for i in range(k))


def estimate(values: Sequence[float]) -> Estimate:
    """Returns the mean over tasks with its interval at `LEVEL`, from one value for each task; at least one.

    Values that are all 0 or 1 have the exact binomial interval: a bootstrap of equal values has no width. Any others
    are resampled (Efron 1979, percentile interval), with the same draws in every call.
    """
    assert len(values)
    if {*values} <= {0.0, 1.0}:
        passed = round(sum(values))
        return Estimate(passed / len(values), *binomial_interval(passed, len(values)), len(values))
    means = _resampled_means(np.asarray(values, np.float64))
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(np.mean(values)), float(low), float(high), len(values))


def binomial_interval(passed: int, tasks: int) -> tuple[float, float]:
    """Returns the interval of a share: neither end is refuted by a one-sided test at (1 - LEVEL)/2.

    Source: Clopper and Pearson 1934. It covers the true share with probability LEVEL at least, for any number of tasks.
    """
    assert 0 <= passed <= tasks > 0
    tail = (1 - LEVEL) / 2
    low = _share_where(lambda share: 1 - _at_most(passed - 1, tasks, share) > tail) if passed else 0.0
    high = _share_where(lambda share: _at_most(passed, tasks, share) < tail) if passed < tasks else 1.0
    return low, high


def _at_most(passed: int, tasks: int, share: float) -> float:
    """Returns P(X <= passed) for X ~ Binomial(tasks, share), 0 < share < 1."""
    passes = np.arange(passed + 1)
    choices = [math.lgamma(tasks + 1) - math.lgamma(x + 1) - math.lgamma(tasks - x + 1) for x in range(passed + 1)]

    # A sum of logarithms, because the coefficients of many tasks exceed a float.
    logs = np.array(choices) + passes * math.log(share) + (tasks - passes) * math.log1p(-share)
    return float(np.exp(logs).sum())


def _share_where(is_above: Callable[[float], bool]) -> float:
    """Returns the share in [0, 1] at which a condition begins to hold, by bisection; it must hold for all larger ones.
    About 0 if it always holds, about 1 if it never does.
    """
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if is_above(middle):
            high = middle
        else:
            low = middle
    return (low + high) / 2


def ratio_estimate(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Returns the ratio of two sums over items, such as bits and bytes of documents; items are resampled."""
    above = np.asarray(numerators, np.float64)
    below = np.asarray(denominators, np.float64)
    # Items are drawn whole: both numbers of an item belong together.
    ratios = np.concatenate([above[index].sum(axis=1) / below[index].sum(axis=1) for index in _resamples(len(above))])
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(above.sum() / below.sum()), float(low), float(high), len(above))


def paired_test(first: Sequence[float], second: Sequence[float]) -> PairedTest:
    """Compares two models by one value for each task, in the same order; at least one task.

    If all values are 0 or 1, the interval of the difference is `paired_interval`, and the p value comes from McNemar's
    exact test (binomial). Otherwise the interval is resampled, at `LEVEL`, and a permutation test flips the signs of
    the tasks' differences.
    """
    assert len(first) == len(second) > 0
    difference = np.asarray(second, np.float64) - np.asarray(first, np.float64)

    if {*first, *second} <= {0.0, 1.0}:
        method = "McNemar"
        low, high = paired_interval(first, second)
        p = mcnemar(int((difference > 0).sum()), int((difference < 0).sum()))
    else:
        method = "permutation"
        low, high = np.quantile(_resampled_means(difference), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        generator = np.random.default_rng(SEED)
        signs = (generator.choice([-1.0, 1.0], size=shape) for shape in _blocks(len(difference)))
        means = np.abs(np.concatenate([(block * difference).mean(axis=1) for block in signs]))
        # The observed assignment counts as one, so p is never 0 (Phipson and Smyth 2010).
        p = (1 + int((means >= abs(difference.mean()) - 1e-12).sum())) / (1 + RESAMPLES)
    return PairedTest(float(difference.mean()), float(low), float(high), p, method)


def paired_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Returns the interval of the difference of two shares of the same tasks, second minus first, at `LEVEL`.

    Values are 0 or 1. Unlike a bootstrap it has a width where the models agree on all tasks: two models that pass 0 of
    50 may differ by 0.07. It holds the differences that a score test does not refute. Source: Tango 1998, Statistics in
    Medicine 17:891, equation 6.
    """
    gained = sum(1 for x, y in zip(first, second, strict=True) if y and not x)
    lost = sum(1 for x, y in zip(first, second, strict=True) if x and not y)
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)

    def crossing(target: float, low: float, high: float) -> float:
        """Returns where the score, which falls as the difference grows, crosses a value between two differences."""
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            if score_of_difference(middle, gained, lost, len(first)) > target:
                low = middle
            else:
                high = middle
        return (low + high) / 2

    difference = (gained - lost) / len(first)
    return crossing(z, -1.0, difference), crossing(-z, difference, 1.0)


def score_of_difference(difference: float, gained: int, lost: int, tasks: int) -> float:
    """Returns how many standard errors the observed difference of two shares lies above an assumed one.

    The standard error is that of the likeliest shares which have the assumed difference.

    Args:
        difference: the assumed one, in [-1, 1].
        gained: tasks that only the second model passes.
        lost: tasks that only the first one passes.
        tasks: all of them.
    """
    # The likeliest share of lost tasks solves a quadratic equation.
    linear = (2 * tasks - gained + lost) * difference - gained - lost
    constant = -lost * difference * (1 - difference)
    # Rounding may give a radicand a little below 0.
    root = math.sqrt(max(linear * linear - 8 * tasks * constant, 0.0))
    lost_share = (root - linear) / (4 * tasks)

    excess = gained - lost - tasks * difference
    variance = tasks * (2 * lost_share + difference * (1 - difference))
    if variance <= 0:
        return math.copysign(math.inf, excess) if excess else 0.0
    return excess / math.sqrt(variance)


def mcnemar(gained: int, lost: int) -> float:
    """Returns the two-sided exact p value of McNemar's test (1947).

    `gained` and `lost` count the tasks that only the second or only the first of two models passes. 1 without such
    tasks.
    """
    total = gained + lost
    if total == 0:
        return 1.0
    # If the models are equal, each of these tasks is won by either of them with probability 1/2.
    tail = sum(math.comb(total, i) for i in range(min(gained, lost) + 1)) / 2**total
    return min(1.0, 2 * tail)


def _resampled_means(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values[index].mean(axis=1) for index in _resamples(len(values))])


def _resamples(n_items: int) -> Iterator[np.ndarray]:
    """Yields `RESAMPLES` draws of `n_items` items with replacement, as blocks of indices [resamples, items].

    The generator is read in the same order whatever the size of a block, so the draws are the same.
    """
    generator = np.random.default_rng(SEED)
    return (generator.integers(n_items, size=shape) for shape in _blocks(n_items))


def _blocks(n_items: int) -> Iterator[tuple[int, int]]:
    """Yields shapes [resamples, items] of about `AT_ONCE` items each and `RESAMPLES` rows in total."""
    rows = max(1, AT_ONCE // n_items)
    return ((min(rows, RESAMPLES - begin), n_items) for begin in range(0, RESAMPLES, rows))
