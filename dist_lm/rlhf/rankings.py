"""Rankings under scores: their likelihood (Plackett-Luce) and how well the scores agree with them.

A ranking is a sequence of choices: the best completion of all, then the best of the rest, and so on, each chosen with
probability `exp(score) / sum of exp(scores of the remaining completions)` (Luce 1959; Plackett 1975). For two
completions this is the model of Bradley and Terry (1952). Tied completions are chosen in an unknown order: for the j-th
choice among m tied ones, each of them counts in the denominator with weight (1 - j / m) (Efron 1977, for tied survival
times).

Dimensions: P prompts, K completions of a prompt. `exists_PK` is False where a prompt has fewer than K completions.
`rank_PK` holds integers: the smallest is the best, equal ones are ties; only their order matters.
"""

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses

BINS = 10  # bins of the calibration error: (0.5, 0.55], ... (0.95, 1]

# --- likelihood ---


def ranking_losses(score_PK: torch.Tensor, rank_PK: torch.Tensor, exists_PK: torch.Tensor) -> torch.Tensor:
    """Returns the negative log-likelihood of every choice of a ranking, in nats, fp32, (P, K).

    The last choice has no alternative and costs 0: a prompt with K completions has K - 1 choices (`choices`). Scores of
    missing completions affect neither losses nor gradients, whatever their value.
    """
    score_PK = score_PK.float()
    worse_PKK = (rank_PK[:, None, :] > rank_PK[:, :, None]) & exists_PK[:, None, :]
    tied_PKK = (rank_PK[:, None, :] == rank_PK[:, :, None]) & exists_PK[:, None, :]

    # Efron: of m tied completions, each weighs (1 - j / m) in the denominator of the j-th choice.
    before_PK = tied_PKK.tril(-1).sum(-1)  # tied completions that stand before this one
    tie_weight_PK = 1 - before_PK / tied_PKK.sum(-1).clamp(min=1)
    weight_PKK = worse_PKK + tied_PKK * tie_weight_PK[:, :, None]

    # The row of a missing completion weighs only itself, so that its logarithm is finite; a missing score may be NaN,
    # and 0 * NaN is NaN.
    weight_PKK = weight_PKK.where(exists_PK[:, :, None], torch.eye(score_PK.shape[1], device=score_PK.device))
    safe_PK = score_PK.where(exists_PK, 0.0)
    denominator_PK = torch.logsumexp(safe_PK[:, None, :] + weight_PKK.log(), dim=-1)
    return (denominator_PK - safe_PK) * exists_PK


def choices(exists_PK: torch.Tensor) -> torch.Tensor:
    """Returns the number of choices of every prompt, one fewer than its completions, (P,) int64."""
    return (exists_PK.sum(-1) - 1).clamp(min=0)


