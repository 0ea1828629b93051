"""The reward model: scores and their scale, its objective on packed rankings, and its held-out figures."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dist_lm.config.model import ModelConfig
from dist_lm.data.rankings.shards import RankingCorpus
from dist_lm.data.rankings.stream import RankingStream
from dist_lm.errors import ArtefactError
from dist_lm.model.keyed_random import initialise
from dist_lm.model.transformer import Transformer
from dist_lm.rlhf.config import RlhfConfig
from dist_lm.rlhf.rankings import pair_losses, ranking_losses
from dist_lm.rlhf.reward_model import (
    RewardScale,
    ScoredRanking,
    choices_of_people,
    last_token_scores,
    mean_loss,
    read_reward_scale,
    reward_metrics,
)
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.training.optimizer import build_optimizer, named_state
from tests.data.rankings.made_rankings import corpus_of, random_rankings

# --- scores of texts at their last token, and their normaliser ---


CONFIG = ModelConfig(
    name="t", d_model=16, n_layers=2, n_heads=2, d_ff=32, max_seq_len=64, vocab_size=50, head="scalar", init_std=0.3
)


def test_normalised_scores_have_mean_0_and_deviation_1_and_equal_scores_become_0() -> None:
    scores = torch.from_numpy(np.random.default_rng(0).normal(5, 3, 400))
    normalised = RewardScale.of(scores)(scores)
    assert float(normalised.mean()) == pytest.approx(0, abs=1e-12)
    assert float(normalised.std(unbiased=False)) == pytest.approx(1)
    assert RewardScale.of(torch.ones(4))(torch.ones(4)).tolist() == [0.0] * 4


def test_a_scale_is_read_from_a_finished_run(tmp_path) -> None:
    run = RunDirectory(tmp_path)
    with pytest.raises(ArtefactError, match="not finished"):
        read_reward_scale(run)
    run.result.write_text(json.dumps({"normaliser": {"mean": 2.0, "std": 4.0}}))
    assert read_reward_scale(run)(10.0) == 2.0
    run.result.write_text(json.dumps({"normaliser": {"mean": 2.0, "std": 0.0}}))
    with pytest.raises(ArtefactError, match="the same score"):
        read_reward_scale(run)
    run.result.write_text("{}")
    with pytest.raises(ArtefactError, match="expected a run of stage=reward"):
        read_reward_scale(run)


def test_a_score_is_that_of_the_last_real_token_whatever_fills_the_row() -> None:
    model = Transformer(CONFIG)
    initialise(model, 1)
    draw = np.random.default_rng(1)
    sequences = [draw.integers(0, 50, n).tolist() for n in (3, 17, 1, 9, 17)]
    together = last_token_scores(model, sequences, batch=4)
    alone = [float(last_token_scores(model, [one])[0]) for one in sequences]
    assert together == pytest.approx(alone, abs=1e-5)
    assert np.std(alone) > 0.01
    assert last_token_scores(model, [[*sequences[0], 7]])[0] != pytest.approx(alone[0], abs=1e-4)


# --- the objective of a reward model: the same loss from a packed tree as from separate forwards, however it is cut ---


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
def rankings(tmp_path_factory: pytest.TempPathFactory) -> RankingCorpus:
    return corpus_of(tmp_path_factory.mktemp("rankings"), random_rankings(24, vocabulary=512))


def stream_of(rankings: RankingCorpus, **changes: int) -> RankingStream:
    settings = {"seed": 0, "seq_len": T, "pad_id": 0, "global_batch": 4, "micro_batch": 4, "dp_rank": 0, "dp_size": 1}
    return RankingStream(rankings, "rankings", 0.0, **settings | changes)


def separately(model: Transformer, rankings: RankingCorpus, number: int) -> torch.Tensor:
    """The scores of a ranking's completions, each behind its prompt in a forward of its own."""
    tokens, branch = rankings.tokens(number), rankings.arrays(number).branch
    alone = [tokens[(branch == 0) | (branch == k)].tolist() for k in range(1, int(branch.max()) + 1)]
    return torch.tensor(np.concatenate([last_token_scores(model, [one]) for one in alone]))


def test_packed_trees_score_as_separate_forwards(model: Transformer, rankings: RankingCorpus) -> None:
    with stream_of(rankings) as stream, torch.no_grad():
        batch = next(stream).micro_batches[0]
        assert batch.ranked is not None
        score_PK = model.scores(batch).flatten()[batch.ranked.index_PK]
    known = {}
    for number in range(rankings.corpus.n_documents):
        arrays = rankings.arrays(number)
        if len(arrays.ranks):
            known[tuple(arrays.ranks.tolist()), tuple(rankings.tokens(number)[-3:].tolist())] = number
    tokens_N, checked = batch.tokens_BT.flatten(), 0
    for p, there in enumerate(batch.ranked.exists_PK):
        last = int(batch.ranked.index_PK[p][there][-1])
        key = tuple(batch.ranked.rank_PK[p][there].tolist()), tuple(tokens_N[last - 2 : last + 1].tolist())
        expected = separately(model, rankings, known[key])
        torch.testing.assert_close(score_PK[p][there], expected, rtol=1e-5, atol=1e-5)
        checked += len(expected)
    assert checked > 20
    assert score_PK[batch.ranked.exists_PK].std() > 0.1  # scores that differ, so that a mix-up would show


