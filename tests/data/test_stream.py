"""The stream: the same sequences at every number of ranks, resumed from one integer, ahead of time unseen."""

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_lm.data.batch import Batch
from dist_lm.data.order import DocumentSlice, EpochOrder, SliceTable
from dist_lm.data.packing import PackedEpoch, Packing
from dist_lm.data.stream import PREFETCH, SequenceStream, StepData, rank_micro_batches
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ArtefactError, ConfigError
from tests.data.synthetic_corpus import EOT, corpus, documents, lengths
from tests.patience import patient

LENGTHS = lengths(40, 50)
T = 16
SETTINGS: dict[str, Any] = {
    "seed": 3,
    "seq_len": T,
    "global_batch": 12,
    "micro_batch": 2,
    "dp_rank": 0,
    "dp_size": 1,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> TokenCorpus:
    return corpus(tmp_path_factory.mktemp("plain"), LENGTHS)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> TokenCorpus:
    return corpus(tmp_path_factory.mktemp("masked"), LENGTHS, masked=True)


WITHOUT = ("branch_BT", "logit_index_N", "ranked", "boundary", "n_tokens")
THERE = [field.name for field in fields(Batch) if field.name not in WITHOUT]


def take(corpus: TokenCorpus, steps: int, **changes) -> list[StepData]:
    with SequenceStream(corpus, **SETTINGS | changes) as stream:
        return [next(stream) for _ in range(steps)]


def joined(step_data: list[StepData]) -> Batch:
    """All sequences of several ranks or micro-batches as one batch."""
    batches = [batch for data in step_data for batch in data.micro_batches]
    return Batch(**{name: torch.cat([getattr(batch, name) for batch in batches]) for name in THERE})


def assert_same(one: Batch, other: Batch) -> None:
    assert one.branch_BT is other.branch_BT is None
    for name in THERE:
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_an_epoch_delivers_every_token(plain: TokenCorpus) -> None:
    per_epoch = (sum(LENGTHS) - 1) // T
    data = take(plain, 1, global_batch=per_epoch, micro_batch=per_epoch)
    batch = joined(data)
    assert batch.sequence_B.tolist() == list(range(per_epoch))
    stream = np.concatenate([document.tokens for document in documents(LENGTHS)])
    left = np.bincount(stream, minlength=2**16) - np.bincount(batch.targets_BT.flatten(), minlength=2**16)
    assert left.min() >= 0  # no token twice
    assert 1 <= left.sum() <= T  # the first and the tail


@pytest.mark.parametrize("name", ["plain", "masked"])
def test_fields_agree_with_the_documents(name: str, request: pytest.FixtureRequest) -> None:
    """Text is cut, conversations are whole, with padding behind them."""
    opened = request.getfixturevalue(name)
    made = documents(LENGTHS, masked=name == "masked")
    if name == "plain":
        order = EpochOrder(opened.lengths, SETTINGS["seed"], 0, T)
    else:
        order = PackedEpoch(Packing(opened.lengths, T), SETTINGS["seed"], 0)
    batch = joined(take(opened, 1, global_batch=order.n_sequences, pad_id=9))
    for b, number in enumerate(batch.sequence_B.tolist()):
        parts = order.sequence(number)
        row = np.concatenate([made[d].tokens[start:stop] for d, start, stop in parts])
        filled = T + 1 - len(row)
        row = np.concatenate([row, np.full(filled, 9)])
        masks = [np.ones(len(d.tokens), np.uint8) if d.loss_mask is None else d.loss_mask for d in made]
        learned = np.concatenate([masks[d][start:stop] for d, start, stop in parts])
        learned = np.concatenate([learned, np.zeros(filled)])
        assert batch.tokens_BT[b].tolist() == row[:-1].tolist()
        assert batch.targets_BT[b].tolist() == row[1:].tolist()
        assert batch.loss_mask_BT[b].tolist() == learned[1:].tolist()
        place = [(d, t) for d, (_, start, stop) in enumerate(parts) for t in range(stop - start)]
        place = [*place, *((len(parts), T + 1 - filled + t) for t in range(filled))][:-1]
        assert list(zip(batch.document_BT[b].tolist(), batch.position_BT[b].tolist(), strict=True)) == place
    assert (batch.loss_mask_BT.mean() < 1) == (name == "masked")
    assert batch.loss_mask_BT.dtype == torch.float32
    others = (batch.tokens_BT, batch.targets_BT, batch.document_BT, batch.position_BT, batch.sequence_B)
    assert {tensor.dtype for tensor in others} == {torch.int64}


def test_tokens_are_counted_without_padding(masked: TokenCorpus) -> None:
    order = PackedEpoch(Packing(masked.lengths, T), SETTINGS["seed"], 0)
    # no corpus can hold such a token
    (data,) = take(masked, 1, global_batch=order.n_sequences, pad_id=2**17)
    rows = [order.sequence(number) for number in joined([data]).sequence_B.tolist()]
    assert data.tokens == sum(min(T, sum(stop - start for _, start, stop in parts)) for parts in rows)
    assert data.tokens < order.n_sequences * T
    # padding may have the id of end-of-text, or of any other token
    (same,) = take(masked, 1, global_batch=order.n_sequences, micro_batch=order.n_sequences, pad_id=EOT)
    assert same.tokens == data.tokens


def test_a_document_starts_at_end_of_text(plain: TokenCorpus) -> None:
    batch = joined(take(plain, 3))
    opens = torch.diff(batch.document_BT, dim=1) == 1
    assert opens.any()
    assert torch.equal(opens, batch.tokens_BT[:, 1:] == EOT)
    assert torch.equal(batch.position_BT == 0, torch.nn.functional.pad(opens, (1, 0), value=True))


def test_masking_and_resetting_can_be_turned_off(plain: TokenCorpus) -> None:
    with_both, without = (
        joined(take(plain, 2)),
        joined(take(plain, 2, document_mask=False, reset_positions=False)),
    )
    assert torch.equal(with_both.tokens_BT, without.tokens_BT)
    assert torch.equal(without.document_BT, torch.zeros_like(without.document_BT))
    assert torch.equal(without.position_BT, torch.arange(T).expand_as(without.position_BT))
    assert without.loss_mask_BT.all()


@pytest.mark.parametrize(("dp_size", "micro_batch"), [(2, 2), (3, 4), (4, 2), (12, 8), (1, 5), (1, 100)])
def test_any_cut_gives_the_same_sequences(plain: TokenCorpus, dp_size: int, micro_batch: int) -> None:
    whole = take(plain, 3)
    ranks = [take(plain, 3, dp_rank=r, dp_size=dp_size, micro_batch=micro_batch) for r in range(dp_size)]
    for step, expected in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        assert {part.position for part in parts} == {expected.position}
        assert len({tuple(len(b.sequence_B) for b in part.micro_batches) for part in parts}) == 1
        assert max(len(b.sequence_B) for b in parts[0].micro_batches) <= micro_batch
        assert_same(joined(parts), joined([expected]))


@given(st.integers(1, 8), st.integers(1, 30), st.integers(1, 40))
def test_cuts_partition_the_batch(dp_size: int, micro_batch: int, share: int) -> None:
    cuts = [rank_micro_batches(share * dp_size, micro_batch, rank, dp_size) for rank in range(dp_size)]
    assert [i for rank in cuts for cut in rank for i in cut] == list(range(share * dp_size))
    assert len({tuple(len(cut) for cut in rank) for rank in cuts}) == 1


def test_resume_from_the_integer_alone(plain: TokenCorpus) -> None:
    """Across the end of an epoch, at another number of ranks, whatever was prepared ahead."""
    whole = take(plain, 10)
    assert [data.position for data in whole] == [12 * (step + 1) for step in range(10)]
    assert whole[-1].position > 1.5 * ((sum(LENGTHS) - 1) // T)
    for step in (0, 4, 8):
        ranks = [take(plain, 1, position=whole[step].position, dp_rank=r, dp_size=2)[0] for r in range(2)]
        assert_same(joined(ranks), joined([whole[step + 1]]))


def test_epochs_differ_and_a_step_may_cross_several(plain: TokenCorpus) -> None:
    per_epoch = (sum(LENGTHS) - 1) // T
    batch = joined(take(plain, 1, global_batch=3 * per_epoch, micro_batch=per_epoch))
    epochs = batch.targets_BT.split(per_epoch)
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])
    assert batch.sequence_B.tolist() == list(range(3 * per_epoch))


