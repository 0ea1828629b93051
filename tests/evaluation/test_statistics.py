"""Figures against values by hand and against exhaustive sampling."""

import tracemalloc
from fractions import Fraction
from itertools import combinations, product
from math import comb

import numpy as np
import pytest

from dist_lm.evaluation import statistics
from dist_lm.evaluation.statistics import (
    estimate,
    mcnemar,
    paired_interval,
    paired_test,
    pass_at_k,
    ratio_estimate,
)


@pytest.mark.parametrize(("samples", "passed"), [(5, 0), (5, 1), (5, 3), (5, 5), (8, 2)])
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(samples, passed):
    results = [True] * passed + [False] * (samples - passed)
    for k in range(1, samples + 1):
        subsets = list(combinations(results, k))
        assert pass_at_k(samples, passed, k) == pytest.approx(sum(any(one) for one in subsets) / len(subsets))


def test_an_interval_is_that_of_the_mean_over_tasks():
    values = [0.9] * 30 + [0.1] * 70
    found = estimate(values)
    error = 1.96 * (0.8**2 * 0.3 * 0.7 / 100) ** 0.5
    assert (found.value, found.tasks) == (pytest.approx(0.34), 100)
    assert (found.low, found.high) == (pytest.approx(0.34 - error, abs=0.012), pytest.approx(0.34 + error, abs=0.012))
    assert estimate(values) == found


@pytest.mark.parametrize(("passed", "tasks"), [(0, 1), (0, 50), (1, 50), (6, 50), (49, 50), (50, 50), (53, 164)])
def test_the_ends_of_a_share_are_refuted_at_2_5_percent(passed, tasks):
    """Binomial sums of exact fractions at the ends (Clopper and Pearson 1934)."""

    def at_most(count: int, share: Fraction) -> float:
        return float(sum(comb(tasks, i) * share**i * (1 - share) ** (tasks - i) for i in range(count + 1)))

    found = estimate([1.0] * passed + [0.0] * (tasks - passed))
    assert found.value == passed / tasks
    low, high = Fraction(found.low), Fraction(found.high)
    assert found.low == 0 if passed == 0 else at_most(passed - 1, low) == pytest.approx(0.975, abs=1e-9)
    assert found.high == 1 if passed == tasks else at_most(passed, high) == pytest.approx(0.025, abs=1e-9)


def test_an_interval_without_a_pass_has_a_width():
    found = estimate([0.0] * 50)
    assert (found.low, found.high) == (0, pytest.approx(1 - 0.025 ** (1 / 50)))  # 0.071
    assert estimate([1.0] * 50).low == pytest.approx(0.025 ** (1 / 50))


def test_a_ratio_weighs_items_by_their_denominator():
    found = ratio_estimate([10.0, 30.0], [10.0, 10.0])
    assert found.value == 2.0
    assert (found.low, found.high) == (1.0, 3.0)
    assert ratio_estimate([1.0, 100.0], [1.0, 50.0]).value == pytest.approx(101 / 51)


def test_mcnemar_is_the_binomial_test():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar(2, 8) == mcnemar(8, 2)
    assert mcnemar(3, 3) == 1.0


def test_models_that_differ_on_the_same_tasks_are_told_apart():
    first, second = [0.0] * 20 + [1.0] * 10, [1.0] * 12 + [0.0] * 8 + [1.0] * 10
    found = paired_test(first, second)
    assert found.method == "McNemar"
    assert found.difference == pytest.approx(0.4)
    assert found.p == pytest.approx(2 / 2**12)
    assert found.low > 0
    same = paired_test(first, first)
    assert (same.difference, same.p) == (0, 1)
    back = paired_test(second, first)
    assert (back.difference, back.p) == (-found.difference, found.p)


@pytest.mark.parametrize(("gained", "lost", "tasks"), [(2, 12, 50), (0, 0, 50), (0, 7, 40), (30, 1, 164)])
def test_the_ends_of_the_interval_of_two_shares_are_refuted_by_their_likelihood(gained, lost, tasks):
    """Tango's statistic, with the likeliest shares found by search, is 1.96 at both ends."""
    first = [1.0] * lost + [0.0] * (tasks - lost)
    second = [0.0] * lost + [1.0] * gained + [0.0] * (tasks - lost - gained)
    for end in paired_interval(first, second):
        shares = np.linspace(max(0.0, -end), (1 - end) / 2, 2_000_001)[1:-1]  # of lost tasks; gained ones: + end
        likelihood = gained * np.log(shares + end) + lost * np.log(shares)
        likelihood += (tasks - gained - lost) * np.log1p(-2 * shares - end)
        share = shares[likelihood.argmax()]
        score = (gained - lost - tasks * end) / (tasks * (2 * share + end - end**2)) ** 0.5
        assert abs(score) == pytest.approx(1.96, abs=2e-3)