def pair_losses(winner_N: torch.Tensor, loser_N: torch.Tensor, margin_N: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the negative log-likelihood of judgements between two completions, nats, fp32, (N,): Bradley and Terry.

    Args:
        margin_N: least difference by which the winner's score should be larger (Touvron et al. 2023, eq. 2).
    """
    lead_N = winner_N.float() - loser_N.float()
    if margin_N is not None:
        lead_N = lead_N - margin_N
    return -F.logsigmoid(lead_N)


def remaining(rank_PK: torch.Tensor, exists_PK: torch.Tensor) -> torch.Tensor:
    """Returns which completions a choice leaves, (P, K, K) bool: the worse ones, and tied ones at later places."""
    worse_PKK = rank_PK[:, None, :] > rank_PK[:, :, None]
    tied_PKK = rank_PK[:, None, :] == rank_PK[:, :, None]
    return (worse_PKK | tied_PKK.triu(1)) & exists_PK[:, None, :] & exists_PK[:, :, None]


def right_choices(score_PK: torch.Tensor, rank_PK: torch.Tensor, exists_PK: torch.Tensor) -> torch.Tensor:
    """Returns how many of the K - 1 choices of each ranking score above all worse completions, summed, scalar."""
    worse_PKK = (rank_PK[:, None, :] > rank_PK[:, :, None]) & exists_PK[:, None, :]
    left_PK = remaining(rank_PK, exists_PK).sum(-1)
    best_PK = score_PK[:, None, :].masked_fill(~worse_PKK, -torch.inf).amax(-1)
    return ((score_PK > best_PK) & exists_PK & (left_PK > 0)).sum()


# --- agreement ---


def agreement(score_PK: torch.Tensor, rank_PK: torch.Tensor, exists_PK: torch.Tensor) -> dict[str, float]:
    """Returns the agreement of scores with ranks over the completions that exist; empty if all of them are tied.

    `accuracy`: share of the untied pairs whose better completion has the larger score; equal scores count half.
    `kendall_tau`: tau-b (Kendall 1945), mean over the prompts whose completions are not all tied.
    `top1`: share of these prompts where one of the best completions has the largest score.
    """
    lead_PKK, judged_PKK = _pairs(score_PK, rank_PK, exists_PK)
    order_PKK = (rank_PK[:, None, :] - rank_PK[:, :, None]).sign()  # 1 where the first completion is better
    agree_PKK = lead_PKK.sign() * order_PKK
    ranked_P = judged_PKK.flatten(1).any(1)

    # tau-b: pairs that are tied on either side leave the denominator
    pair_PKK = exists_PK[:, :, None] & exists_PK[:, None, :] & _upper(score_PK.shape[1], score_PK.device)
    untied_P = (pair_PKK & (lead_PKK != 0)).flatten(1).sum(1)
    judged_P = judged_PKK.flatten(1).sum(1)
    tau_P = (agree_PKK * judged_PKK).flatten(1).sum(1) / (untied_P * judged_P).sqrt().clamp(min=1)

    best_P = rank_PK.masked_fill(~exists_PK, torch.iinfo(rank_PK.dtype).max).amin(1)
    chosen_P = score_PK.masked_fill(~exists_PK, -torch.inf).argmax(1)
    hit_P = rank_PK.gather(1, chosen_P[:, None])[:, 0] == best_P

    pairs, ranked = float(judged_PKK.sum()), float(ranked_P.sum())
    if not pairs:
        return {}
    return {
        "accuracy": float(((agree_PKK + 1) / 2 * judged_PKK).sum()) / pairs,
        "kendall_tau": float((tau_P * ranked_P).sum()) / ranked,
        "top1": float((hit_P & ranked_P).sum()) / ranked,
    }


def calibration_error(score_PK: torch.Tensor, rank_PK: torch.Tensor, exists_PK: torch.Tensor) -> float:
    """Returns the expected calibration error of the pair probabilities, in [0, 0.5]; 0 without pairs.

    Guo et al. 2017, eq. 3. The probability that the completion with the larger score is better is compared with how
    often it is, in `BINS` bins weighted by their number of pairs.
    """
    lead_PKK, judged_PKK = _pairs(score_PK, rank_PK, exists_PK)
    order_PKK = (rank_PK[:, None, :] - rank_PK[:, :, None]).sign()
    confidence_N = lead_PKK.abs().sigmoid()[judged_PKK]
    right_N = (lead_PKK.sign() * order_PKK)[judged_PKK].add(1).div(2)
    if not len(confidence_N):
        return 0.0

    bin_N = ((confidence_N - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    gaps = (confidence_N - right_N).double().cpu()
    gap_of_bin = torch.zeros(BINS, dtype=torch.float64).index_add(0, bin_N.cpu(), gaps)
    return float(gap_of_bin.abs().sum() / len(confidence_N))


def _pairs(score_PK: torch.Tensor, rank_PK: torch.Tensor, exists_PK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns, for completions i and j of each prompt, score i minus score j (float32), and which pairs count (bool).

    Both have shape (P, K, K). A pair counts once, at i < j, if both completions exist and their ranks differ; either
    may be the better one. The score of a completion that does not exist is taken as 0.
    """
    safe_PK = score_PK.float().where(exists_PK, 0.0)
    lead_PKK = safe_PK[:, :, None] - safe_PK[:, None, :]
    there_PKK = exists_PK[:, :, None] & exists_PK[:, None, :]
    judged_PKK = there_PKK & (rank_PK[:, :, None] != rank_PK[:, None, :]) & _upper(score_PK.shape[1], score_PK.device)
    return lead_PKK, judged_PKK


def _upper(n: int, device: torch.device) -> torch.Tensor:
    return torch.ones(n, n, dtype=torch.bool, device=device).triu(1)
