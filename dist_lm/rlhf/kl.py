"""How far a policy has gone from its reference: estimates a token, and the weight that holds it back.

Estimates are by Schulman, 'Approximating KL divergence' (2020), of KL(policy || reference) from tokens the policy drew.

Dimensions: B sequences, T tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

Estimate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def k1(policy_BT: torch.Tensor, reference_BT: torch.Tensor) -> torch.Tensor:
    """From log-probabilities of drawn tokens: unbiased, of either sign."""
    return policy_BT - reference_BT


def k2(policy_BT: torch.Tensor, reference_BT: torch.Tensor) -> torch.Tensor:
    """Half the square: biased, never negative, little spread."""
    return (policy_BT - reference_BT).square() / 2


def k3(policy_BT: torch.Tensor, reference_BT: torch.Tensor) -> torch.Tensor:
    """Unbiased and never negative."""
    log_ratio_BT = reference_BT - policy_BT
    return log_ratio_BT.expm1() - log_ratio_BT


ESTIMATES: dict[str, Estimate] = {"k1": k1, "k2": k2, "k3": k3}


@dataclass(frozen=True)
class KlController:
    """The weight of the KL in the reward; adaptive as in Ziegler et al. (2019), section 2.2. A value, not a process."""

    coefficient: float
    target: float | None = None  # nats a sequence; None: the coefficient stays
    horizon: int = 10_000  # sequences within which it may change by 20 % of itself, about

    def after(self, kl: float, sequences: int) -> "KlController":
        """With what `sequences` rollouts of mean divergence `kl` (nats a sequence) have shown."""
        if self.target is None:
            return self
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return replace(self, coefficient=self.coefficient * (1 + error * sequences / self.horizon))
