"""Proximal policy optimisation with a critic and a KL penalty.

Schulman et al. (2017); for language models Ziegler et al. (2019), Stiennon et al. (2020), Ouyang et al. (2022).

Dimensions: B rollouts, T tokens of the longest completion, N completion tokens of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dist_lm.rlhf.algorithm import (
    COUNT,
    FRACTION,
    KL_ESTIMATE,
    NOT_NEGATIVE,
    POSITIVE,
    Algorithm,
    AlgorithmKeys,
    DrawnTokens,
    Experience,
    Prepared,
    key,
    one_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from dist_lm.rlhf.config import RlhfConfig
    from dist_lm.training.objective import LossSum

VALUE_RATE = 3  # the critic's learning rate / the policy's


@dataclass
class PpoKeys(AlgorithmKeys):
    """The keys of PPO."""

    epochs: int = key(4, COUNT)
    clip: float = key(0.2, POSITIVE)  # the ratio is clipped to [1 - clip, 1 + clip]
    kl_coefficient: float = key(0.05, NOT_NEGATIVE)
    kl_estimate: str = key("k1", KL_ESTIMATE)  # k1 | k2 | k3
    missing_eos_penalty: float = key(1.0, NOT_NEGATIVE)
    whiten_rewards: bool = False  # scale token rewards to standard deviation 1; the mean stays
    # the critic
    value_lr: float | None = key(None, POSITIVE)  # learning rate; null: VALUE_RATE x lr
    value_clip: float = key(0.2, POSITIVE)  # distance from the old value beyond which the loss no longer falls
    value_head: str = key("zero", one_of("zero", "reward_model"))  # head of a new critic
    # advantages
    gamma: float = key(1.0, FRACTION)  # discount per token
    lam: float = key(0.95, FRACTION)  # lambda of generalised advantage estimation
    whiten_advantages: bool = True  # to mean 0 and standard deviation 1 over all tokens of an iteration

    def complete(self, config: RlhfConfig) -> None:
        if self.value_lr is None:
            self.value_lr = float(f"{VALUE_RATE * config.lr:.9g}")  # without the last digits of a product


class Ppo(Algorithm):
    """Compares the return of each token with the value that a critic predicts."""

    Keys = PpoKeys
    keys: PpoKeys
    has_critic = True

    def prepare(self, experience: Experience, kl_coefficient: float) -> Prepared:
        """Computes the advantage and the return of each token. The reward of a token is -`kl_coefficient` times its KL;
        that of the last token also has the score.

        The policy loss is a mean over completion tokens and has no KL of its own. Columns: those of `token_columns`,
        `return` and `old_value`; metrics: explained variance of the critic, and mean return and value.
        """
        # imports torch, which the launcher does without
        from dist_lm.rlhf.policy_gradient import (
            explained_variance,
            generalised_advantages,
            mean_and_std,
            reference_kl,
            token_columns,
            token_rewards,
            whiten,
        )

        mask_BT, value_BT, keys = experience.mask_BT, experience.value_BT, self.keys
        assert value_BT is not None, "PPO has a critic"

        kl_BT = reference_kl(experience, keys.kl_estimate, self.config.largest_kl_weight)
        reward_BT = token_rewards(experience.score_B, kl_BT, mask_BT, kl_coefficient)
        if keys.whiten_rewards:
            reward_BT = whiten(reward_BT, mask_BT, shift=False)

        # The critic learns the returns as they are; only the policy sees whitened advantages.
        advantage_BT, return_BT = generalised_advantages(reward_BT, value_BT, mask_BT, keys.gamma, keys.lam)
        if keys.whiten_advantages:
            advantage_BT = whiten(advantage_BT, mask_BT)

        columns = token_columns(experience, advantage_BT) | {"return": return_BT, "old_value": value_BT}
        metrics = {
            "value_explained_var": explained_variance(value_BT, return_BT, mask_BT),
            "return_mean": float(mean_and_std(return_BT, mask_BT)[0]),
            "value_mean": float(mean_and_std(value_BT, mask_BT)[0]),
        }
        return Prepared(columns, mask_BT.sum(1), metrics=metrics)

    def policy_loss(self, tokens: DrawnTokens) -> LossSum:
        """Returns the clipped surrogate with the entropy bonus, as a sum over tokens."""
        from dist_lm.rlhf.policy_gradient import penalised_policy_loss

        return penalised_policy_loss(tokens, self.keys.clip, entropy_coefficient=self.config.entropy_coefficient)

    def value_loss(self, value_N: torch.Tensor, columns: Mapping[str, torch.Tensor]) -> LossSum:
        """Returns the clipped squared error of the values."""
        from dist_lm.rlhf.policy_gradient import clipped_value_loss

        return clipped_value_loss(value_N, columns["old_value"], columns["return"], self.keys.value_clip)
