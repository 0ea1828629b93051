"""What is learned from a ranking: noise and drawn pairs are a function of seed and ranking, and have their shares."""

import numpy as np
import pytest

from dist_lm.data.rankings.stream import drawn_pairs, lesson, noisy
from dist_lm.document import RankingArrays
from tests.data.rankings.made_rankings import NONE

BRANCH = np.array([0, 1, 2, 3, 4], np.uint8)


def ranked(*ranks: int) -> RankingArrays:
    return RankingArrays(BRANCH, np.array(ranks, np.uint8), NONE, np.zeros(0, np.float32))


def judged(*pairs: tuple[int, int]) -> RankingArrays:
    return RankingArrays(
        BRANCH, np.zeros(0, np.uint8), np.array(pairs, np.uint8), np.arange(len(pairs), dtype=np.float32)
    )


def test_without_noise_a_ranking_is_itself() -> None:
    arrays = ranked(2, 0, 1, 1)
    assert lesson(arrays, "rankings", 0.0, seed=3, number=5) is arrays


@pytest.mark.heavy
def test_neighbours_change_places_with_the_given_probability() -> None:
    found = [tuple(noisy(ranked(0, 1), 0.2, word).ranks.tolist()) for word in range(4000)]
    assert set(found) == {(0, 1), (1, 0)}
    assert found.count((1, 0)) / len(found) == pytest.approx(0.2, abs=0.02)
    turned = [noisy(judged((0, 1)), 0.2, word).judgements.tolist() == [[1, 0]] for word in range(4000)]
    assert sum(turned) / len(turned) == pytest.approx(0.2, abs=0.02)


def test_noise_swaps_whole_levels_and_invents_nothing() -> None:
    seen = set()
    for word in range(300):
        ranks = noisy(ranked(5, 0, 2, 2), 0.4, word).ranks
        assert ranks[2] == ranks[3]  # a tie stays one
        assert sorted(set(ranks.tolist())) == [0, 1, 2]
        seen.add(tuple(ranks.tolist()))
    # the levels 0 < 2 < 5 as they are, the first two swapped, the last two, or one after the other
    assert seen == {(2, 0, 1, 1), (2, 1, 0, 0), (1, 0, 2, 2), (1, 2, 0, 0)}


def test_pairs_are_as_many_as_choices_and_never_of_a_tie() -> None:
    arrays = ranked(0, 1, 1, 3)
    seen = set()
    for number in range(200):
        found = lesson(arrays, "pairs", 0.0, seed=1, number=number)
        assert found.judgements.shape == (3, 2)
        assert not len(found.ranks)
        for better, worse in found.judgements.tolist():
            assert arrays.ranks[better] < arrays.ranks[worse]
            seen.add((better, worse))
        assert len({tuple(pair) for pair in found.judgements.tolist()}) == 3
    assert seen == {(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)}
    assert len(lesson(arrays, "one_pair", 0.0, seed=1, number=0).judgements) == 1
    assert len(drawn_pairs(ranked(0, 0, 1, 1), 9, 1).judgements) == 4


def test_what_is_drawn_hangs_on_seed_and_ranking_alone() -> None:
    arrays = ranked(0, 1, 2, 3)
    pairs = [lesson(arrays, "pairs", 0.3, seed, n).judgements.tolist() for seed in (1, 1, 2) for n in range(40)]
    assert pairs[:40] == pairs[40:80] != pairs[80:]


def test_judgements_stay_judgements() -> None:
    arrays = judged((0, 1), (2, 1))
    assert lesson(arrays, "pairs", 0.0, 1, 1) is arrays
