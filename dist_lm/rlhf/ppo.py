"""Proximal policy optimization with a critic and a penalty on the divergence from the reference.

Schulman et al. (2017); for language models Ziegler et al. (2019), Stiennon et al. (2020), Ouyang et al. (2022).

Dimensions: B rollouts, T tokens of the longest completion, N drawn tokens of a micro-batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dist_lm.config.rlhf import RlhfConfig
from dist_lm.rlhf.advantages import Moments, generalised_advantages, token_rewards, whiten
from dist_lm.rlhf.algorithm import DrawnTokens, Experience, Prepared
from dist_lm.rlhf.clipped_losses import policy_loss, value_loss
from dist_lm.rlhf.kl import ESTIMATES
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
        """Rewards of tokens, their advantages and returns."""
        mask_BT, value_BT = experience.mask_BT, experience.value_BT
        assert value_BT is not None, "PPO has a critic"
        kl_BT = torch.zeros_like(mask_BT)
        if experience.reference_logprob_BT is not None:
            estimate = ESTIMATES[self.config.kl_estimate]
            kl_BT = estimate(experience.logprob_BT, experience.reference_logprob_BT) * mask_BT
        reward_BT = token_rewards(experience.score_B, kl_BT, mask_BT, kl_coefficient)
        if self.config.whiten_rewards:
            reward_BT = whiten(reward_BT, mask_BT, Moments.of(reward_BT, mask_BT), shift=False)
        found = generalised_advantages(reward_BT, value_BT, mask_BT, self.config.gamma, self.config.lam)
        advantage_BT = found.advantage_BT
        if self.config.whiten_advantages:
            advantage_BT = whiten(advantage_BT, mask_BT, Moments.of(advantage_BT, mask_BT))
        columns = {
            "old_logprob": experience.logprob_BT,
            "advantage": advantage_BT,
            "return": found.return_BT,
            "old_value": value_BT,
        }
        if experience.importance_BT is not None:
            columns["importance"] = experience.importance_BT
        return Prepared(
            columns,
            {
                "value_explained_var": explained_variance(value_BT, found.return_BT, mask_BT),
                "return_mean": float(Moments.of(found.return_BT, mask_BT).mean),
                "value_mean": float(Moments.of(value_BT, mask_BT).mean),
            },
        )

    def policy_loss(self, drawn: DrawnTokens) -> LossSum:
        """The clipped gain, and the entropy as a bonus."""
        columns = drawn.columns
        there_N = torch.ones_like(drawn.logprob_N)
        loss = policy_loss(
            drawn.logprob_N,
            columns["old_logprob"],
            columns["advantage"],
            there_N,
            self.config.clip,
            columns.get("importance"),
        )
        total = loss.total
        if self.uses_entropy:
            total = total - self.config.entropy_coefficient * drawn.entropy_N.sum()
        metrics = {
            "policy_loss": loss.total.detach(),
            "ratio_mean": loss.ratio,
            "clip_frac": loss.clipped.float(),
            "approx_kl": loss.approx_kl,
        }
        return LossSum(total, there_N.sum(), metrics)

    def value_loss(self, value_N: torch.Tensor, columns: Mapping[str, torch.Tensor]) -> LossSum:
        """The clipped squared error."""
        there_N = torch.ones_like(value_N)
        loss = value_loss(value_N, columns["old_value"], columns["return"], there_N, self.config.value_clip)
        metrics = {"value_loss": loss.total.detach(), "value_clip_frac": loss.clipped.float()}
        return LossSum(loss.total, there_N.sum(), metrics)


def explained_variance(value_BT: torch.Tensor, return_BT: torch.Tensor, mask_BT: torch.Tensor) -> float:
    """1 - Var(return - value) / Var(return): 1 where the critic knew, 0 where it said nothing; 0 if nothing varies."""
    of_return = Moments.of(return_BT, mask_BT).std
    of_error = Moments.of(return_BT - value_BT, mask_BT).std
    return float(1 - (of_error / of_return).square()) if of_return > 0 else 0.0
