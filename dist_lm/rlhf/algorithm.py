"""The contract of an RLHF algorithm: pure functions over the completion tokens of an iteration.

An algorithm sees no model, no batch and no layout, so tests give it plain tensors. The learner calls every algorithm
through this contract and knows none by name.

Dimensions: B rollouts of an iteration, T tokens of the longest completion, N completion tokens of a micro-batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from dist_lm.config.rlhf import RlhfConfig
from dist_lm.training.objective import LossSum


@dataclass(frozen=True)
class Experience:
    """The rollouts of an iteration as seen before its first update, the same on every rank.

    Completions are left-aligned and every tensor is 0 on padding. All are fp32 except `prompt_B`.
    """

    mask_BT: torch.Tensor  # 1 on the tokens of a completion
    score_B: torch.Tensor  # weighted sum of the reward parts, penalty included
    prompt_B: torch.Tensor  # int64; position of the prompt: rollouts of one prompt form a group
    logprob_BT: torch.Tensor  # nats, by the trainer's weights
    reference_logprob_BT: torch.Tensor | None  # None: there is no reference model
    value_BT: torch.Tensor | None  # the critic's value before each token; None: there is no critic
    importance_BT: torch.Tensor | None  # weight of each token, see `policy_gradient.truncated_importance`; None: 1


@dataclass(frozen=True)
class Prepared:
    """Inputs of the losses of an iteration."""

    tokens: Mapping[str, torch.Tensor]  # columns (B, T) by name
    count_B: torch.Tensor  # fp32; what each rollout adds to the divisor of the policy loss of a minibatch
    kl_coefficient: float = 0.0  # weight of the KL in the policy loss; 0: the algorithm has it in its rewards
    metrics: Mapping[str, float] = field(default_factory=dict)  # by name, without the `rlhf/` group


@dataclass(frozen=True)
class DrawnTokens:
    """Completion tokens of a micro-batch under the current policy. A micro-batch holds whole completions."""

    logprob_N: torch.Tensor  # nats, with gradient
    entropy_N: torch.Tensor  # nats, of the distribution at each token; with gradient if `uses_entropy`
    rollout_N: torch.Tensor  # int64; the rollout of each token
    columns: Mapping[str, torch.Tensor]  # the columns of `Prepared`, (N,)
    kl_coefficient: float = 0.0  # of `Prepared`


class Algorithm(Protocol):
    """Losses are sums over tokens. The learner divides the policy loss by the `count_B` of the minibatch's rollouts,
    and the value loss and all metrics but `policy_loss` by their completion tokens."""

    @property
    def has_critic(self) -> bool:
        """Whether the algorithm trains a value model with a loss of its own."""
        ...

    @property
    def uses_entropy(self) -> bool:
        """Whether the gradient of the policy loss goes through the entropy."""
        ...

    def prepare(self, experience: Experience, kl_coefficient: float) -> Prepared:
        """From rewards and per-token quantities to the inputs of the losses."""
        ...

    def policy_loss(self, drawn: DrawnTokens) -> LossSum:
        """Loss of the policy; its count is the number of tokens. Its metrics are sums over tokens: `policy_loss`, the
        total without bonuses, and `approx_kl`, nats between the policy at the start of the iteration and now, which the
        learner compares with rlhf.stop_kl."""
        ...

    def value_loss(self, value_N: torch.Tensor, columns: Mapping[str, torch.Tensor]) -> LossSum:
        """Loss of the critic's values before the completion tokens, (N,) with gradient. Called if `has_critic`."""
        ...


@dataclass(frozen=True)
class WithoutCritic:
    """The part that algorithms without a critic share."""

    config: RlhfConfig
    has_critic = False

    @property
    def uses_entropy(self) -> bool:
        return self.config.entropy_coefficient > 0

    def value_loss(self, value_N: torch.Tensor, columns: Mapping[str, torch.Tensor]) -> LossSum:
        raise NotImplementedError(f"{type(self).__name__} has no critic")
