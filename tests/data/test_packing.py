"""Packing: every document once an epoch, none cut, little room left, all of it from (seed, epoch, seq_len)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_lm.data.packing import PackedEpoch, Packing, best_fit_decreasing

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=120)


def rows_of(epoch: PackedEpoch) -> list[list[tuple[int, int, int]]]:
    return [[tuple(part) for part in epoch.sequence(i)] for i in range(epoch.n_sequences)]


@given(LENGTHS, st.integers(0, 2**32), st.integers(0, 5), st.integers(1, 80))
def test_every_document_that_fits_is_in_an_epoch_once_and_whole(lengths, seed, epoch, seq_len):
    packing = Packing(np.array(lengths), seq_len)
    rows = rows_of(PackedEpoch(packing, seed, epoch))
    fitting = [document for document, length in enumerate(lengths) if length <= seq_len + 1]
    assert sorted(document for row in rows for document, _, _ in row) == fitting
    assert packing.n_left_out == len(lengths) - len(fitting)
    assert all((start, stop) == (0, lengths[document]) for row in rows for document, start, stop in row)
    assert all(0 < sum(lengths[document] for document, _, _ in row) <= seq_len + 1 for row in rows)


@given(LENGTHS, st.integers(60, 100))
def test_rows_are_those_of_best_fit_decreasing_one_document_at_a_time(lengths, capacity):
    lengths = sorted(lengths, reverse=True)
    free: list[int] = []
    for length in lengths:
        fits = [room for room in free if room >= length]
        if fits:
            free[free.index(min(fits))] -= length
        else:
            free.append(capacity - length)
    rows = best_fit_decreasing(np.array(lengths), capacity)
    found = capacity - np.bincount(rows, lengths)
    assert sorted(found.tolist()) == sorted(free)


def test_an_epoch_depends_on_seed_and_epoch_alone_and_has_always_as_many_rows():
    lengths = np.random.default_rng(0).integers(20, 300, 3000)
    packing = Packing(lengths, 512)
    one = rows_of(PackedEpoch(packing, 3, 1))
    assert one == rows_of(PackedEpoch(Packing(lengths.copy(), 512), 3, 1))
    for other in (PackedEpoch(packing, 3, 2), PackedEpoch(packing, 4, 1)):
        assert other.n_sequences == packing.n_rows
        met = [{frozenset(document for document, _, _ in row) for row in rows} for rows in (one, rows_of(other))]
        assert len(met[0] & met[1]) < 0.1 * len(one)  # other documents meet


def test_no_order_by_length_is_left():
    lengths = np.random.default_rng(1).integers(20, 300, 20000)
    epoch = PackedEpoch(Packing(lengths, 512), 0, 0)
    rows = rows_of(epoch)
    longest = np.array([max(stop for _, _, stop in row) for row in rows])
    assert abs(np.corrcoef(np.arange(len(rows)), longest)[0, 1]) < 0.05
    first = np.array([row[0][2] for row in rows if len(row) > 1])
    last = np.array([row[-1][2] for row in rows if len(row) > 1])
    assert abs(first.mean() / last.mean() - 1) < 0.05


@pytest.mark.parametrize("seq_len", [512, 4096])
def test_little_room_is_left(seq_len):
    lengths = np.random.default_rng(2).integers(20, 500, 5000)
    packing = Packing(lengths, seq_len)
    filled = sum(stop for row in rows_of(PackedEpoch(packing, 0, 0)) for _, _, stop in row)
    assert packing.padding == pytest.approx(1 - filled / (packing.n_rows * (seq_len + 1)))
    assert packing.padding < 0.03


def test_documents_longer_than_a_row_are_counted():
    packing = Packing(np.array([9, 10, 11]), 9)  # ten tokens: nine inputs and a last target
    assert packing.n_left_out == 1
    assert packing.n_rows == 2
    assert Packing(np.array([11]), 9).n_rows == 0


@given(LENGTHS, st.integers(0, 2**32), st.integers(1, 80))
def test_long_documents_are_split_so_that_every_token_is_a_target_once(lengths, seed, seq_len):
    packing = Packing(np.array(lengths), seq_len, "split")
    rows = rows_of(PackedEpoch(packing, seed, 0))
    assert all(sum(stop - start for _, start, stop in row) <= seq_len + 1 for row in rows)
    targets = sorted((document, token) for row in rows for document, start, stop in row for token in range(start, stop))
    starts = [(document, start) for row in rows for document, start, _ in row if start]
    # The first token of a piece is an input only, as end-of-text is that of a document.
    for place in starts:
        targets.remove(place)
    assert targets == [(document, token) for document, length in enumerate(lengths) for token in range(length)]


@given(LENGTHS, st.integers(1, 80))
def test_long_documents_are_truncated_to_a_row(lengths, seq_len):
    packing = Packing(np.array(lengths), seq_len, "truncate")
    parts = sorted(part for row in rows_of(PackedEpoch(packing, 0, 0)) for part in row)
    assert parts == [(document, 0, min(length, seq_len + 1)) for document, length in enumerate(lengths)]


def test_the_report_says_what_became_of_long_documents():
    lengths = np.array([9, 10, 11, 30])
    reports = {fate: Packing(lengths, 9, fate).report() for fate in ("drop", "truncate", "split")}
    assert (reports["drop"]["documents"], reports["drop"]["left_out"]) == (2, 2)
    assert (reports["truncate"]["documents"], reports["truncate"]["truncated"]) == (4, 2)
    assert (reports["split"]["documents"], reports["split"]["split"], reports["split"]["left_out"]) == (4, 2, 0)