@pytest.mark.heavy
def test_the_loss_is_that_of_all_choices_and_does_not_depend_on_the_cut(
    model: Transformer, rankings: RankingCorpus
) -> None:
    total, count = 0.0, 0
    for number in range(rankings.corpus.n_documents):
        arrays, scores = rankings.arrays(number), separately(model, rankings, number)
        if len(arrays.ranks):
            there = torch.ones(1, len(scores), dtype=torch.bool)
            total += float(ranking_losses(scores[None], torch.from_numpy(arrays.ranks.astype(int))[None], there).sum())
            count += len(scores) - 1
        else:
            better, worse = scores[torch.from_numpy(arrays.judgements.astype(int))].T
            total += float(pair_losses(better, worse, torch.from_numpy(arrays.margins.copy())).sum())
            count += len(arrays.judgements)
    packing = stream_of(rankings).packing
    assert packing
    rows = int(packing["sequences"])
    for micro_batch in (1, rows):
        with stream_of(rankings, global_batch=rows, micro_batch=micro_batch) as stream, torch.no_grad():
            sums = [choices_of_people(model, batch) for batch in next(stream).micro_batches]
        assert sum(float(one.count) for one in sums) == count
        assert sum(float(one.total) for one in sums) == pytest.approx(total, rel=1e-5)
        right = sum(float(one.metrics["train/accuracy"]) for one in sums)
        assert 0 < right < count


def test_a_batch_of_judgements_alone_or_of_ranks_alone_has_a_gradient(
    model: Transformer, rankings: RankingCorpus
) -> None:
    with stream_of(rankings) as stream:
        batch = next(stream).micro_batches[0]
    ranked = batch.ranked
    assert ranked is not None
    no_ranks = replace(ranked, **{name: getattr(ranked, name)[:0] for name in ("index_PK", "rank_PK", "exists_PK")})
    no_pairs = replace(ranked, **{name: getattr(ranked, name)[:0] for name in ("better_N", "worse_N", "margin_N")})
    for part in (no_ranks, no_pairs):
        model.zero_grad()
        loss = choices_of_people(model, replace(batch, ranked=part))
        loss.total.backward()
        assert loss.count > 0
        assert model.scalar_head is not None
        assert model.scalar_head.weight.grad is not None
        assert model.scalar_head.weight.grad.abs().max() > 0
    model.zero_grad()


def test_the_heads_bias_which_no_choice_hangs_on_is_not_trained(model: Transformer, rankings: RankingCorpus) -> None:
    """Its gradient would be rounding, of which Adam makes steps of full size, others on every layout."""
    optimizer = build_optimizer(model, RlhfConfig(lr=1e-2))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    with stream_of(rankings) as stream:
        choices_of_people(model, next(stream).micro_batches[0]).total.backward()
    assert model.scalar_head is not None
    assert model.scalar_head.bias.grad is not None  # every parameter takes part in every step
    assert float(model.scalar_head.bias.grad) == 0
    optimizer.step()
    after = dict(model.named_parameters())
    assert torch.equal(after["scalar_head.bias"], before["scalar_head.bias"])
    assert not torch.equal(after["scalar_head.weight"], before["scalar_head.weight"])
    assert {"scalar_head.bias.exp_avg"} <= {name for name, _ in named_state(model, optimizer)}  # checkpoints stay alike


# --- held-out figures of a reward model: those of a plain count, by source and by number of completions ---


def ranked(source: str, scores: list[float], ranks: list[int]) -> ScoredRanking:
    return ScoredRanking(source, np.array(scores, np.float32), np.array(ranks, np.uint8), None)


def judged(source: str, better: float, worse: float, margin: float = 0.0) -> ScoredRanking:
    return ScoredRanking(source, np.array([better, worse], np.float32), np.array([0, 1], np.uint8), margin)


SCORED = [
    ranked("people", [3.0, 2.0, 1.0], [0, 1, 2]),  # all right
    ranked("people", [1.0, 2.0], [0, 1]),  # wrong
    judged("others", 2.0, 0.0, margin=1.0),  # right
]


def test_figures_of_all_of_sources_and_of_sizes() -> None:
    found = reward_metrics(SCORED)
    assert found["reward/accuracy"] == pytest.approx(4 / 5)
    assert found["reward/kendall_tau"] == pytest.approx((1 - 1 + 1) / 3)
    assert found["reward/top1"] == pytest.approx(2 / 3)
    assert found["reward/accuracy_people"] == pytest.approx(3 / 4)
    assert found["reward/accuracy_others"] == 1
    assert found["reward/accuracy_k3"] == 1
    assert found["reward/accuracy_k2"] == pytest.approx(1 / 2)
    assert found["reward/kendall_tau_k2"] == 0
    assert {
        "reward/calibration_error",
        "reward/calibration_error_k3",
        "reward/calibration_error_people",
    } <= found.keys()


def test_the_loss_is_a_mean_over_choices_with_margins() -> None:
    def pair(lead: float) -> float:
        return math.log1p(math.exp(-lead))

    three = math.log(1 + math.exp(-1) + math.exp(-2)) + pair(1.0)
    assert mean_loss(SCORED[:1]) == pytest.approx(three / 2)
    assert mean_loss(SCORED) == pytest.approx((three + pair(-1.0) + pair(2.0 - 1.0)) / 4)
    assert reward_metrics(SCORED)["val/loss_others"] == pytest.approx(pair(1.0))
