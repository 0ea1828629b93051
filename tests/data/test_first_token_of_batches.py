"""What a model reads at the beginning of a document: the tokenizer's first token; end-of-text stays the target."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dist_lm.data.batch import Batch
from dist_lm.data.evaluation_batches import EvaluationBatches
from dist_lm.data.rankings.stream import RankingBatches, RankingStream
from dist_lm.data.stream import SequenceStream
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.tokenizer.tokenizer import FirstToken
from tests.data.rankings.made_rankings import corpus_of, random_rankings
from tests.data.synthetic_corpus import EOT, corpus, lengths

FIRST = 0  # no document holds it
FIRST_TOKEN = FirstToken(EOT, FIRST)
RANKS = {"dp_rank": 0, "dp_size": 1}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> TokenCorpus:
    return corpus(tmp_path_factory.mktemp("plain"), lengths(40, 50))


def check(batch: Batch, plain: Batch) -> None:
    """`batch` is `plain`, but for the first tokens of documents in the inputs."""
    opens = plain.tokens_BT == EOT
    assert torch.equal(batch.tokens_BT, plain.tokens_BT.masked_fill(opens, FIRST))
    assert torch.equal(batch.targets_BT, plain.targets_BT)
    assert torch.equal(batch.document_BT, plain.document_BT)


@pytest.mark.parametrize("micro_batch", [12, 1])
def test_training_reads_it(plain: TokenCorpus, micro_batch: int) -> None:
    """Finds a first token that is written into the targets, too: inputs and targets of one row can share memory."""
    common = {"seed": 3, "seq_len": 16, "global_batch": 12, "micro_batch": micro_batch, **RANKS}
    with SequenceStream(plain, **common) as before, SequenceStream(plain, **common, first_token=FIRST_TOKEN) as after:
        step, opened_step = next(before), next(after)

    for batch, opened_batch in zip(step.micro_batches, opened_step.micro_batches, strict=True):
        check(opened_batch, batch)
    assert any((batch.tokens_BT == FIRST).any() for batch in opened_step.micro_batches)
    assert any((batch.targets_BT == EOT).any() for batch in opened_step.micro_batches)


def test_evaluation_reads_it(plain: TokenCorpus) -> None:
    before, after = (
        EvaluationBatches(corpus=plain, seq_len=16, micro_batch=4, **RANKS, first_token=first_token)
        for first_token in (None, FIRST_TOKEN)
    )
    for one, other in zip(before, after, strict=True):
        check(other.batch, one.batch)


def test_a_slice_of_the_middle_that_holds_end_of_text_keeps_it(tmp_path: Path) -> None:
    """Only a document's own beginning is replaced: a tokenizer's end-of-text may stand in conversations."""
    held = corpus(tmp_path, [64])
    tokens = held.tokens(0, 0, 64)
    with SequenceStream(
        held, seed=0, seq_len=16, global_batch=3, micro_batch=3, **RANKS, first_token=FIRST_TOKEN
    ) as stream:
        (batch,) = next(stream).micro_batches
    assert int((batch.tokens_BT == FIRST).sum()) == 1
    assert set(batch.tokens_BT.flatten().tolist()) <= {FIRST, *np.asarray(tokens).tolist()}


def test_rankings_read_it(tmp_path: Path) -> None:
    documents = random_rankings(12)
    for document in documents:
        document.tokens[0] = EOT
        document.tokens[1:][document.tokens[1:] == EOT] = 5
    rankings = corpus_of(tmp_path, documents)
    common = {"seq_len": 96, "pad_id": 5, "micro_batch": 2, **RANKS}
    kinds = {"seed": 1, "global_batch": 4}
    with (
        RankingStream(rankings, "rankings", 0.0, **common, **kinds) as before,
        RankingStream(rankings, "rankings", 0.0, **common, **kinds, first_token=FIRST_TOKEN) as after,
    ):
        for one, other in zip(next(before).micro_batches, next(after).micro_batches, strict=True):
            check(other, one)
    held = [RankingBatches(rankings=rankings, **common, first_token=first_token) for first_token in (None, FIRST_TOKEN)]
    for (one, _), (other, _) in zip(*held, strict=True):
        check(other, one)
