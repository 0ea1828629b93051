"""Fill in the middle: exact inverse, exact rate, and the same sequences on any ranks, resumed or not."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_lm.data.infill import (
    ADDED,
    PLAIN,
    PSM,
    SPM,
    Infill,
    InfillEpoch,
    InfillMarks,
    chosen_count,
    eligible,
    middle_of,
    rearranged,
    restored,
)
from dist_lm.data.infill_evaluation import HeldOutMiddles
from dist_lm.data.mapped import MappedCorpus
from dist_lm.data.stream import SequenceStream
from tests.data.synthetic_corpus import EOT, corpus, lengths

MARKS = InfillMarks(prefix=60_001, suffix=60_002, middle=60_003)
LENGTHS = lengths(200, 50)
T = 32
SETTINGS: dict[str, Any] = {"seed": 3, "seq_len": T, "global_batch": 12, "micro_batch": 3}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> MappedCorpus:
    return corpus(tmp_path_factory.mktemp("infill"), LENGTHS)


@given(
    content=st.lists(st.integers(1, 1000), min_size=1, max_size=30),
    cuts=st.tuples(st.integers(0, 30), st.integers(0, 30)),
    form=st.sampled_from([PSM, SPM]),
)
def test_rearranging_has_an_exact_inverse(content: list[int], cuts: tuple[int, int], form: int) -> None:
    tokens = np.array([0, *content], np.uint16)
    begin, end = sorted(1 + cut % len(tokens) for cut in cuts)
    found = rearranged(tokens, begin, end, MARKS, form)
    assert found.dtype == tokens.dtype
    assert len(found) == len(tokens) + ADDED
    assert np.array_equal(restored(found, MARKS), tokens)
    assert np.array_equal(restored(tokens, MARKS), tokens)
    before, middle, after = content[: begin - 1], content[begin - 1 : end - 1], content[end - 1 :]
    written = [0, MARKS.prefix, *before, MARKS.suffix, *after, MARKS.middle, *middle]
    if form == SPM:
        written = [0, MARKS.prefix, MARKS.suffix, *after, MARKS.middle, *before, *middle]
    assert found.tolist() == written
    if form == PSM:
        assert MARKS.prompt([0, *before], after) == written[: len(written) - len(middle)]


def test_every_middle_that_is_not_empty_is_equally_likely() -> None:
    length, draws = 5, 20_000
    found = [middle_of(length, word) for word in range(draws)]
    pairs, counts = np.unique(found, axis=0, return_counts=True)
    assert pairs.tolist() == [[begin, end] for begin in range(1, 6) for end in range(begin + 1, 6)]
    assert abs(counts - draws / len(pairs)).max() < 5 * (draws / len(pairs)) ** 0.5


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.513, 1.0])
def test_exactly_the_rate_is_rearranged_half_in_each_form_anew_in_every_epoch(plain: MappedCorpus, rate: float) -> None:
    may = eligible(plain.lengths, T)
    assert 0 < len(may) < plain.n_documents
    forms = []
    for epoch in range(4):
        documents = InfillEpoch(plain, Infill(rate, MARKS), 3, epoch, T)
        count = chosen_count(rate, len(may))
        assert abs(count - rate * len(may)) <= 0.5
        assert np.bincount(documents.form, minlength=3)[1:].tolist() == [count - count // 2, count // 2]
        assert set(np.flatnonzero(documents.form)) <= set(may)
        forms.append(documents.form.tolist())
        for document in range(plain.n_documents):
            whole = documents.tokens(document, 0, int(documents.lengths[document]))
            own = plain.tokens(document, 0, int(plain.lengths[document]))
            assert (len(whole) > len(own)) == (documents.form[document] != PLAIN)
            assert np.array_equal(restored(whole, MARKS), own)
    if 0 < rate < 1:
        assert len({tuple(form) for form in forms}) == len(forms)
    other = InfillEpoch(plain, Infill(0.5, MARKS), 4, 0, T)
    assert other.form.tolist() not in forms


def sequences(corpus: MappedCorpus, steps: int, rate: float = 0.5, **changes: Any) -> list[list[int]]:
    infill = Infill(rate, MARKS) if rate else None
    found = []
    with SequenceStream(corpus, **SETTINGS | {"dp_rank": 0, "dp_size": 1} | changes, infill=infill) as stream:
        for _ in range(steps):
            for batch in next(stream).micro_batches:
                found += [[n, *row] for n, row in zip(batch.sequence_B.tolist(), batch.tokens_BT.tolist(), strict=True)]
    return sorted(found)


def test_sequences_are_the_same_on_any_ranks_and_resumed(plain: MappedCorpus) -> None:
    expected = sequences(plain, 30)  # more than an epoch
    assert any(MARKS.middle in row for row in expected)
    on_ranks = [row for rank in range(4) for row in sequences(plain, 30, dp_rank=rank, dp_size=4, micro_batch=1)]
    assert sorted(on_ranks) == expected
    assert sequences(plain, 20, position=120) == expected[120:]
    assert sequences(plain, 30, rate=0) == sequences(plain, 30, rate=0.0001)  # no document
    assert sequences(plain, 30, seed=4) != expected


def test_an_epoch_holds_every_document_once(plain: MappedCorpus) -> None:
    infill = Infill(0.5, MARKS)
    with SequenceStream(plain, **SETTINGS, dp_rank=0, dp_size=1, infill=infill) as stream:
        n_sequences, row = stream.n_sequences, stream.corpora[0].row
    assert n_sequences == (int(InfillEpoch(plain, infill, 3, 0, T).lengths.sum()) - 1) // T
    for epoch in (0, 1):
        parts: dict[int, dict[int, int]] = {}
        for number in range(epoch * n_sequences, (epoch + 1) * n_sequences):
            found = row(number)
            for document, start, stop in found.slices:
                tokens = found.corpus.tokens(document, start, stop).tolist()
                parts.setdefault(document, {}).update(zip(range(start, stop), tokens, strict=True))
        documents = InfillEpoch(plain, infill, 3, epoch, T)
        whole = 0
        for document, tokens in parts.items():
            if len(tokens) == documents.lengths[document]:  # not cut off at the end of the epoch
                own = restored(np.array([tokens[place] for place in sorted(tokens)], np.uint16), MARKS)
                assert np.array_equal(own, plain.tokens(document, 0, int(plain.lengths[document])))
                whole += 1
        assert whole >= plain.n_documents - 3


@pytest.mark.parametrize("marks", [MARKS, None])
def test_the_same_middles_are_judged_with_and_without_what_stands_after(
    plain: MappedCorpus, marks: InfillMarks | None
) -> None:
    wanted: dict[str, Any] = {"corpus": plain, "seq_len": T, "micro_batch": 3, "limit": 20}
    seen = {}
    for rank in range(2):
        for one in HeldOutMiddles(**wanted, marks=marks, dp_rank=rank, dp_size=2):
            for b, document in enumerate(one.batch.sequence_B.tolist()):
                counted = one.language_BT[b] >= 0
                if document >= 0:
                    seen[document] = one.batch.targets_BT[b][counted].tolist()
                else:
                    assert not counted.any()
    assert len(seen) == 20
    for document, middle in seen.items():
        own = plain.tokens(document, 0, int(plain.lengths[document])).tolist()
        assert middle
        assert EOT not in middle
        assert str(middle)[1:-1] in str(own)
    reference = HeldOutMiddles(**wanted, marks=None, dp_rank=0, dp_size=1)
    for document, middle in seen.items():
        begin, end = reference._middle(document)
        assert plain.tokens(document, begin, end).tolist() == middle
