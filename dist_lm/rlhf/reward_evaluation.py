"""How a reward model judges held-out rankings: loss and agreement, over all, by number of completions and by source.

A judgement between two counts as a ranking of two.

Dimensions: P rankings, K completions of the largest.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from dist_lm.data.batch import Batch
from dist_lm.data.rankings.assemble import PlacedRanking
from dist_lm.data.rankings.mapped import MappedRankings
from dist_lm.document import Verdict
from dist_lm.rlhf.plackett_luce import choices, pair_losses, ranking_losses
from dist_lm.rlhf.ranking_metrics import agreement, calibration_error
from dist_lm.training.objective import LossModel

FIGURES = ("accuracy", "kendall_tau", "top1", "calibration_error")


@dataclass(frozen=True)
class ScoredRanking:
    """The scores of a ranking's completions beside what was judged: all of it, or one judgement."""

    source: str
    scores: np.ndarray  # (K,) float32
    ranks: np.ndarray  # (K,) the smallest is the best
    margin: float | None  # of a judgement; None: there are ranks


@torch.no_grad()
def scores_of_rankings(
    model: LossModel,
    batches: Iterable[tuple[Batch, Sequence[PlacedRanking]]],
    device: torch.device,
    group: dist.ProcessGroup | None,
    alive: Callable[[], None] = lambda: None,
) -> dict[int, np.ndarray]:
    """Every completion's score, (K,) float32 by number of the ranking, the same on every rank (collective).

    Args:
        group: the ranks that have other rankings than this one.
        alive: called after every batch.
    """
    own: dict[int, np.ndarray] = {}
    for batch, placed in batches:
        score_N = model.scores(batch.to(device)).flatten().float().cpu().numpy()
        own |= {one.document: score_N[one.places] for one in placed}
        alive()
    gathered: list[dict[int, np.ndarray]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(gathered, own, group=group)
    found = {number: scores for part in gathered for number, scores in part.items()}
    return dict(sorted(found.items()))


def beside_verdicts(rankings: MappedRankings, scores: Mapping[int, np.ndarray]) -> list[ScoredRanking]:
    """The scores of rankings with what was judged."""
    return [
        one
        for number, own in scores.items()
        for one in _of_verdict(rankings.source(number), own, rankings.verdict(number))
    ]


def _of_verdict(source: str, scores: np.ndarray, verdict: Verdict) -> list[ScoredRanking]:
    if len(verdict.ranks):
        return [ScoredRanking(source, scores, verdict.ranks, None)]
    pair = np.array([0, 1], np.uint8)
    return [
        ScoredRanking(source, scores[places], pair, float(margin))
        for places, margin in zip(verdict.judgements.astype(np.int64), verdict.margins, strict=True)
    ]


def reward_metrics(scored: Sequence[ScoredRanking]) -> dict[str, float]:
    """`val/loss` (nats a choice) and `reward/FIGURE`, also `..._SOURCE`, and `reward/FIGURE_kK` by completions."""
    metrics = {"val/loss": mean_loss(scored)} | _figures(scored, "")
    for source in sorted({one.source for one in scored}):
        part = [one for one in scored if one.source == source]
        metrics |= {f"val/loss_{source}": mean_loss(part)} | _figures(part, f"_{source}")
    for k in sorted({len(one.scores) for one in scored}):
        metrics |= _figures([one for one in scored if len(one.scores) == k], f"_k{k}")
    return metrics


def mean_loss(scored: Sequence[ScoredRanking]) -> float:
    """Negative log-likelihood in nats of a choice: what training minimises, without label noise."""
    ranked = [one for one in scored if one.margin is None]
    judged = [one for one in scored if one.margin is not None]
    total, count = 0.0, float(len(judged))
    if ranked:
        score_PK, rank_PK, there_PK = _padded(ranked)
        total += float(ranking_losses(score_PK, rank_PK, there_PK).double().sum())
        count += float(choices(there_PK).sum())
    if judged:
        score_P2, _, _ = _padded(judged)
        margin_P = torch.tensor([one.margin for one in judged])
        total += float(pair_losses(score_P2[:, 0], score_P2[:, 1], margin_P).double().sum())
    return total / count


def _figures(scored: Sequence[ScoredRanking], suffix: str) -> dict[str, float]:
    tensors = _padded(scored)
    found = agreement(*tensors).metrics() | {"calibration_error": calibration_error(*tensors)}
    return {f"reward/{name}{suffix}": found[name] for name in FIGURES}


def _padded(scored: Sequence[ScoredRanking]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(score_PK, rank_PK, there_PK)."""
    shape = (len(scored), max(len(one.scores) for one in scored))
    score_PK, rank_PK = torch.zeros(shape), torch.zeros(shape, dtype=torch.int64)
    there_PK = torch.zeros(shape, dtype=torch.bool)
    for p, one in enumerate(scored):
        k = len(one.scores)
        score_PK[p, :k] = torch.from_numpy(one.scores)
        rank_PK[p, :k] = torch.from_numpy(one.ranks.astype(np.int64))
        there_PK[p, :k] = True
    return score_PK, rank_PK, there_PK
