"""What is learned from a verdict: its ranks, or pairs drawn from them, with label noise. Pure functions of a key.

A key belongs to a ranking and the seed, not to an epoch: noise and draw are those of the data set.
"""

from dataclasses import replace
from itertools import combinations

import numpy as np

from dist_lm.data.order import key, permutation, splitmix64
from dist_lm.document import Verdict

ALL, PAIRS, ONE_PAIR = "rankings", "pairs", "one_pair"
_NOISE, _DRAW = 7, 8  # what is random; 1 to 6 are those of `order`, `packing` and `mix`


def lesson(verdict: Verdict, learn_from: str, label_noise: float, seed: int, number: int) -> Verdict:
    """What stage reward learns from a verdict.

    Args:
        learn_from: `rankings`: as it is. `pairs`: of K ranked completions K - 1 pairs, as many as a ranking has
            choices. `one_pair`: one of them.
        label_noise: see `noisy`.
        number: of the ranking in its corpus.
    """
    verdict = noisy(verdict, label_noise, key(_NOISE, seed, number))
    if learn_from == ALL or not len(verdict.ranks):
        return verdict
    count = 1 if learn_from == ONE_PAIR else len(verdict.ranks) - 1
    return drawn_pairs(verdict, count, key(_DRAW, seed, number))


def noisy(verdict: Verdict, share: float, word: int) -> Verdict:
    """A verdict that errs: each judgement is turned round, and each two neighbouring ranks change places, with
    probability `share`, from the best down."""
    if not share:
        return verdict
    levels = np.unique(verdict.ranks)
    wrong = splitmix64(word, max(len(levels) - 1, len(verdict.judgements))) < np.uint64(int(share * (2**64 - 1)))
    judgements = np.where(wrong[: len(verdict.judgements), None], verdict.judgements[:, ::-1], verdict.judgements)
    swapped = levels.copy()
    for place in np.flatnonzero(wrong[: max(len(levels) - 1, 0)]):
        swapped[[place, place + 1]] = swapped[[place + 1, place]]
    # swapped[i] is the level that now stands at place i
    ranks = np.argsort(swapped)[np.searchsorted(levels, verdict.ranks)] if len(levels) else verdict.ranks
    return replace(verdict, ranks=ranks.astype(np.uint8), judgements=judgements)


def drawn_pairs(verdict: Verdict, count: int, word: int) -> Verdict:
    """`count` of the pairs that ranks tell apart (or all of them), as judgements without a margin."""
    ranks = verdict.ranks.tolist()
    pairs = [
        (one, other) if ranks[one] < ranks[other] else (other, one)
        for one, other in combinations(range(len(ranks)), 2)
        if ranks[one] != ranks[other]
    ]
    chosen = np.array(pairs, np.uint8)[np.sort(permutation(len(pairs), word)[:count])]
    return replace(verdict, ranks=np.zeros(0, np.uint8), judgements=chosen, margins=np.zeros(len(chosen), np.float32))
