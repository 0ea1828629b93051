"""What an algorithm of reinforcement learning is to the learner: pure functions over tokens that were drawn.

It sees no model, no batch and no layout, so it is tried with numbers; and nothing outside it knows which one runs.

Dimensions: B rollouts of an iteration, T tokens of the longest completion, N drawn tokens of a micro-batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from dist_lm.training.objective import LossSum


@dataclass(frozen=True)
class Experience:
    """What is known of an iteration's rollouts before its first update: the same on every rank.

    Completions are left-aligned; behind their end everything is 0. All fp32 but `prompt_B`.
    """

    mask_BT: torch.Tensor  # 1 on the tokens of a completion
    score_B: torch.Tensor  # weighted sum of the parts of the reward, with the penalty
    prompt_B: torch.Tensor  # int64; position of the prompt: rollouts with the same one are of one group
    logprob_BT: torch.Tensor  # nats, by the trainer's weights
    reference_logprob_BT: torch.Tensor | None  # None: there is no reference
    value_BT: torch.Tensor | None  # what the critic expects before each token; None: there is no critic
    importance_BT: torch.Tensor | None  # weight of each token; see `clipped_losses.truncated_importance`; None: 1


@dataclass(frozen=True)
class Prepared:
    """What the losses of an iteration read."""

    tokens: Mapping[str, torch.Tensor]  # columns (B, T) by name
    metrics: Mapping[str, float] = field(default_factory=dict)  # by name without group


@dataclass(frozen=True)
class DrawnTokens:
    """Drawn tokens of a micro-batch under the policy as it is now. Every completion is whole in its micro-batch."""

    logprob_N: torch.Tensor  # nats, with gradient
    entropy_N: torch.Tensor  # nats, of the distribution at each token; with gradient if `uses_entropy`
    rollout_N: torch.Tensor  # int64; which rollout they are of
    columns: Mapping[str, torch.Tensor]  # those of `Prepared`, (N,)


class Algorithm(Protocol):
    """An exchangeable part. Losses are sums over tokens, which the learner divides by all tokens of a minibatch."""

    @property
    def has_critic(self) -> bool:
        """Whether there is a value model, with a loss of its own."""
        ...

    @property
    def uses_entropy(self) -> bool:
        """Whether the policy's loss has a gradient through the entropy."""
        ...

    def prepare(self, experience: Experience, kl_coefficient: float) -> Prepared:
        """From rewards and quantities of each token to what the losses read."""
        ...

    def policy_loss(self, drawn: DrawnTokens) -> LossSum:
        """Its metrics are sums over tokens; `approx_kl` (nats, from the start of the iteration) is one of them, as the
        learner stops by it."""
        ...

    def value_loss(self, value_N: torch.Tensor, columns: Mapping[str, torch.Tensor]) -> LossSum:
        """Of the critic's values before the drawn tokens, (N,) with gradient. Called where `has_critic`."""
        ...
