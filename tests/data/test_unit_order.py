"""The order of units: pure, invertible, no token lost, and repositories whole; and streams of it on any ranks."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_lm.data.infill import PLAIN, PSM, SPM, Infill, InfillMarks, UnitInfillEpoch, most_slices
from dist_lm.data.order import DocumentSlice, EpochOrder, splitmix64, splitmix64_at
from dist_lm.data.sequences import UNITS, CorpusSequences
from dist_lm.data.split_index import UNIT, unit_begins
from dist_lm.data.stream import SequenceStream
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.data.unit_order import Permutation, UnitEpoch, Units, WindowEpoch
from tests.data.synthetic_corpus import documents, lengths, write

MEMBER = 100  # documents
T = 64
MARKS = InfillMarks(60_001, 60_002, 60_003)


def units_of(document_lengths: Sequence[int], continues: Sequence[bool] = ()) -> Units:
    """The units of a corpus in members of `MEMBER` documents."""
    tokens = np.array(document_lengths)
    follows = np.array(continues if len(continues) else [False] * len(tokens))
    follows[0] = False
    begins = unit_begins(follows, np.arange(0, len(tokens), MEMBER))
    ends = np.append(begins[1:], len(tokens))
    before = np.cumsum(tokens) - tokens
    return Units(
        documents=begins,
        tokens=before[begins],
        n_tokens=int(tokens.sum()),
        n_documents=len(tokens),
        continues=follows[begins],
        ends=lambda unit: [
            *before[begins[unit] : ends[unit]].tolist(),
            int(before[ends[unit] - 1] + tokens[ends[unit] - 1]),
        ],
        lengths=lambda units: np.array(
            [np.pad(tokens[begins[unit] : ends[unit]], (0, UNIT - ends[unit] + begins[unit])) for unit in units],
            np.int64,
        ).reshape(-1, UNIT),
        border=lambda unit, document: next(
            (i for i in range(document, ends[unit] - begins[unit]) if not follows[begins[unit] + i]), 0
        ),
    )


class SmallWindows(WindowEpoch):
    """The order of windows, several of which are in a corpus of the tests."""

    chunk_tokens = 300
    window_tokens = 900


EPOCHS = st.sampled_from([UnitEpoch, SmallWindows])
CORPORA = st.integers(1, 400).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(1, 40), min_size=n, max_size=n), st.lists(st.booleans(), min_size=n, max_size=n)
    )
)

CORPORA_WITH_EMPTY = st.integers(1, 200).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 40), min_size=n, max_size=n).filter(any),
        st.lists(st.booleans(), min_size=n, max_size=n),
    )
)


def order_of_documents(epoch: UnitEpoch, n_tokens: int) -> list[int]:
    """The documents of an epoch, each of which must be whole."""
    slices = epoch.slices(0, n_tokens)
    assert all(part.start == 0 for part in slices)
    return [part.document for part in slices]


def test_one_output_of_splitmix64_is_that_of_the_array() -> None:
    """Finds another generator behind the same name."""
    for seed in (0, 1234567, 2**64 - 1):
        assert [splitmix64_at(seed, i) for i in range(5)] == splitmix64(seed, 5).tolist()


@settings(max_examples=60)
@given(st.integers(1, 400), st.integers(0, 2**64 - 1))
def test_permutation_is_one_and_can_be_inverted(n: int, word: int) -> None:
    """Finds a number that comes twice, and a place that is not the inverse."""
    permutation = Permutation(n, word)
    numbers = [permutation[i] for i in range(n)]
    assert sorted(numbers) == list(range(n))
    assert [permutation.place(number) for number in numbers] == list(range(n))


def test_permutation_is_fair() -> None:
    """Finds too few rounds: where 0 lands among 5, and where 1 lands beside it, over many keys (5 deviations)."""
    places = [(permutation.place(0), permutation.place(1)) for permutation in (Permutation(5, k) for k in range(4000))]
    counts = np.zeros((5, 5))
    np.add.at(counts, tuple(np.array(places).T), 1)
    off_diagonal = counts[~np.eye(5, dtype=bool)]
    assert np.abs(off_diagonal - 200).max() < 5 * np.sqrt(200)


PINNED_WINDOWS = [1100, 400, 550, 1000]
PINNED = [
    [(20, 5, 21), (21, 0, 28), (22, 0, 7)],
    [(32, 21, 25), (33, 0, 32), (34, 0, 15)],
    [(191, 1, 18), (192, 0, 25), (193, 0, 9)],
]


def test_order_is_pinned() -> None:
    """Finds a change of the order, in which runs could not continue."""
    document_lengths = [1 + 7 * i % 40 for i in range(200)]
    epoch = UnitEpoch(units_of(document_lengths), seed=11, epoch=2, seq_len=50)
    assert [epoch.sequence(i) for i in range(3)] == PINNED
    assert [Permutation(1000, 7)[i] for i in range(4)] == [985, 590, 518, 536]
    windows = SmallWindows(units_of(document_lengths), seed=11, epoch=2, seq_len=50)
    assert [windows.begin(i) for i in range(4)] == PINNED_WINDOWS


def test_a_chunk_is_read_within_one_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds sequences whose chunks come again later, which a cache of a window would fetch twice."""
    monkeypatch.setattr(SmallWindows, "chunk_tokens", 4000)
    monkeypatch.setattr(SmallWindows, "window_tokens", 16_000)
    document_lengths, seq_len = lengths(4000, 30), 50
    units = units_of(document_lengths)
    chunk_of_unit = units.tokens // 4000
    for epoch in range(2):
        order = SmallWindows(units, 3, epoch, seq_len)
        visits: dict[int, list[int]] = {}
        for i in range(order.n_sequences):
            for part in order.sequence(i):
                unit = np.searchsorted(units.documents, part.document, side="right") - 1
                visits.setdefault(int(chunk_of_unit[unit]), []).append(i)

        # The last sequence that is cut from a window ends in a chunk of the next one.
        longest = 16_000 + 64 * 30  # tokens of a window: its last unit reaches into the next chunk
        n_longer = sum(max(places) - min(places) > longest / seq_len for places in visits.values())
        n_windows = -(-len(visits) // 4)
        assert n_windows > 3
        assert n_longer < n_windows


@settings(max_examples=20)
@given(EPOCHS, CORPORA, st.integers(0, 2**64), st.integers(0, 3), st.integers(1, 60))
def test_every_token_is_a_target_once(
    order: type[UnitEpoch], corpus: tuple[list[int], list[bool]], seed: int, epoch_number: int, seq_len: int
) -> None:
    """Finds a token that is lost or comes twice, and a sequence of another length."""
    total = sum(corpus[0])
    epoch = order(units_of(*corpus), seed, epoch_number, seq_len)
    assert epoch.n_sequences == (total - 1) // seq_len
    n_targets = np.zeros((len(corpus[0]), 40), int)
    for i in range(epoch.n_sequences):
        slices = epoch.sequence(i)
        assert sum(part.stop - part.start for part in slices) == seq_len + 1
        for j, (document, start, stop) in enumerate(slices):
            assert 0 <= start < stop <= corpus[0][document]
            n_targets[document, start + (j == 0) : stop] += 1
    assert n_targets.max() <= 1
    assert total - 1 - n_targets.sum() == (total - 1) % seq_len


@settings(max_examples=10)
@given(EPOCHS, CORPORA_WITH_EMPTY, st.integers(0, 2**64), st.integers(1, 60))
def test_many_sequences_are_those_found_alone(
    order: type[UnitEpoch], corpus: tuple[list[int], list[bool]], seed: int, seq_len: int
) -> None:
    """Finds a step that is looked up at once and differs from its sequences, also with empty documents."""
    epoch = order(units_of(*corpus), seed, 1, seq_len)
    visits = [*range(epoch.n_sequences - 1, -1, -1), *range(epoch.n_sequences)]
    assert epoch.table(np.array(visits, np.int64)).slices() == [epoch.sequence(i) for i in visits]


@settings(max_examples=20)
@given(EPOCHS, CORPORA, st.integers(0, 3))
def test_documents_of_a_repository_stay_together(
    order: type[UnitEpoch], corpus: tuple[list[int], list[bool]], epoch_number: int
) -> None:
    """Finds a repository that the shuffle of units, or the rotation of one, tears apart."""
    found = order_of_documents(order(units_of(*corpus), 5, epoch_number, 8), sum(corpus[0]))
    assert sorted(found) == list(range(len(corpus[0])))
    place = np.argsort(found)
    follows = np.flatnonzero(corpus[1])
    assert all(place[document] == place[document - 1] + 1 for document in follows.tolist() if document)


@settings(max_examples=30)
@given(EPOCHS, CORPORA, st.integers(1, 50), st.data())
def test_visits_are_the_sequences_that_hold_a_slice(
    order: type[UnitEpoch], corpus: tuple[list[int], list[bool]], seq_len: int, data: st.DataObject
) -> None:
    """Finds documents whose steps `data where` would not name."""
    epoch = order(units_of(*corpus), 1, 2, seq_len)
    document = data.draw(st.integers(0, len(corpus[0]) - 1))
    start = data.draw(st.integers(0, corpus[0][document] - 1))
    part = DocumentSlice(document, start, data.draw(st.integers(start + 1, corpus[0][document])))
    expected = [
        i
        for i in range(epoch.n_sequences)
        if any(
            one.document == document and one.start < part.stop and part.start < one.stop for one in epoch.sequence(i)
        )
    ]
    assert epoch.visits(part) == expected


def test_seed_and_epoch_change_order_and_neighbours() -> None:
    """Finds epochs alike, and units that always begin at the same document."""
    units = units_of(lengths(3000, 30))
    orders = [order_of_documents(UnitEpoch(units, *keys, 16), units.n_tokens) for keys in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(order) for order in orders}) == 3
    neighbours = [set(pairwise(order)) for order in orders]
    assert 0 < len(neighbours[0] - neighbours[1]) < 3 * len(units.documents)


