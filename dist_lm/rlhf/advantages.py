"""From rewards to advantages, over completions of unequal length.

Rows are completions, left-aligned: `mask_BT` is 1 on the tokens of a completion and 0 behind it.

Dimensions: B completions, T tokens.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Advantages:
    advantage_BT: torch.Tensor  # 0 where there is no token
    return_BT: torch.Tensor  # what values are fitted to


def token_rewards(
    score_B: torch.Tensor, kl_BT: torch.Tensor, mask_BT: torch.Tensor, kl_coefficient: float
) -> torch.Tensor:
    """The score at the last token of each completion, less the KL of every token (Ouyang et al. 2022, equation 2)."""
    reward_BT = -kl_coefficient * kl_BT * mask_BT
    last_B1 = (mask_BT.sum(1, keepdim=True) - 1).long()
    return reward_BT.scatter_add(1, last_B1, score_B[:, None].to(reward_BT.dtype))


def generalised_advantages(
    reward_BT: torch.Tensor, value_BT: torch.Tensor, mask_BT: torch.Tensor, gamma: float = 1.0, lam: float = 0.95
) -> Advantages:
    """GAE (Schulman et al. 2016, equation 16): sums of discounted surprises, from the end backwards.

    Args:
        value_BT: what is expected before each token; behind the last one it is 0.
    """
    advantage = torch.zeros_like(reward_BT[:, 0])
    next_value = torch.zeros_like(advantage)
    backwards = []
    for t in reversed(range(reward_BT.shape[1])):
        there = mask_BT[:, t]
        surprise = reward_BT[:, t] + gamma * next_value - value_BT[:, t]
        advantage = (surprise + gamma * lam * advantage) * there
        next_value = value_BT[:, t] * there
        backwards.append(advantage)
    advantage_BT = torch.stack(backwards[::-1], dim=1)
    return Advantages(advantage_BT, (advantage_BT + value_BT) * mask_BT)


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of squares: those of parts add up to those of the whole batch, over ranks as well."""

    count: torch.Tensor
    total: torch.Tensor
    squares: torch.Tensor

    @classmethod
    def of(cls, value_BT: torch.Tensor, mask_BT: torch.Tensor) -> "Moments":
        """Of the values where `mask_BT` is 1, in fp64."""
        kept = value_BT.double() * mask_BT
        return cls(mask_BT.double().sum(), kept.sum(), (kept * value_BT.double()).sum())

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> torch.Tensor:
        return self.total / self.count.clamp(min=1)

    @property
    def std(self) -> torch.Tensor:
        """Of the population, not of a sample."""
        return (self.squares / self.count.clamp(min=1) - self.mean.square()).clamp(min=0).sqrt()


def whiten(
    value_BT: torch.Tensor, mask_BT: torch.Tensor, moments: Moments, *, shift: bool = True, eps: float = 1e-8
) -> torch.Tensor:
    """Mean 0 (unless `shift` is false) and standard deviation 1 over all that `moments` counted; 0 behind the end."""
    scaled_BT = (value_BT - moments.mean) / (moments.std + eps)
    scaled_BT = scaled_BT if shift else scaled_BT + moments.mean
    return (scaled_BT * mask_BT).to(value_BT.dtype)