def test_models_that_agree_on_every_task_may_still_differ():
    nothing = paired_test([0.0] * 50, [0.0] * 50)
    assert (nothing.difference, nothing.p) == (0, 1)
    assert (nothing.low, nothing.high) == pytest.approx((-0.0714, 0.0714), abs=1e-3)
    everything = paired_test([1.0] * 50, [1.0] * 50)
    assert (everything.low, everything.high) == pytest.approx((nothing.low, nothing.high))
    opposite = paired_test([0.0] * 50, [1.0] * 50)
    assert 0.8 < opposite.low < opposite.high <= 1 + 1e-12


def interval_of_counts(gained: int, lost: int, tasks: int) -> tuple[float, float]:
    """`paired_interval` of models that agree on all other tasks."""
    agreed = [0.0] * (tasks - gained - lost)
    return paired_interval([0.0] * gained + [1.0] * lost + agreed, [1.0] * gained + [0.0] * lost + agreed)


def test_the_comparison_of_the_evaluation_page_has_its_interval():
    """6 of 50 questions are won and none is lost."""
    assert mcnemar(6, 0) == pytest.approx(0.031, abs=5e-4)
    assert interval_of_counts(6, 0, 50) == pytest.approx((0.040, 0.238), abs=5e-4)


@pytest.mark.parametrize("tasks", [40, 50, 100, 164])
@pytest.mark.parametrize("shares", [(0.02, 0.05), (0.1, 0.2), (0.5, 0.6), (0.3, 0.7), (0.9, 0.95)])
def test_the_interval_of_two_shares_holds_the_difference_as_often_as_it_says(shares, tasks):
    """The probability is exact, summed over all counts of gained and lost tasks; docs/decisions.md gives the least."""
    share_first, share_second = shares
    difference = share_second - share_first
    nested = difference, 0.0  # the second model passes all that the first one passes
    independent = share_second * (1 - share_first), share_first * (1 - share_second)
    for gained_share, lost_share in (nested, independent):
        held = 0.0
        for gained, lost in product(range(tasks + 1), repeat=2):
            if gained + lost > tasks:
                continue
            agreed = tasks - gained - lost
            ways = comb(tasks, gained) * comb(tasks - gained, lost)
            chance = ways * gained_share**gained * lost_share**lost * (1 - gained_share - lost_share) ** agreed
            if chance > 1e-7:
                low, high = interval_of_counts(gained, lost, tasks)
                held += chance * (low <= difference <= high)
        assert held > 0.935


def test_values_between_0_and_1_are_permuted():
    chance = np.random.default_rng(1)
    first = chance.uniform(0, 1, 40)
    assert paired_test(first.tolist(), first.tolist()).p == 1
    higher = paired_test(first.tolist(), (first + 0.1).tolist())
    assert higher.method == "permutation"
    assert 0 < higher.p < 0.001
    noise = paired_test(first.tolist(), (first + chance.normal(0, 0.1, 40)).tolist())
    assert noise.p > 0.05
    assert noise.low < noise.difference < noise.high


@pytest.mark.heavy
def test_intervals_are_the_same_for_any_size_of_the_blocks_of_resamples(monkeypatch):
    chance = np.random.default_rng(2)
    first, second = (chance.uniform(0, 1, 37).tolist() for _ in range(2))

    def found() -> list:
        return [estimate(first), ratio_estimate(first, second), paired_test(first, second)]

    blocks = found()
    for items in (1, 999, statistics.RESAMPLES * len(first)):
        monkeypatch.setattr(statistics, "AT_ONCE", items)
        assert found() == blocks


def test_resamples_of_many_items_are_not_all_in_memory_at_once(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    values = np.random.default_rng(2).uniform(0, 1, 20_000).tolist()  # 80 MB of draws
    tracemalloc.start()
    try:
        estimate(values)
        ratio_estimate(values, values)
        paired_test(values, values[::-1])
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
