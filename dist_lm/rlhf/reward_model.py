"""The reward model: its objective on rankings, its evaluation on held-out rankings, and the scores of texts.

Scores have no zero and no unit, because a likelihood of rankings sees only differences. So stage reward measures mean
and standard deviation of the scores of the reference policy's samples, and writes them into its result. Users of the
scores normalise by them (Stiennon et al. 2020): stage rlhf reads them before its first iteration
(`stages.rlhf.models.first_state`) and applies the same ones in every iteration (`experience.collect`).

Dimensions: B sequences, T tokens, P rankings, K completions of a ranking, N judgements between two completions.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from dist_lm.data.batch import Batch
from dist_lm.data.rankings.shards import RankingCorpus
from dist_lm.data.rankings.stream import PlacedRanking
from dist_lm.errors import ArtefactError
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.messages import all_gather
from dist_lm.rlhf.rankings import agreement, calibration_error, choices, pair_losses, ranking_losses, right_choices
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.training.objective import LossSum

Scores = TypeVar("Scores", float, np.ndarray, torch.Tensor)
KEY = "normaliser"  # key of the reward scale in result.json
FIGURES = ("accuracy", "kendall_tau", "top1", "calibration_error")  # agreement of scores with held-out rankings
SMALLEST_STD = 1e-6  # avoids a division by 0 where all scores are equal


def choices_of_people(model: Transformer, batch: Batch) -> LossSum:
    """Returns the negative log-likelihood of all choices of a batch of rankings, in nats, and their number.

    It is an `Objective`. The choices may be those of people or of rules, as the corpus of rankings has them.

    A ranking of K completions is K - 1 choices (Plackett and Luce), a judgement is one (Bradley and Terry). The trainer
    divides by the global count, so every choice has the same weight, whatever ranking it belongs to. `train/accuracy`:
    share of choices whose score is above those of all worse completions.
    """
    ranked = batch.ranked
    assert ranked is not None, "a batch of rankings"
    score_N = model.scores(batch, learns_offset=False).flatten()  # only differences have a likelihood
    score_PK = score_N[ranked.index_PK]
    better_N, worse_N = score_N[ranked.better_N], score_N[ranked.worse_N]

    losses_PK = ranking_losses(score_PK, ranked.rank_PK, ranked.exists_PK)
    losses_N = pair_losses(better_N, worse_N, ranked.margin_N)
    count = choices(ranked.exists_PK).sum() + len(ranked.margin_N)

    with torch.no_grad():
        right = right_choices(score_PK, ranked.rank_PK, ranked.exists_PK) + (better_N > worse_N).sum()
    return LossSum(
        total=losses_PK.sum() + losses_N.sum(), count=count.float(), metrics={"train/accuracy": right.float()}
    )


# --- the scale of scores ---


@dataclass(frozen=True)
class RewardScale:
    """Shifts and divides scores, so that those of the reference policy's samples have mean 0 and standard deviation
    1."""

    mean: float
    std: float

    @classmethod
    def of(cls, score_B: torch.Tensor) -> "RewardScale":
        """Returns the scale with the mean and the population standard deviation of `score_B`."""
        score_B = score_B.double()
        return cls(float(score_B.mean()), float(score_B.std(unbiased=False)))

    def __call__(self, scores: Scores) -> Scores:
        """Returns normalised scores."""
        return (scores - self.mean) / max(self.std, SMALLEST_STD)


def read_reward_scale(run: RunDirectory) -> RewardScale:
    """Returns the scale that a finished run of stage reward measured.

    Raises:
        ArtefactError: the run is not finished, is of another stage, or gave every sample the same score or scores that
            are not finite.
        OSError: a file cannot be read.
    """
    if not run.result.is_file():
        raise ArtefactError(f"{run.path} is not finished (no {run.result.name}): run stage=reward to its end")
    recorded = durable.read_json(run.result).get(KEY)
    if recorded is None:
        raise ArtefactError(f"{run.result} has no {KEY}: expected a run of stage=reward")

    scale = RewardScale(float(recorded["mean"]), float(recorded["std"]))
    if not (math.isfinite(scale.mean) and math.isfinite(scale.std) and scale.std > 0):
        raise ArtefactError(
            f"{run.result}: {KEY} has mean={scale.mean} std={scale.std}: a reward model that gives every sample the "
            "same score teaches nothing; train it again (stage.lr, stage.steps) under another run_id"
        )
    return scale


@torch.no_grad()
def last_token_scores(model: Transformer, sequences: Sequence[Sequence[int]], batch: int = 16) -> np.ndarray:
    """Returns the score of each sequence at its last token, (len(sequences),) float32, without gradients.

    Args:
        model: a model with a scalar head.
        sequences: token ids of a prompt and its completion, none empty.
        batch: sequences per forward pass; sequences of similar length go together.
    """
    scores = np.zeros(len(sequences), np.float32)
    # Sequences of similar length share a batch, so that little of it is padding.
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number]))
    device = model.embedding.weight.device
    for begin in range(0, len(order), batch):
        numbers = order[begin : begin + batch]
        length_B = torch.tensor([len(sequences[number]) for number in numbers])
        tokens_BT = torch.zeros(len(numbers), int(length_B.max()), dtype=torch.int64)
        for b, number in enumerate(numbers):
            tokens_BT[b, : len(sequences[number])] = torch.tensor(sequences[number])

        # Attention is causal, so the padding after the last token does not change its score.
        score_BT = model.scores(Batch.plain(tokens_BT.to(device))).cpu()
        scores[numbers] = score_BT[torch.arange(len(numbers)), length_B - 1].numpy()
    return scores


# --- evaluation on held-out rankings ---


@dataclass(frozen=True)
class ScoredRanking:
    """Scores of the completions of a ranking, or of the two completions of a judgement."""

    source: str
    scores: np.ndarray  # (K,) float32
    ranks: np.ndarray  # (K,) the smallest is the best
    margin: float | None  # margin of a judgement; None: a ranking


@torch.no_grad()
def scores_of_rankings(
    model: Transformer,
    batches: Iterable[tuple[Batch, Sequence[PlacedRanking]]],
    device: torch.device,
    data_ranks: dist.ProcessGroup | None,
    alive: Callable[[], None] = lambda: None,
) -> dict[int, np.ndarray]:
    """Returns the scores of each ranking, (K,) float32 by its number, the same on every rank (collective).

    Args:
        data_ranks: the ranks that hold other rankings than this one.
        alive: called after every batch.

    Raises:
        MessageError: another rank has sent something else.
    """
    scores_of_rank: dict[int, np.ndarray] = {}
    for batch, placed in batches:
        score_N = model.scores(batch.to(device)).flatten().float().cpu().numpy()
        scores_of_rank |= {ranking.document: score_N[ranking.places] for ranking in placed}
        alive()

    gathered = all_gather(scores_of_rank, dict[int, np.ndarray], data_ranks)
    scores = {number: score_K for part in gathered for number, score_K in part.items()}
    return dict(sorted(scores.items()))


def scored_rankings(rankings: RankingCorpus, scores: Mapping[int, np.ndarray]) -> list[ScoredRanking]:
    """Returns scores with their ranks or judgements; each judgement becomes a ranking of two, the better completion
    first.

    Args:
        scores: (K,) by ranking number.
    """
    scored = []
    better_first = np.array([0, 1], np.uint8)
    for number, score_K in scores.items():
        source, arrays = rankings.source(number), rankings.arrays(number)
        if len(arrays.ranks):
            scored.append(ScoredRanking(source, score_K, arrays.ranks, None))
            continue
        # Judgements of a prompt need not form one order, so each is a ranking of two.
        for pair, margin in zip(arrays.judgements.astype(np.int64), arrays.margins, strict=True):
            scored.append(ScoredRanking(source, score_K[pair], better_first, float(margin)))
    return scored


def reward_metrics(scored: Sequence[ScoredRanking]) -> dict[str, float]:
    """Returns the loss and the agreement of scores with rankings.

    `val/loss` (nats per choice) is over all rankings, `val/loss_SOURCE` by source; `reward/...`: see
    `agreement_figures`.
    """
    metrics = {"val/loss": mean_loss(scored)} | agreement_figures(scored, "reward")
    for source in sorted({ranking.source for ranking in scored}):
        metrics[f"val/loss_{source}"] = mean_loss([ranking for ranking in scored if ranking.source == source])
    return metrics


def agreement_figures(scored: Sequence[ScoredRanking], prefix: str, names: Sequence[str] = FIGURES) -> dict[str, float]:
    """Returns `PREFIX/NAME` over all rankings, by source (`..._SOURCE`) and by number of completions (`..._kK`).

    All figures are in [0, 1], Kendall's tau in [-1, 1].

    Args:
        scored: at least one ranking.
        names: of FIGURES. One is missing where all completions are tied, except the calibration error, which is 0.
    """
    metrics = _figures(scored, prefix, names, "")
    for source in sorted({ranking.source for ranking in scored}):
        part = [ranking for ranking in scored if ranking.source == source]
        metrics |= _figures(part, prefix, names, f"_{source}")
    for k in sorted({len(ranking.scores) for ranking in scored}):
        part = [ranking for ranking in scored if len(ranking.scores) == k]
        metrics |= _figures(part, prefix, names, f"_k{k}")
    return metrics


def mean_loss(scored: Sequence[ScoredRanking]) -> float:
    """Returns the mean negative log-likelihood of a choice in nats: the training loss without label noise.

    A ranking of K completions has K - 1 choices, a judgement one; the margin of a judgement counts as in training.
    There must be at least one choice.
    """
    ranked = [ranking for ranking in scored if ranking.margin is None]
    judged = [ranking for ranking in scored if ranking.margin is not None]
    total, count = 0.0, float(len(judged))
    if ranked:
        score_PK, rank_PK, exists_PK = _padded(ranked)
        total += float(ranking_losses(score_PK, rank_PK, exists_PK).double().sum())
        count += float(choices(exists_PK).sum())
    if judged:
        score_P2, _, _ = _padded(judged)
        margin_P = torch.tensor([ranking.margin for ranking in judged])
        total += float(pair_losses(score_P2[:, 0], score_P2[:, 1], margin_P).double().sum())
    return total / count


def _figures(scored: Sequence[ScoredRanking], prefix: str, names: Sequence[str], suffix: str) -> dict[str, float]:
    score_PK, rank_PK, exists_PK = _padded(scored)
    figures = agreement(score_PK, rank_PK, exists_PK)
    figures["calibration_error"] = calibration_error(score_PK, rank_PK, exists_PK)
    return {f"{prefix}/{name}{suffix}": figure for name, figure in figures.items() if name in names}


def _padded(scored: Sequence[ScoredRanking]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (score_PK fp32, rank_PK int64, exists_PK bool), padded with 0 and False to the largest number of
    completions."""
    shape = (len(scored), max(len(ranking.scores) for ranking in scored))
    score_PK = torch.zeros(shape)
    rank_PK = torch.zeros(shape, dtype=torch.int64)
    exists_PK = torch.zeros(shape, dtype=torch.bool)
    for p, ranking in enumerate(scored):
        k = len(ranking.scores)
        score_PK[p, :k] = torch.from_numpy(ranking.scores)
        rank_PK[p, :k] = torch.from_numpy(ranking.ranks.astype(np.int64))
        exists_PK[p, :k] = True
    return score_PK, rank_PK, exists_PK
