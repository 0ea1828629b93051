"""Fill in the middle: exact inverse, exact rate, and the same sequences on any ranks, resumed or not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_lm.data.batch import SequenceContent
from dist_lm.data.infill import (
    ADDED,
    LEAST,
    PSM,
    SPM,
    Infill,
    InfillEpoch,
    InfillMarks,
    chosen_count,
    middle_of,
    most_slices,
    rearranged,
    restored,
)
from dist_lm.data.infill_evaluation import HeldOutMiddles
from dist_lm.data.order import EpochOrder
from dist_lm.data.sequences import CorpusSequences
from dist_lm.data.stream import SequenceStream
from dist_lm.data.token_corpus import TokenCorpus
from tests.data.synthetic_corpus import EOT, corpus, lengths

MARKS = InfillMarks(prefix=60_001, suffix=60_002, middle=60_003)
T = 64
LENGTHS = lengths(150, 5 * T)
SETTINGS: dict[str, Any] = {"seed": 3, "seq_len": T, "global_batch": 12, "micro_batch": 3}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> TokenCorpus:
    return corpus(tmp_path_factory.mktemp("infill"), LENGTHS)


@given(
    content=st.lists(st.integers(2, 1000), min_size=1, max_size=30),
    cuts=st.tuples(st.integers(0, 30), st.integers(0, 30)),
    form=st.sampled_from([PSM, SPM]),
    opens=st.booleans(),
)
def test_rearranging_has_an_exact_inverse(content: list[int], cuts: tuple[int, int], form: int, opens: bool) -> None:
    head = [EOT] if opens else []
    tokens = np.array([*head, *content], np.uint16)
    one, other = sorted(cut % (len(content) + 1) for cut in cuts)
    found = rearranged(tokens, len(head) + one, len(head) + other, MARKS, form, opens)
    assert found.dtype == tokens.dtype
    assert len(found) == len(tokens) + ADDED
    assert np.array_equal(restored(found, MARKS), tokens)
    assert np.array_equal(restored(tokens, MARKS), tokens)
    before, middle, after = content[:one], content[one:other], content[other:]
    written = [*head, MARKS.prefix, *before, MARKS.suffix, *after, MARKS.middle, *middle]
    if form == SPM:
        written = [*head, MARKS.prefix, MARKS.suffix, *after, MARKS.middle, *before, *middle]
    assert found.tolist() == written
    if form == PSM and opens:
        assert MARKS.prompt([EOT, *before], after) == written[: len(written) - len(middle)]


@pytest.mark.parametrize("opens", [True, False])
def test_every_middle_that_is_not_empty_is_equally_likely(opens: bool) -> None:
    length, draws = 4 + opens, 20_000
    found = [middle_of(length, word, opens) for word in range(draws)]
    pairs, counts = np.unique(found, axis=0, return_counts=True)
    cuts = range(opens, length + 1)
    assert pairs.tolist() == [[begin, end] for begin in cuts for end in cuts if begin < end]
    assert abs(counts - draws / len(pairs)).max() < 5 * (draws / len(pairs)) ** 0.5


def epoch_of(plain: TokenCorpus, rate: float, epoch: int, seed: int = 3) -> InfillEpoch:
    most = most_slices(plain.lengths, rate, T)
    order = EpochOrder(plain.lengths, seed, epoch, T - ADDED * most)
    return InfillEpoch(plain, order, Infill(rate, MARKS), most, seed, epoch)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.513, 1.0])
def test_exactly_the_rate_is_rearranged_half_in_each_form_anew_in_every_epoch(plain: TokenCorpus, rate: float) -> None:
    forms = []
    for epoch in range(3):
        slices = epoch_of(plain, rate, epoch)
        may = set(slices.eligible.tolist())
        assert 0 < len(may) < len(slices.form)
        count = chosen_count(rate, len(may))
        assert abs(count - rate * len(may)) <= 0.5
        assert np.bincount(slices.form, minlength=3)[1:].tolist() == [count - count // 2, count // 2]
        assert set(np.flatnonzero(slices.form)) <= may
        forms.append(slices.form.tolist())
    assert len({tuple(form) for form in forms}) == len(forms)
    assert epoch_of(plain, rate, 0, seed=4).form.tolist() not in forms


def slices_of(row: SequenceContent) -> list[tuple[int, int, np.ndarray]]:
    """(document, start, tokens) of the slices of a sequence."""
    return [(document, start, row.corpus.tokens(document, start, stop)) for document, start, stop in row.slices]


def rows_of(plain: TokenCorpus, rate: float) -> tuple[list[SequenceContent], int]:
    """The sequences of an epoch, and the tokens of text in each of them."""
    own = CorpusSequences(plain, 3, T, infill=Infill(rate, MARKS))
    return [own.content(number) for number in range(own.n_sequences)], T - ADDED * most_slices(plain.lengths, rate, T)


def test_every_rearranged_slice_lies_whole_in_one_sequence_and_ends_with_end_of_text(plain: TokenCorpus) -> None:
    rows, _ = rows_of(plain, 0.7)
    from_inside = cut_off = 0
    for row in rows:
        slices = slices_of(row)
        assert sum(len(tokens) for _, _, tokens in slices) <= T + 1
        for (document, start, tokens), following in zip(slices, [*slices[1:], None], strict=True):
            if MARKS.prefix in tokens:
                assert all(np.count_nonzero(tokens == mark) == 1 for mark in MARKS)
                assert tokens.tolist().index(MARKS.prefix) == (start == 0)
                assert following is not None
                assert following[2][0] == EOT
                from_inside += start > 0
                cut_off += start + len(tokens) - ADDED < plain.lengths[document]
            elif following is not None:
                assert not set(tokens.tolist()) & set(MARKS)
    assert from_inside
    assert cut_off


@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_most_text_is_eligible_and_an_epoch_holds_every_token_once(plain: TokenCorpus, rate: float) -> None:
    rows, text_len = rows_of(plain, rate)
    assert len(rows) == (plain.n_tokens - 1) // text_len
    own = [plain.tokens(document, 0, int(plain.lengths[document])) for document in range(plain.n_documents)]
    seen = [np.zeros(len(tokens), int) for tokens in own]
    n_rearranged = n_tokens = 0
    for row in rows:
        held = 0
        for document, start, tokens in slices_of(row):
            text = restored(tokens, MARKS)[: text_len - held]  # without the last target
            assert np.array_equal(text, own[document][start : start + len(text)])
            seen[document][start : start + len(text)] += 1
            held += len(text)
            n_rearranged += len(text) * (len(text) < len(tokens) and MARKS.prefix in tokens)
        assert held == text_len
        n_tokens += held
    counts = np.concatenate(seen)
    assert counts.max() == 1
    assert plain.n_tokens - text_len <= counts.sum() == n_tokens
    assert abs(n_rearranged / n_tokens - rate) < 0.15  # all but short slices are eligible


def test_of_many_short_documents_the_longest_of_a_sequence_are_eligible(tmp_path: Path) -> None:
    short = corpus(tmp_path, lengths(400, T // 2))
    most = most_slices(short.lengths, 1.0, T)
    assert 1 < most <= T // LEAST
    rows, _ = rows_of(short, 1.0)
    for row in rows:
        found = slices_of(row)
        marked = [len(tokens) - ADDED for _, _, tokens in found if MARKS.middle in tokens]
        others = [len(tokens) for _, _, tokens in found[:-1] if MARKS.middle not in tokens]
        assert len(marked) <= most
        assert all(length < LEAST or (len(marked) == most and length <= min(marked)) for length in others)


def sequences(corpus: TokenCorpus, steps: int, rate: float = 0.5, **changes: Any) -> list[list[int]]:
    infill = Infill(rate, MARKS) if rate else None
    found = []
    settings: dict[str, Any] = SETTINGS | {"dp_rank": 0, "dp_size": 1} | changes
    with SequenceStream(corpus, **settings, infill=infill) as stream:
        for _ in range(steps):
            for batch in next(stream).micro_batches:
                found += [[n, *row] for n, row in zip(batch.sequence_B.tolist(), batch.tokens_BT.tolist(), strict=True)]
    return sorted(found)


def test_sequences_are_the_same_on_any_ranks_and_resumed(plain: TokenCorpus) -> None:
    steps = 40  # more than an epoch
    assert CorpusSequences(plain, 3, T, infill=Infill(0.5, MARKS)).n_sequences < 12 * steps
    expected = sequences(plain, steps)
    assert any(MARKS.middle in row for row in expected)
    on_ranks = [row for rank in range(4) for row in sequences(plain, steps, dp_rank=rank, dp_size=4, micro_batch=1)]
    assert sorted(on_ranks) == expected
    assert sequences(plain, steps - 10, position=120) == expected[120:]
    assert sequences(plain, steps, rate=0) == sequences(plain, steps, rate=0.0001)  # no slice
    assert sequences(plain, steps, seed=4) != expected


@pytest.mark.parametrize(("marks", "form"), [(MARKS, PSM), (MARKS, SPM), (None, PSM)])
def test_the_same_middles_are_judged_with_and_without_what_stands_after(
    plain: TokenCorpus, marks: InfillMarks | None, form: int
) -> None:
    wanted: dict[str, Any] = {"corpus": plain, "seq_len": T, "micro_batch": 3, "limit": 20, "form": form}
    seen = {}
    for rank in range(2):
        for one in HeldOutMiddles(**wanted, marks=marks, dp_rank=rank, dp_size=2):
            for b, slice_number in enumerate(one.batch.sequence_B.tolist()):
                counted = one.language_BT[b] >= 0
                if slice_number >= 0:
                    seen[slice_number] = one.batch.targets_BT[b][counted].tolist()
                else:
                    assert not counted.any()
    assert len(seen) == 20
    reference = HeldOutMiddles(**wanted, marks=None, dp_rank=0, dp_size=1)
    assert (reference._slices[:, 1] > 0).any()
    for slice_number, middle in seen.items():
        document, first, last = reference._slices[slice_number].tolist()
        begin, end = reference._middle(slice_number)
        assert 1 <= begin < end <= last - first
        assert plain.tokens(document, first + begin, first + end).tolist() == middle
    wanted["limit"] = 0
    everything = HeldOutMiddles(**wanted, marks=marks, dp_rank=0, dp_size=1)._slices
    assert (everything[:, 2] - everything[:, 1]).sum() > 0.9 * plain.n_tokens
    assert (everything[:, 2] - everything[:, 1] + ADDED).max() == T
