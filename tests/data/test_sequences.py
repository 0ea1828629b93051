"""The mix: exact shares in every block, each sequence of a corpus once and in its order, from the number alone."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from dist_lm.data.sequences import BLOCK, Mix

PER_CENT = st.lists(st.integers(1, 30), max_size=3)


@given(PER_CENT, st.integers(0, 2**32), st.integers(0, 10**6))
def test_every_block_holds_the_exact_shares(per_cent, seed, block):
    mix = Mix([n / 100 for n in per_cent], seed)
    found = Counter(mix.locate(number)[0] for number in range(block * BLOCK, (block + 1) * BLOCK))
    assert found == {0: BLOCK - sum(per_cent), **{i + 1: n for i, n in enumerate(per_cent)}}


@given(PER_CENT, st.integers(0, 2**32), st.integers(1, 350))
def test_each_corpus_is_read_in_its_order_without_a_gap(per_cent, seed, n):
    mix = Mix([one / 100 for one in per_cent], seed)
    places = [mix.locate(number) for number in range(n)]
    for corpus in range(len(per_cent) + 1):
        own = [place for which, place in places if which == corpus]
        assert own == list(range(len(own)))


@given(PER_CENT, st.integers(0, 2**32), st.lists(st.integers(0, 10**9), min_size=1))
def test_a_number_alone_decides(per_cent, seed, numbers):
    shares = [n / 100 for n in per_cent]
    mix = Mix(shares, seed)
    assert [mix.locate(number) for number in numbers] == [Mix(shares, seed).locate(number) for number in numbers]


def test_blocks_and_seeds_differ():
    mix, other = Mix([0.2, 0.3], 0), Mix([0.2, 0.3], 1)
    corpora = [[mix.locate(number)[0] for number in range(start, start + BLOCK)] for start in (0, BLOCK)]
    assert corpora[0] != corpora[1]
    assert corpora[0] != [other.locate(number)[0] for number in range(BLOCK)]


def test_without_others_the_numbers_are_those_of_the_corpus():
    assert [Mix([], 3).locate(number) for number in (0, 7, 250)] == [(0, 0), (0, 7), (0, 250)]
