"""The order of data is a pure function, loses no token, and does not change with the libraries."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_lm.data.order import (
    Concatenation,
    DocumentSlice,
    EpochOrder,
    Shuffle,
    key,
    permutation,
    shuffled_documents,
    splitmix64,
)

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def test_splitmix64_gives_the_published_outputs() -> None:
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert splitmix64(1234567, 4).tolist() == expected


GOLDEN = [
    [(1, 4, 9), (4, 0, 4)],
    [(0, 1, 5), (1, 0, 5)],
    [(3, 8, 12), (2, 0, 3), (0, 0, 2)],
    [(3, 0, 9)],
]


def test_order_is_pinned() -> None:
    order = EpochOrder(np.array([5, 9, 3, 12, 7]), seed=11, epoch=2, seq_len=8)
    assert order.n_sequences == 4
    assert [order.sequence(i) for i in range(4)] == GOLDEN


@given(LENGTHS, st.integers(-(2**70), 2**70), st.integers(0, 5), st.integers(1, 50))
def test_every_token_is_a_target_once(lengths: list[int], seed: int, epoch: int, seq_len: int) -> None:
    order = EpochOrder(np.array(lengths), seed, epoch, seq_len)
    total = sum(lengths)
    assert order.n_sequences == (total - 1) // seq_len
    targets: list[tuple[int, int]] = []
    for i in range(order.n_sequences):
        covered = [(part.document, token) for part in order.sequence(i) for token in range(part.start, part.stop)]
        assert len(covered) == seq_len + 1
        targets += covered[1:]
    assert len(targets) == len(set(targets)) == order.n_sequences * seq_len
    assert total - 1 - len(targets) < seq_len  # what is lost: the first token and a tail shorter than a sequence
    assert all(0 <= token < lengths[document] for document, token in targets)


@given(st.lists(st.integers(0, 40), max_size=30).filter(any), st.integers(1, 50))
def test_many_sequences_are_those_found_alone(lengths: list[int], seq_len: int) -> None:
    """Finds a step that is looked up at once and differs from its sequences, also with empty documents."""
    order = EpochOrder(np.array(lengths), 0, 1, seq_len)
    visits = [*range(order.n_sequences - 1, -1, -1), *range(order.n_sequences)]
    assert order.table(np.array(visits, np.int64)).slices() == [order.sequence(i) for i in visits]


@given(LENGTHS, st.integers(0, 3))
def test_tokens_follow_one_another(lengths: list[int], epoch: int) -> None:
    order = EpochOrder(np.array(lengths), 7, epoch, 4)
    for i in range(order.n_sequences):
        slices = order.sequence(i)
        assert all(part.start < part.stop for part in slices)
        assert all(part.stop == lengths[part.document] for part in slices[:-1])
        assert all(part.start == 0 for part in slices[1:])


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}])
def test_seed_and_epoch_change_the_order(change: dict[str, int]) -> None:
    lengths = np.arange(1, 60)
    base = {"seed": 0, "epoch": 0, "seq_len": 16}
    one, same, other = (EpochOrder(lengths, **keys) for keys in (base, base, base | change))
    sequences = [[order.sequence(i) for i in range(order.n_sequences)] for order in (one, same, other)]
    assert sequences[0] == sequences[1] != sequences[2]


def test_parts_of_a_long_document_are_spread() -> None:
    order = EpochOrder(np.array([100_000]), seed=0, epoch=0, seq_len=10)
    starts = np.array([order.sequence(i)[0].start for i in range(order.n_sequences)])
    assert (np.abs(np.diff(starts)) > 100).mean() > 0.98


@settings(max_examples=30)
@given(st.integers(0, 500), st.integers(0, 2**64 - 1))
def test_permutation_is_one(n: int, seed: int) -> None:
    assert np.array_equal(np.sort(permutation(n, seed)), np.arange(n))


def test_permutation_is_fair() -> None:
    """Where number 0 lands among 4, over many keys: a quarter each (5 standard deviations)."""
    places = np.array([int(np.flatnonzero(permutation(4, seed) == 0)[0]) for seed in range(4000)])
    assert np.abs(np.bincount(places, minlength=4) - 1000).max() < 5 * np.sqrt(4000 * 0.25 * 0.75)


def test_concatenation_skips_empty_documents() -> None:
    row = Concatenation(np.array([2, 0, 3]), np.array([1, 0, 1, 2]))
    assert row.slices(0, 5) == [DocumentSlice(0, 0, 2), DocumentSlice(2, 0, 3)]
    assert row.slices(1, 3) == [DocumentSlice(0, 1, 2), DocumentSlice(2, 0, 1)]
    assert row.slices(5, 5) == []


def test_no_two_shuffles_share_a_key():
    assert len({shuffle.value for shuffle in Shuffle}) == len(list(Shuffle.__members__))
    keys = [key(shuffle, seed, epoch) for shuffle in Shuffle for seed in range(3) for epoch in range(3)]
    assert len(set(keys)) == len(keys)


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 2**32))
def test_files_of_a_repository_stay_next_to_each_other_in_their_order(continues: list[bool], word: int) -> None:
    follows = np.array(continues)
    found = shuffled_documents(len(follows), word, follows).tolist()
    assert sorted(found) == list(range(len(follows)))
    for document in np.flatnonzero(follows).tolist():
        if document:
            assert found[found.index(document) - 1] == document - 1
    if not follows[1:].any():
        assert found == permutation(len(follows), word).tolist()


def test_repositories_change_places_between_epochs() -> None:
    follows = np.arange(60) % 3 > 0
    orders = {tuple(shuffled_documents(60, word, follows).tolist()) for word in range(20)}
    assert len(orders) == 20
    assert {order[0] % 3 for order in orders} == {0}
