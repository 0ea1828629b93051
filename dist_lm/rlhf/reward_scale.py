"""Mean and spread of a reward model's scores, which mean nothing by themselves."""

from dataclasses import dataclass

import torch

SMALLEST_STD = 1e-6  # scores that are all alike stay so


@dataclass(frozen=True)
class RewardScale:
    """What maps scores of the reference policy's samples to mean 0 and standard deviation 1 (Stiennon et al. 2020)."""

    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def of(cls, score_B: torch.Tensor) -> "RewardScale":
        """Of scores of samples of the reference policy."""
        score_B = score_B.double()
        return cls(float(score_B.mean()), max(float(score_B.std(unbiased=False)), SMALLEST_STD))

    def __call__(self, score_B: torch.Tensor) -> torch.Tensor:
        """Scores, normalised."""
        return (score_B - self.mean) / self.std