@pytest.mark.parametrize("mean", [200, 1000])
def test_batches_mix_languages_as_a_full_shuffle_does(mean: int) -> None:
    """Finds neighbours of one language in a corpus that is stored in a random order: at most 1.6 x the deviation."""
    random = np.random.default_rng(0)
    document_lengths = random.geometric(1 / mean, 2_000_000 // mean)
    language = random.choice(3, len(document_lengths), p=[0.6, 0.3, 0.1])

    def deviation(order: EpochOrder | UnitEpoch) -> np.ndarray:
        shares = np.zeros((order.n_sequences // 8, 3))
        for i in range(8 * len(shares)):
            for document, start, stop in order.sequence(i):
                shares[i // 8, language[document]] += stop - start
        return (shares / shares.sum(1, keepdims=True)).std(0)

    full_shuffle = deviation(EpochOrder(document_lengths, 0, 0, 2048))
    assert (deviation(UnitEpoch(units_of(document_lengths.tolist()), 0, 0, 2048)) < 1.6 * full_shuffle).all()


# --- corpora on disk ---


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TokenCorpus:
    directory = write(tmp_path_factory.mktemp("units"), documents(lengths(400, 150)), (), 100, 6000)
    return TokenCorpus.open(directory, "train")


def read(corpus: TokenCorpus, dp_size: int, first: int, steps: int, **options: Any) -> np.ndarray:
    """The tokens of some steps, from all ranks: (sequences, T)."""
    rows: list[list[np.ndarray]] = [[] for _ in range(steps)]
    for rank in range(dp_size):
        layout = {"dp_rank": rank, "dp_size": dp_size, "position": 12 * first}
        with SequenceStream(
            corpus, seed=3, seq_len=T, global_batch=12, micro_batch=2, order=UNITS, **layout, **options
        ) as stream:
            for step in range(steps):
                rows[step] += [batch.tokens_BT.numpy() for batch in next(stream).micro_batches]
    return np.concatenate([part for parts in rows for part in parts])


@pytest.mark.parametrize("infill", [None, Infill(0.5, MARKS)])
def test_ranks_and_resumes_change_nothing(corpus: TokenCorpus, infill: Infill | None) -> None:
    """Finds an order that depends on the layout or on what was read before."""
    expected = read(corpus, 1, 0, 5, infill=infill)
    assert np.array_equal(read(corpus, 4, 0, 5, infill=infill), expected)
    assert np.array_equal(read(corpus, 2, 3, 2, infill=infill), expected[36:])


def test_the_share_of_rearranged_slices_is_the_rate(corpus: TokenCorpus) -> None:
    """Finds rounding that favours a rate, and slices that are not rearranged where their block says so."""
    n_eligible = n_psm = n_spm = 0
    for epoch in range(3):
        most = most_slices(corpus.lengths, 0.3, T)
        order = UnitEpoch(corpus.units, 0, epoch, T - 3 * most)
        rearranged = UnitInfillEpoch(corpus, order, Infill(0.3, MARKS), most, 0, epoch)
        for block in range(-(-order.n_sequences // 16)):
            begins, form, eligible = rearranged.block(block)
            assert set(np.flatnonzero(form != PLAIN)) <= set(eligible)
            assert abs((form != PLAIN).sum() - 0.3 * len(eligible)) < 1
            n_eligible, n_psm, n_spm = (
                n_eligible + len(eligible),
                n_psm + (form == PSM).sum(),
                n_spm + (form == SPM).sum(),
            )
            assert len(begins) == len(form)
    assert abs((n_psm + n_spm) / n_eligible - 0.3) < 0.01
    assert abs(n_psm - n_spm) < 0.06 * (n_psm + n_spm)


def test_slices_and_numbers_are_those_of_the_stream(corpus: TokenCorpus) -> None:
    """Finds `data step` or `data where` in the other order."""
    sequences = CorpusSequences(corpus, 3, T, order=UNITS)
    rows = read(corpus, 1, 0, 2)
    for number in range(24):
        slices = sequences.slices(number)
        tokens = np.concatenate([corpus.tokens(*part) for part in slices])
        assert np.array_equal(tokens[:-1], rows[number])
        assert all(number in numbers for numbers in sequences.numbers(slices, 24).values())


def test_eight_ranks_read_the_corpus_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds members that every rank reads whole: an epoch reads at most 1.3 x the tokens, all ranks together."""
    directory = write(tmp_path, documents(lengths(1200, 800)), (), 256, 200_000)
    ranks = [TokenCorpus.open(directory, "train") for _ in range(8)]
    ranks[0].check()  # as the first epoch of any run does
    sizes = []
    for rank in ranks:
        one_read = rank._tars.read
        monkeypatch.setattr(
            rank._tars, "read", lambda *span, one_read=one_read: sizes.append(span[2]) or one_read(*span)
        )
    orders = [CorpusSequences(rank, 0, 2048, order=UNITS) for rank in ranks]
    for number in range(orders[0].n_sequences):
        for part in orders[number % 8].slices(number):
            ranks[number % 8].tokens(*part)
    assert sum(sizes) < 1.3 * 2 * ranks[0].n_tokens
