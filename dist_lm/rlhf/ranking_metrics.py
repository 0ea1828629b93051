"""How well scores agree with rankings.

Dimensions: P prompts, K completions of each.
"""

from dataclasses import dataclass

import torch

BINS = 10  # of the calibration error: (0.5, 0.55], ... (0.95, 1]


@dataclass(frozen=True)
class Agreement:
    """Sums over prompts and pairs, so that parts of a data set can be added up."""

    pairs: float = 0.0  # of completions that are not tied
    right: float = 0.0  # of these: the better one has the larger score; half where scores are equal
    tau: float = 0.0  # Kendall's tau-b, summed over prompts
    ranked: float = 0.0  # prompts whose ranking is more than one tie
    top: float = 0.0  # of these: the largest score is one of the best's

    def __add__(self, other: "Agreement") -> "Agreement":
        return Agreement(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def metrics(self) -> dict[str, float]:
        """`accuracy`, `kendall_tau` and `top1`; nothing where nothing was ranked."""
        if not self.pairs:
            return {}
        return {
            "accuracy": self.right / self.pairs,
            "kendall_tau": self.tau / self.ranked,
            "top1": self.top / self.ranked,
        }


def agreement(score_PK: torch.Tensor, rank_PK: torch.Tensor, there_PK: torch.Tensor) -> Agreement:
    """Compare scores with ranks (the smallest is the best), over the completions that are there."""
    lead_PKK, judged_PKK = _pairs(score_PK, rank_PK, there_PK)
    order_PKK = (rank_PK[:, None, :] - rank_PK[:, :, None]).sign()  # 1 where the first one is better
    agree_PKK = lead_PKK.sign() * order_PKK
    both_PKK = there_PK[:, :, None] & there_PK[:, None, :] & _upper(score_PK.shape[1], score_PK.device)
    ranked_P = judged_PKK.flatten(1).any(1)
    # tau-b (Kendall 1945): ties on either side leave the denominator
    untied_P = (both_PKK & (lead_PKK != 0)).flatten(1).sum(1)
    tau_P = (agree_PKK * judged_PKK).flatten(1).sum(1) / (untied_P * judged_PKK.flatten(1).sum(1)).sqrt().clamp(min=1)
    best_P = rank_PK.masked_fill(~there_PK, torch.iinfo(rank_PK.dtype).max).amin(1)
    chosen_P = score_PK.masked_fill(~there_PK, -torch.inf).argmax(1)
    hit_P = rank_PK.gather(1, chosen_P[:, None])[:, 0] == best_P
    return Agreement(
        pairs=float(judged_PKK.sum()),
        right=float(((agree_PKK + 1) / 2 * judged_PKK).sum()),
        tau=float((tau_P * ranked_P).sum()),
        ranked=float(ranked_P.sum()),
        top=float((hit_P & ranked_P).sum()),
    )


def calibration_error(score_PK: torch.Tensor, rank_PK: torch.Tensor, there_PK: torch.Tensor) -> float:
    """Expected calibration error of the pairs' probabilities, in [0, 0.5] (Guo et al. 2017, equation 3).

    The probability that the one with the larger score is better (at least 0.5) against how often it is, in `BINS` bins,
    weighted by their pairs. 0 without pairs.
    """
    lead_PKK, judged_PKK = _pairs(score_PK, rank_PK, there_PK)
    order_PKK = (rank_PK[:, None, :] - rank_PK[:, :, None]).sign()
    sure_N = lead_PKK.abs().sigmoid()[judged_PKK]
    right_N = (lead_PKK.sign() * order_PKK)[judged_PKK].add(1).div(2)
    if not len(sure_N):
        return 0.0
    bin_N = ((sure_N - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    gap = torch.zeros(BINS, dtype=torch.float64).index_add(0, bin_N.cpu(), (sure_N - right_N).double().cpu())
    return float(gap.abs().sum() / len(sure_N))


def _pairs(score_PK: torch.Tensor, rank_PK: torch.Tensor, there_PK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(P, K, K): by how much the first one's score is larger, and which pairs are there, once, and not tied."""
    safe_PK = score_PK.float().where(there_PK, 0.0)
    lead_PKK = safe_PK[:, :, None] - safe_PK[:, None, :]
    there_PKK = there_PK[:, :, None] & there_PK[:, None, :]
    judged_PKK = there_PKK & (rank_PK[:, :, None] != rank_PK[:, None, :]) & _upper(score_PK.shape[1], score_PK.device)
    return lead_PKK, judged_PKK


def _upper(n: int, device: torch.device) -> torch.Tensor:
    return torch.ones(n, n, dtype=torch.bool, device=device).triu(1)
