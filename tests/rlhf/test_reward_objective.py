"""The objective of a reward model: the same loss from a packed tree as from separate forwards, however it is cut."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dist_lm.config.model import ModelConfig
from dist_lm.config.rlhf import RlhfConfig
from dist_lm.data.rankings.mapped import MappedRankings
from dist_lm.data.rankings.stream import Lessons, RankingStream
from dist_lm.model.initialise import initialise
from dist_lm.model.transformer import Transformer
from dist_lm.rlhf.plackett_luce import pair_losses, ranking_losses
from dist_lm.rlhf.reward_model import last_token_scores
from dist_lm.rlhf.reward_objective import choices_of_people
from dist_lm.training.forward import BoundModel
from dist_lm.training.optimizer import build_optimizer, named_state
from tests.data.rankings.made_rankings import corpus_of, random_rankings

NANO = ModelConfig(
    name="nano", d_model=160, n_layers=4, n_heads=5, d_ff=640, max_seq_len=256, vocab_size=512, head="scalar",
    init_std=0.1,
)  # fmt: skip
T = 128


@pytest.fixture(scope="module")
def model() -> Transformer:
    built = Transformer(NANO)
    initialise(built, 3)
    return built


@pytest.fixture(scope="module")
def rankings(tmp_path_factory: pytest.TempPathFactory) -> MappedRankings:
    return corpus_of(tmp_path_factory.mktemp("rankings"), random_rankings(24, vocabulary=512))


def stream_of(rankings: MappedRankings, **changes: int) -> RankingStream:
    settings = {"seed": 0, "seq_len": T, "pad_id": 0, "global_batch": 4, "micro_batch": 4, "dp_rank": 0, "dp_size": 1}
    return RankingStream(rankings, Lessons("rankings", 0.0, 0), **settings | changes)


def separately(model: Transformer, rankings: MappedRankings, number: int) -> torch.Tensor:
    """The scores of a ranking's completions, each behind its prompt in a forward of its own."""
    tokens, branch = rankings.tokens(number), rankings.verdict(number).branch
    alone = [tokens[(branch == 0) | (branch == k)].tolist() for k in range(1, int(branch.max()) + 1)]
    return torch.tensor(np.concatenate([last_token_scores(model, [one]) for one in alone]))


def test_packed_trees_score_as_separate_forwards(model: Transformer, rankings: MappedRankings) -> None:
    with stream_of(rankings) as stream, torch.no_grad():
        batch = next(stream).micro_batches[0]
        assert batch.ranked is not None
        score_PK = BoundModel(model, True, 0).scores(batch).flatten()[batch.ranked.place_PK]
    known = {}
    for number in range(rankings.corpus.n_documents):
        verdict = rankings.verdict(number)
        if len(verdict.ranks):
            known[tuple(verdict.ranks.tolist()), tuple(rankings.tokens(number)[-3:].tolist())] = number
    tokens_N, checked = batch.tokens_BT.flatten(), 0
    for p, there in enumerate(batch.ranked.there_PK):
        last = int(batch.ranked.place_PK[p][there][-1])
        key = tuple(batch.ranked.rank_PK[p][there].tolist()), tuple(tokens_N[last - 2 : last + 1].tolist())
        expected = separately(model, rankings, known[key])
        torch.testing.assert_close(score_PK[p][there], expected, rtol=1e-5, atol=1e-5)
        checked += len(expected)
    assert checked > 20
    assert score_PK[batch.ranked.there_PK].std() > 0.1  # scores that differ, so that a mix-up would show


def test_the_loss_is_that_of_all_choices_and_does_not_depend_on_the_cut(
    model: Transformer, rankings: MappedRankings
) -> None:
    total, count = 0.0, 0
    for number in range(rankings.corpus.n_documents):
        verdict, scores = rankings.verdict(number), separately(model, rankings, number)
        if len(verdict.ranks):
            there = torch.ones(1, len(scores), dtype=torch.bool)
            total += float(ranking_losses(scores[None], torch.from_numpy(verdict.ranks.astype(int))[None], there).sum())
            count += len(scores) - 1
        else:
            better, worse = scores[torch.from_numpy(verdict.judgements.astype(int))].T
            total += float(pair_losses(better, worse, torch.from_numpy(verdict.margins.copy())).sum())
            count += len(verdict.judgements)
    rows = stream_of(rankings)._packing.n_rows
    for micro_batch in (1, rows):
        with stream_of(rankings, global_batch=rows, micro_batch=micro_batch) as stream, torch.no_grad():
            sums = [choices_of_people(BoundModel(model, True, 0), batch) for batch in next(stream).micro_batches]
        assert sum(float(one.count) for one in sums) == count
        assert sum(float(one.total) for one in sums) == pytest.approx(total, rel=1e-5)
        right = sum(float(one.metrics["train/accuracy"]) for one in sums)
        assert 0 < right < count


def test_a_batch_of_judgements_alone_or_of_ranks_alone_has_a_gradient(
    model: Transformer, rankings: MappedRankings
) -> None:
    with stream_of(rankings) as stream:
        batch = next(stream).micro_batches[0]
    ranked = batch.ranked
    assert ranked is not None
    no_ranks = replace(ranked, **{name: getattr(ranked, name)[:0] for name in ("place_PK", "rank_PK", "there_PK")})
    no_pairs = replace(ranked, **{name: getattr(ranked, name)[:0] for name in ("better_N", "worse_N", "margin_N")})
    for part in (no_ranks, no_pairs):
        model.zero_grad()
        loss = choices_of_people(BoundModel(model, True, 0), replace(batch, ranked=part))
        loss.total.backward()
        assert loss.count > 0
        assert model.scalar_head is not None
        assert model.scalar_head.weight.grad is not None
        assert model.scalar_head.weight.grad.abs().max() > 0
    model.zero_grad()


def test_the_heads_bias_which_no_choice_hangs_on_is_not_trained(model: Transformer, rankings: MappedRankings) -> None:
    """Its gradient would be rounding, of which Adam makes steps of full size, others on every layout."""
    optimizer = build_optimizer(model, RlhfConfig(lr=1e-2))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    with stream_of(rankings) as stream:
        choices_of_people(BoundModel(model, True, 0), next(stream).micro_batches[0]).total.backward()
    assert model.scalar_head is not None
    assert model.scalar_head.bias.grad is not None  # every parameter takes part in every step
    assert float(model.scalar_head.bias.grad) == 0
    optimizer.step()
    after = dict(model.named_parameters())
    assert torch.equal(after["scalar_head.bias"], before["scalar_head.bias"])
    assert not torch.equal(after["scalar_head.weight"], before["scalar_head.weight"])
    assert {"scalar_head.bias.exp_avg"} <= {name for name, _ in named_state(model, optimizer)}  # checkpoints stay alike
