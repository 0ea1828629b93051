"""From logits to a token: pure functions, and randomness keyed by row.

Dimensions: B rows, V vocabulary.
"""

from dataclasses import dataclass

import torch

from dist_lm.errors import ConfigError
from dist_lm.model.counter_hash import hash_grid, hash_words


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, and how many. Filters apply in the order temperature, top-k, top-p."""

    max_new_tokens: int = 128
    temperature: float = 1.0  # 0: greedy, whatever the filters
    top_k: int = 0  # only the k most likely tokens; 0: off
    top_p: float = 1.0  # only the fewest tokens that hold this much probability; 1: off

    def __post_init__(self) -> None:
        for key, holds, accepted in (
            ("max_new_tokens", self.max_new_tokens > 0, "a positive integer"),
            ("temperature", self.temperature >= 0, ">= 0 (0 is greedy)"),
            ("top_k", self.top_k >= 0, ">= 0 (0 is off)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
        ):
            if not holds:
                raise ConfigError(f"{key}={getattr(self, key)}: expected {accepted}")


def keep_top_k(logits_BV: torch.Tensor, k: int) -> torch.Tensor:
    """Logits with all but the k largest of each row at -inf; ties with the k-th stay. k = 0 keeps all."""
    if k == 0 or k >= logits_BV.shape[-1]:
        return logits_BV
    smallest_B1 = logits_BV.topk(k, dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < smallest_B1, float("-inf"))


def keep_top_p(logits_BV: torch.Tensor, p: float) -> torch.Tensor:
    """Nucleus filter (Holtzman et al. 2020): the likeliest tokens up to the one at which their sum reaches p.

    The rest is at -inf; the most likely token always stays. p = 1 keeps all.
    """
    if p >= 1:
        return logits_BV
    descending_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    probability_BV = descending_BV.softmax(dim=-1)
    before_BV = probability_BV.cumsum(dim=-1) - probability_BV
    before_BV[:, 0] = 0  # rounding must not drop the first
    return logits_BV.masked_fill((before_BV >= p).gather(1, order_BV.argsort(dim=-1)), float("-inf"))


def gumbel_noise(seed_B: torch.Tensor, position_B: torch.Tensor, n_columns: int) -> torch.Tensor:
    """Standard Gumbel noise (B, n_columns) fp32: a function of (seed, position, column) alone.

    Args:
        seed_B, position_B: int64.
    """
    column_V = torch.arange(n_columns, device=seed_B.device)
    bits_BV = hash_grid(hash_words(seed_B, position_B), hash_words(0, column_V))
    uniform_BV = (bits_BV.double() + 2.0**31 + 0.5) / 2.0**32  # in (0, 1)
    return -(-uniform_BV.log()).log().float()


def choose(
    logits_BV: torch.Tensor, params: SamplingParams, seed_B: torch.Tensor, position_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row, and its log-probability.

    A row's token depends on its own logits, seed and position, not on the other rows: the largest of logit
    + Gumbel noise is a sample of the softmax (Maddison et al. 2014), and small rounding of the logits
    rarely changes it.

    Args:
        logits_BV: any float dtype.
        seed_B: int64; one a request.
        position_B: int64; place of the new token in its sequence.

    Returns:
        token_B int64, and its log-probability fp32 in nats under the tempered logits before the filters
        (greedy: under the logits themselves). With no filter this is the probability it was drawn with.
    """
    logits_BV = logits_BV.float()
    if params.temperature == 0:
        token_B = logits_BV.argmax(dim=-1)
    else:
        logits_BV = logits_BV / params.temperature
        allowed_BV = keep_top_p(keep_top_k(logits_BV, params.top_k), params.top_p)
        token_B = (allowed_BV + gumbel_noise(seed_B, position_B, logits_BV.shape[-1])).argmax(dim=-1)
    return token_B, logits_BV.log_softmax(dim=-1).gather(1, token_B[:, None])[:, 0]
