"""Proximal policy optimisation with a critic and a KL penalty.

Schulman et al. (2017); for language models Ziegler et al. (2019), Stiennon et al. (2020), Ouyang et al. (2022).

Dimensions: B rollouts, T tokens of the longest completion, N completion tokens of a micro-batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from dist_lm.config.rlhf import RlhfConfig, given
from dist_lm.rlhf.algorithm import DrawnTokens, Experience, Prepared
from dist_lm.rlhf.policy_gradient import (
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    generalised_advantages,
    mean_and_std,
    reference_kl,
    token_rewards,
    whiten,
)
from dist_lm.training.objective import LossSum


@dataclass(frozen=True)
class Ppo:
    """An `Algorithm`."""

    config: RlhfConfig

    @property
    def has_critic(self) -> bool:
        return True

    @property
    def uses_entropy(self) -> bool:
        return self.config.entropy_coefficient > 0

    def prepare(self, experience: Experience, kl_coefficient: float) -> Prepared:
        """Token rewards, their advantages and returns."""
        mask_BT, value_BT = experience.mask_BT, experience.value_BT
        assert value_BT is not None, "PPO has a critic"
        kl_BT = reference_kl(experience, given(self.config.kl_estimate))
        reward_BT = token_rewards(experience.score_B, kl_BT, mask_BT, kl_coefficient)
        if self.config.whiten_rewards:
            reward_BT = whiten(reward_BT, mask_BT, shift=False)
        advantage_BT, return_BT = generalised_advantages(
            reward_BT, value_BT, mask_BT, given(self.config.gamma), given(self.config.lam)
        )
        if self.config.whiten_advantages:
            advantage_BT = whiten(advantage_BT, mask_BT)
        columns = {
            "old_logprob": experience.logprob_BT,
            "advantage": advantage_BT,
            "return": return_BT,
            "old_value": value_BT,
        }
        if experience.importance_BT is not None:
            columns["importance"] = experience.importance_BT
        metrics = {
            "value_explained_var": explained_variance(value_BT, return_BT, mask_BT),
            "return_mean": float(mean_and_std(return_BT, mask_BT)[0]),
            "value_mean": float(mean_and_std(value_BT, mask_BT)[0]),
        }
        return Prepared(columns, mask_BT.sum(1), metrics=metrics)

    def policy_loss(self, drawn: DrawnTokens) -> LossSum:
        """The clipped surrogate, minus the weighted entropy as a bonus."""
        columns = drawn.columns
        loss = clipped_policy_loss(
            drawn.logprob_N,
            columns["old_logprob"],
            columns["advantage"],
            given(self.config.clip),
            columns.get("importance"),
        )
        if not self.uses_entropy:
            return loss
        return replace(loss, total=loss.total - self.config.entropy_coefficient * drawn.entropy_N.sum())

    def value_loss(self, value_N: torch.Tensor, columns: Mapping[str, torch.Tensor]) -> LossSum:
        """The clipped squared error."""
        return clipped_value_loss(value_N, columns["old_value"], columns["return"], given(self.config.value_clip))
