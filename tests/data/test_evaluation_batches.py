"""Evaluation counts every held-out token once, under the language of its document, on any number of ranks."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_lm.data.evaluation_batches import EvaluationBatch, EvaluationBatches, evenly_spaced
from dist_lm.data.token_corpus import TokenCorpus
from tests.data.synthetic_corpus import EOT, corpus, documents, lengths

T = 16
LENGTHS = lengths(40, 50)
PAD = 0


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> TokenCorpus:
    return corpus(tmp_path_factory.mktemp("plain"), LENGTHS)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> TokenCorpus:
    return corpus(tmp_path_factory.mktemp("masked"), LENGTHS, masked=True)


def all_ranks(corpus: TokenCorpus, dp_size: int, **changes) -> list[EvaluationBatch]:
    """The batches of every rank, which must be as many."""
    settings: dict[str, Any] = {"seq_len": T, "micro_batch": 3, "dp_size": dp_size, "pad_id": PAD} | changes
    ranks = [list(EvaluationBatches(corpus=corpus, **settings, dp_rank=rank)) for rank in range(dp_size)]
    assert len({len(batches) for batches in ranks}) == 1
    return [batch for batches in ranks for batch in batches]


def counted(corpus: TokenCorpus, batches: list[EvaluationBatch]) -> Counter[tuple[str, int]]:
    """How often each (language, target token) counts."""
    found: Counter[tuple[str, int]] = Counter()
    for evaluation in batches:
        keep = evaluation.language_BT >= 0
        assert torch.equal(keep, evaluation.batch.loss_mask_BT == 1)
        codes, targets = evaluation.language_BT[keep].tolist(), evaluation.batch.targets_BT[keep].tolist()
        found.update((corpus.languages[code], target) for code, target in zip(codes, targets, strict=True))
    return found


@pytest.mark.parametrize("dp_size", [1, 2, 5])
@pytest.mark.parametrize("seq_len", [T, 7, 5000])
def test_every_token_counts_once_in_its_language(plain: TokenCorpus, dp_size: int, seq_len: int) -> None:
    expected: Counter[tuple[str, int]] = Counter()
    for document in documents(LENGTHS):
        expected.update((document.language, int(token)) for token in document.tokens[1:])
        expected[document.language, EOT] += 1  # the one that closes it
    assert counted(plain, all_ranks(plain, dp_size, seq_len=seq_len)) == expected


def test_sequences_that_fill_exactly_need_no_padding(tmp_path: Path) -> None:
    made = corpus(tmp_path, [T, T])
    (evaluation,) = all_ranks(made, 1, micro_batch=2)
    assert evaluation.batch.loss_mask_BT.all()
    assert evaluation.batch.targets_BT[:, -1].tolist() == [EOT, EOT]


def test_padding_is_a_document_of_its_own(tmp_path: Path) -> None:
    made = corpus(tmp_path, [T + 4])
    (evaluation,) = all_ranks(made, 1, pad_id=9)
    batch = evaluation.batch
    assert batch.sequence_B.tolist() == [0, 1, -1]
    assert batch.loss_mask_BT.sum(1).tolist() == [T, 4, 0]
    assert batch.targets_BT[1, 3] == EOT
    assert (batch.tokens_BT[1, 5:] == 9).all()
    assert (batch.tokens_BT[2] == 9).all()
    assert batch.tokens_BT.shape == (3, T)
    assert batch.document_BT[1, 3] != batch.document_BT[1, 5]


def test_it_can_be_iterated_again(plain: TokenCorpus) -> None:
    batches = EvaluationBatches(corpus=plain, seq_len=T, micro_batch=3, dp_rank=0, dp_size=2)
    once, twice = list(batches), list(batches)
    assert all(torch.equal(a.batch.tokens_BT, b.batch.tokens_BT) for a, b in zip(once, twice, strict=True))


def test_bytes_are_exact_when_all_is_evaluated(plain: TokenCorpus) -> None:
    expected: Counter[str] = Counter()
    for document in documents(LENGTHS):
        expected[document.language] += document.n_bytes
    batches = EvaluationBatches(corpus=plain, seq_len=T, micro_batch=3, dp_rank=1, dp_size=2)
    assert batches.bytes_by_language == dict(expected)


@pytest.mark.parametrize("name", ["plain", "masked"])
@pytest.mark.parametrize("limit", [0, 1, 10])
def test_bytes_follow_the_counted_targets(name: str, limit: int, request: pytest.FixtureRequest) -> None:
    opened = request.getfixturevalue(name)
    settings: dict[str, Any] = {"seq_len": T, "micro_batch": 3, "limit_sequences": limit}
    batches = EvaluationBatches(corpus=opened, **settings, dp_rank=0, dp_size=2)
    targets: Counter[str] = Counter()
    for (language, _), n in counted(opened, all_ranks(opened, 2, limit_sequences=limit)).items():
        targets[language] += n
    for code, language in enumerate(opened.languages):
        mine = opened.language_codes == code
        a_token = opened.n_bytes[mine].sum() / opened.lengths[mine].sum()
        assert batches.bytes_by_language[language] == pytest.approx(targets[language] * a_token)


@pytest.mark.parametrize("dp_size", [1, 3])
def test_a_limit_takes_an_even_spread(plain: TokenCorpus, dp_size: int) -> None:
    whole = {
        n: row
        for b in all_ranks(plain, 1)
        for n, row in zip(b.batch.sequence_B.tolist(), b.batch.tokens_BT, strict=True)
    }
    numbers = []
    for evaluation in all_ranks(plain, dp_size, limit_sequences=10):
        for number, row in zip(evaluation.batch.sequence_B.tolist(), evaluation.batch.tokens_BT, strict=True):
            if number >= 0:
                numbers.append(number)
                assert torch.equal(row, whole[number])
    gaps = np.diff(sorted(numbers))
    assert len(numbers) == 10
    assert gaps.max() - gaps.min() <= 1


@given(st.integers(0, 200), st.integers(0, 250))
def test_spread(n: int, limit: int) -> None:
    found = evenly_spaced(n, limit).tolist()
    assert len(set(found)) == len(found) == (min(n, limit) if limit else n)
    assert all(0 <= i < n for i in found)


@pytest.mark.parametrize("dp_size", [1, 2, 5])
def test_conversations_are_whole_and_their_learned_tokens_count_once(masked: TokenCorpus, dp_size: int) -> None:
    expected: Counter[tuple[str, int]] = Counter()
    for document in documents(LENGTHS, masked=True):
        if len(document.tokens) <= T + 1:
            mask = np.ones(len(document.tokens)) if document.loss_mask is None else document.loss_mask
            for token, learned in zip(document.tokens[1:].tolist(), mask[1:], strict=True):
                expected[document.language, token] += int(learned)
    batches = all_ranks(masked, dp_size)
    found = counted(masked, batches)
    found = Counter({pair: n for pair, n in found.items() if pair[1] != EOT})  # of those without a mask
    assert found == +expected
    for evaluation in batches:
        starts = torch.diff(evaluation.batch.document_BT, dim=1, prepend=torch.full((3, 1), -1)) > 0
        opened = evaluation.batch.tokens_BT[starts]
        assert torch.isin(opened, torch.tensor([EOT, PAD])).all()  # none goes on from the sequence before


def test_flags_are_those_of_training(plain: TokenCorpus) -> None:
    batches = all_ranks(plain, 1, document_mask=False, reset_positions=False)
    assert not any(evaluation.batch.document_BT.any() for evaluation in batches)
    assert all((evaluation.batch.position_BT == torch.arange(T)).all() for evaluation in batches)
