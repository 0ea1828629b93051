"""How likely a ranking is under scores: the Plackett-Luce model.

A ranking is a row of choices: the best of all, then the best of the rest, and so on, each with probability
`exp(score) / sum of exp(scores still there)` (Luce 1959; Plackett 1975). Of two completions that is Bradley and Terry's
model (1952), to the last bit of the formula. Tied completions are chosen in an order that nobody knows: each of m of
them has in its denominator what is left of the tie on average, (1 - j / m) of it for the j-th choice (Efron 1977,
for tied survival times).

Dimensions: P prompts, K completions of each.
"""

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses


def ranking_losses(score_PK: torch.Tensor, rank_PK: torch.Tensor, there_PK: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of every choice in a ranking, in nats, fp32, (P, K).

    Args:
        rank_PK: integers; the smallest is the best, equal ones are ties. Only their order counts.
        there_PK: bool; False where a prompt has fewer completions than K. Nothing of these reaches any loss.

    The last choice leaves nothing to choose and costs 0: a prompt with K completions has K - 1 choices
    (`choices`).
    """
    score_PK = score_PK.float()
    worse_PKK = (rank_PK[:, None, :] > rank_PK[:, :, None]) & there_PK[:, None, :]
    tied_PKK = (rank_PK[:, None, :] == rank_PK[:, :, None]) & there_PK[:, None, :]
    before_PK = tied_PKK.tril(-1).sum(-1)  # of the same tie, in the order in which they stand
    left_PK = 1 - before_PK / tied_PKK.sum(-1).clamp(min=1)
    weight_PKK = worse_PKK + tied_PKK * left_PK[:, :, None]
    weight_PKK = weight_PKK.where(there_PK[:, :, None], torch.eye(score_PK.shape[1], device=score_PK.device))
    # a score that is not there may be anything: it must not turn 0 into a number that is none
    safe_PK = score_PK.where(there_PK, 0.0)
    rest_PK = torch.logsumexp(safe_PK[:, None, :] + weight_PKK.log(), dim=-1)
    return (rest_PK - safe_PK) * there_PK


def choices(there_PK: torch.Tensor) -> torch.Tensor:
    """Choices of every prompt: one fewer than its completions, (P,) int64."""
    return (there_PK.sum(-1) - 1).clamp(min=0)


def pair_losses(winner_N: torch.Tensor, loser_N: torch.Tensor, margin_N: torch.Tensor | None = None) -> torch.Tensor:
    """Negative log-likelihood of judgements between two, in nats, fp32, (N,): Bradley and Terry's model.

    Args:
        margin_N: by how much the winner's score should be larger, at least (Touvron et al. 2023, equation 2).
    """
    lead_N = winner_N.float() - loser_N.float()
    return -F.logsigmoid(lead_N if margin_N is None else lead_N - margin_N)
