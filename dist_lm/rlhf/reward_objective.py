"""The objective of a reward model: how likely the choices of people are under its scores.

Dimensions: B sequences, T tokens, P rankings, K completions, N judgements.
"""

import torch

from dist_lm.data.batch import Batch
from dist_lm.rlhf.plackett_luce import choices, pair_losses, ranking_losses
from dist_lm.training.objective import LossModel, LossSum


def choices_of_people(model: LossModel, batch: Batch) -> LossSum:
    """Negative log-likelihood of all choices of a batch of rankings, in nats, and their number.

    A ranking of K is K - 1 choices (Plackett and Luce), a judgement is one (Bradley and Terry), so the trainer's
    division by the global count weighs every choice alike, whatever ranking it is from. `train/accuracy`: the share of
    choices after which nothing is left that is worse and has a larger score.
    """
    ranked = batch.ranked
    assert ranked is not None, "a batch of rankings"
    score_N = model.scores(batch, learns_offset=False).flatten()  # only differences have a likelihood
    score_PK = score_N[ranked.place_PK]
    better_N, worse_N = score_N[ranked.better_N], score_N[ranked.worse_N]
    losses_PK = ranking_losses(score_PK, ranked.rank_PK, ranked.there_PK)
    losses_N = pair_losses(better_N, worse_N, ranked.margin_N)
    count = choices(ranked.there_PK).sum() + len(ranked.margin_N)
    with torch.no_grad():
        right = _chosen_first(score_PK, ranked.rank_PK, ranked.there_PK) + (better_N > worse_N).sum()
    return LossSum(
        total=losses_PK.sum() + losses_N.sum(), count=count.float(), metrics={"train/accuracy": right.float()}
    )


def _chosen_first(score_PK: torch.Tensor, rank_PK: torch.Tensor, there_PK: torch.Tensor) -> torch.Tensor:
    """How many choices, of the K - 1 of each ranking, have no larger score among what is worse."""
    worse_PKK = (rank_PK[:, None, :] > rank_PK[:, :, None]) & there_PK[:, None, :]
    tied_PKK = (rank_PK[:, None, :] == rank_PK[:, :, None]) & there_PK[:, None, :]
    left_PK = worse_PKK.sum(-1) + tied_PKK.triu(1).sum(-1)  # behind it, of a tie in the order in which they stand
    best_PK = score_PK[:, None, :].masked_fill(~worse_PKK, -torch.inf).amax(-1)
    return ((score_PK > best_PK) & there_PK & (left_PK > 0)).sum()
