"""Rankings in a stream: whole, in the same order at every layout and after a resumption; evaluation has each once."""

from collections import Counter
from dataclasses import fields

import numpy as np
import pytest
import torch

from dist_lm.chat.ranking import branch_ends, branch_positions
from dist_lm.data.batch import Batch
from dist_lm.data.rankings.shards import RankingCorpus
from dist_lm.data.rankings.stream import RankingBatches, RankingStream
from dist_lm.data.sequences import note_of_left_out
from dist_lm.data.stream import StepData
from dist_lm.errors import ArtefactError
from tests.data.rankings.made_rankings import corpus_of, random_rankings

T = 40


@pytest.fixture(scope="module")
def rankings(tmp_path_factory: pytest.TempPathFactory) -> RankingCorpus:
    return corpus_of(tmp_path_factory.mktemp("rankings"), random_rankings(80))


def take(rankings: RankingCorpus, steps: int, **changes: int) -> list[StepData]:
    settings = {"seed": 3, "seq_len": T, "pad_id": 0, "global_batch": 6, "micro_batch": 6, "dp_rank": 0, "dp_size": 1}
    with RankingStream(rankings, "rankings", 0.3, **settings | changes) as stream:
        return [next(stream) for _ in range(steps)]


def lines(batch: Batch) -> list[tuple]:
    """What each ranking of a batch is learned by: scores read at which tokens, and its lesson; in order."""
    assert batch.ranked is not None
    tokens = batch.tokens_BT.flatten()
    r = batch.ranked
    found: list[tuple] = [
        (tuple(tokens[place[there]].tolist()), tuple(rank[there].tolist()))
        for place, rank, there in zip(r.index_PK, r.rank_PK, r.exists_PK, strict=True)
    ]
    pairs = zip(tokens[r.better_N].tolist(), tokens[r.worse_N].tolist(), r.margin_N.tolist(), strict=True)
    return [*found, *pairs]


def trees(batch: Batch) -> list[torch.Tensor]:
    """Where each ranking of a batch lies in its flattened tokens, in order; padding is no tree."""
    assert batch.branch_BT is not None
    document, branch = batch.document_BT + 100 * torch.arange(len(batch.tokens_BT))[:, None], batch.branch_BT.flatten()
    places = [(document.flatten() == number).nonzero().flatten() for number in document.unique()]
    return [one for one in places if branch[one].any()]


def test_every_ranking_is_whole_and_scored_at_its_last_tokens(rankings: RankingCorpus) -> None:
    batch = take(rankings, 1)[0].micro_batches[0]
    assert batch.branch_BT is not None
    assert batch.ranked is not None
    known = {
        (tuple(rankings.tokens(n).tolist()), tuple(rankings.arrays(n).branch.tolist()))
        for n in range(rankings.corpus.n_documents)
    }
    ends: set[int] = set()
    for places in trees(batch):
        branch = batch.branch_BT.flatten()[places].numpy().astype(np.uint8)
        assert (tuple(batch.tokens_BT.flatten()[places].tolist()), tuple(branch.tolist())) in known
        assert batch.position_BT.flatten()[places].tolist() == branch_positions(branch).tolist()
        ends |= set(places[torch.from_numpy(branch_ends(branch))].tolist())
    ranked = batch.ranked
    asked = {*ranked.index_PK[ranked.exists_PK].tolist(), *ranked.better_N.tolist(), *ranked.worse_N.tolist()}
    assert asked <= ends
    assert len(asked) > 10


@pytest.mark.parametrize(("dp_size", "micro_batch"), [(1, 4), (2, 2), (3, 1)])
def test_the_order_is_the_same_at_any_cut_and_resumes_from_the_integer(
    rankings: RankingCorpus, dp_size: int, micro_batch: int
) -> None:
    whole = take(rankings, 12)
    later = [
        take(rankings, 7, position=whole[4].position, dp_rank=rank, dp_size=dp_size, micro_batch=micro_batch)
        for rank in range(dp_size)
    ]
    for step, expected in enumerate(whole[5:]):
        parts = [batch for rank in later for batch in rank[step].micro_batches]
        (one,) = expected.micro_batches
        for field in fields(Batch):
            value = getattr(one, field.name)
            if isinstance(value, torch.Tensor):
                assert torch.equal(torch.cat([getattr(part, field.name) for part in parts]), value), field.name
        # those with ranks come before those with judgements in each part
        assert Counter(line for part in parts for line in lines(part)) == Counter(lines(one))


def test_an_epoch_holds_every_ranking_once(rankings: RankingCorpus) -> None:
    rows = RankingBatches(rankings=rankings, seq_len=T, micro_batch=1, dp_rank=0, dp_size=1, pad_id=0).packing.n_rows
    epochs = [take(rankings, 1, global_batch=rows, micro_batch=rows, position=n * rows)[0] for n in (0, 1)]
    for epoch in epochs:
        (batch,) = epoch.micro_batches
        starts = Counter(tuple(batch.tokens_BT.flatten()[places].tolist()) for places in trees(batch))
        assert starts == Counter(tuple(rankings.tokens(n).tolist()) for n in range(rankings.corpus.n_documents))
    assert not torch.equal(epochs[0].micro_batches[0].tokens_BT, epochs[1].micro_batches[0].tokens_BT)


@pytest.mark.parametrize("dp_size", [1, 3])
def test_evaluation_has_every_ranking_once_and_as_many_batches_on_every_rank(
    rankings: RankingCorpus, dp_size: int
) -> None:
    found, counts = [], set()
    for rank in range(dp_size):
        batches = list(
            RankingBatches(rankings=rankings, seq_len=T, micro_batch=4, dp_rank=rank, dp_size=dp_size, pad_id=0)
        )
        counts.add(len(batches))
        for batch, placed in batches:
            assert batch.tokens_BT.shape == (4, T)
            for one in placed:
                ends = batch.tokens_BT.flatten()[torch.from_numpy(one.places)]
                own = rankings.tokens(one.document)
                assert ends.tolist() == own[branch_ends(rankings.arrays(one.document).branch)].tolist()
                found.append(one.document)
    assert len(counts) == 1
    assert sorted(found) == list(range(rankings.corpus.n_documents))


def test_rankings_longer_than_a_sequence_are_left_out_loudly(rankings: RankingCorpus) -> None:
    longest = int(rankings.corpus.lengths.max())
    assert note_of_left_out(rankings.corpus, longest, kind="rankings") == ""
    left_out = int((rankings.corpus.lengths == longest).sum())
    assert f"{left_out} of 80 train rankings" in note_of_left_out(rankings.corpus, longest - 1, kind="rankings")
    with pytest.raises(ArtefactError, match=r"all 80 train rankings are longer than stage.seq_len=2"):
        take(rankings, 1, seq_len=2)
