"""Rankings with known utilities: they are what they say, and a nano model learns them better whole than by pairs."""

import numpy as np
import pytest

from dist_lm.bench.reward_learning import FEWEST, MOST, Outcome, compare, made_rankings, table


def utilities(document, weight_V) -> np.ndarray:
    branch = document.verdict.branch
    return np.array([weight_V[document.tokens[branch == k]].sum() for k in range(1, int(branch.max()) + 1)])


def test_held_out_ranks_are_those_of_the_utilities_and_those_of_train_are_noisy() -> None:
    weight_V = np.random.default_rng(0).normal(size=49)
    right = {}
    for noisy in (True, False):
        leads = []
        for document in made_rankings(200, 1, noisy, weight_V):
            utility_K, ranks = utilities(document, weight_V), document.verdict.ranks
            assert FEWEST <= len(ranks) <= MOST
            assert sorted(ranks.tolist()) == list(range(len(ranks)))
            leads += np.diff(utility_K[np.argsort(ranks)]).tolist()
        right[noisy] = np.mean(np.array(leads) < 0)
    assert right[False] == 1
    assert 0.6 < right[True] < 0.95


def test_the_table_has_a_row_a_way_and_a_column_a_seed() -> None:
    outcomes = [
        Outcome(seed, way, {"reward/kendall_tau": tau}, 1.0)
        for seed, way, tau in ((0, "rankings", 0.8), (0, "pairs", 0.7), (1, "rankings", 0.9), (1, "pairs", 0.6))
    ]
    lines = table(outcomes).splitlines()
    assert lines[2:] == ["| rankings | 0.800 | 0.900 | 0.850 |", "| pairs | 0.700 | 0.600 | 0.650 |"]


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_whole_rankings_are_learned_in_a_hundred_steps() -> None:
    """Too few to tell them from pairs: 0.759 and 0.761."""
    (outcome,) = compare((0,), ("rankings",), rankings=2000, steps=100)
    assert outcome.metrics["reward/kendall_tau"] >= 0.6


@pytest.mark.bars
@pytest.mark.timeout(3600)
def test_whole_rankings_reach_the_bar_and_beat_as_many_pairs_on_every_seed() -> None:
    seeds = (0, 1, 2)
    outcomes = compare(seeds, ("rankings", "pairs"), rankings=6000, steps=300)
    print(table(outcomes))
    for seed in seeds:
        tau = {one.learn_from: one.metrics["reward/kendall_tau"] for one in outcomes if one.seed == seed}
        assert tau["rankings"] >= 0.8
        assert tau["rankings"] > tau["pairs"]