def test_iteration_ends_on_close_and_so_does_the_thread(plain: TokenCorpus) -> None:
    before = set(threading.enumerate())
    stream = SequenceStream(plain, **SETTINGS)
    next(stream)
    threads = set(threading.enumerate()) - before
    assert len(threads) == 1
    stream.close()
    assert not any(thread.is_alive() for thread in threads)
    assert list(stream) == []
    stream.close()


def test_an_error_in_the_thread_reaches_the_reader(plain: TokenCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the step it belongs to, not earlier, and again if the reader asks again."""
    located = plain.located
    damaged = EpochOrder(plain.lengths, SETTINGS["seed"], 0, T).sequence(30)[0].document

    class Failing:
        has_mask = False

        def tokens_of(self, slices: Sequence[DocumentSlice]) -> np.ndarray:
            raise OSError("disk gone")

    def located_but_failing(table: SliceTable) -> list[Any]:
        is_damaged = [damaged in [part.document for part in slices] for slices in table.slices()]
        return [Failing() if fails else row for row, fails in zip(located(table), is_damaged, strict=True)]

    per_step = [
        {
            part.document
            for n in range(step * 12, step * 12 + 12)
            for part in EpochOrder(plain.lengths, 3, 0, T).sequence(n)
        }
        for step in range(3)
    ]
    first_bad = next(step for step, used in enumerate(per_step) if damaged in used)
    monkeypatch.setattr(plain, "located", located_but_failing)
    with SequenceStream(plain, **SETTINGS) as stream:
        for _ in range(first_bad):
            next(stream)
        for _ in range(2):
            with pytest.raises(OSError, match="disk gone"):
                next(stream)


def test_steps_are_prepared_ahead_but_not_without_bound(plain: TokenCorpus) -> None:
    with SequenceStream(plain, **SETTINGS) as stream:
        deadline = time.monotonic() + patient(120)
        while not all(future.done() for future in stream._steps):
            assert time.monotonic() < deadline
        assert len(stream._steps) == PREFETCH
        assert next(stream).position == 12
        assert len(stream._steps) == PREFETCH


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> TokenCorpus:
    """Conversations, every one shorter than a sequence."""
    return corpus(tmp_path_factory.mktemp("chat"), lengths(60, T + 1), masked=True)


@pytest.mark.parametrize(("dp_size", "micro_batch"), [(1, 12), (2, 2), (3, 4), (12, 1)])
def test_a_mix_is_the_same_at_any_cut_and_resumes_from_the_integer(chat, plain, masked, dp_size, micro_batch) -> None:
    mix = {plain: 0.3, masked: 0.11}
    whole = take(chat, 20, mix=mix)
    settings: dict[str, Any] = {"mix": mix, "dp_size": dp_size, "micro_batch": micro_batch}
    later = [take(chat, 12, position=whole[7].position, dp_rank=rank, **settings) for rank in range(dp_size)]
    for step, expected in enumerate(whole[8:]):
        assert_same(joined([rank[step] for rank in later]), joined([expected]))


def test_sequences_of_a_mix_are_those_of_each_corpus_alone(chat, plain) -> None:
    mixed = joined(take(chat, 1, global_batch=200, micro_batch=50, mix={plain: 0.3}))
    alone = {
        name: {tuple(row) for row in joined(take(one, 1, global_batch=n, micro_batch=n)).tokens_BT.tolist()}
        for name, one, n in (("chat", chat, 140), ("plain", plain, 60))
    }
    assert mixed.sequence_B.tolist() == list(range(200))
    found = Counter(
        "chat" if row in alone["chat"] else "plain" if row in alone["plain"] else "neither"
        for row in map(tuple, mixed.tokens_BT.tolist())
    )
    assert found == {"chat": 140, "plain": 60}


def test_a_batch_that_does_not_divide_names_what_would(plain: TokenCorpus) -> None:
    with pytest.raises(ConfigError, match=r"stage.global_batch=10 .* 4 data-parallel .*multiple of 4, such as 8 or 12"):
        SequenceStream(plain, **{**SETTINGS, "global_batch": 10, "dp_size": 4})
    with pytest.raises(ConfigError, match=r"multiple of 4, such as 4$"):
        rank_micro_batches(3, 2, 0, 4)


def test_too_little_text_gives_figures(tmp_path: Path) -> None:
    small = corpus(tmp_path, [10, T - 10])
    with pytest.raises(
        ArtefactError, match=rf"has {T} train tokens, but one sequence of stage.seq_len={T} takes {T + 1}"
    ):
        SequenceStream(small, **SETTINGS)
    assert SequenceStream(corpus(tmp_path, [10, T - 9]), **SETTINGS).n_sequences == 1
