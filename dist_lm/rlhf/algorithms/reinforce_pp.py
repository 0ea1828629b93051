"""REINFORCE++: advantages whitened over the whole batch, neither a critic nor a group (Hu 2025, section 3).

    A_t = r - beta sum_{s >= t} KL_s                       return of token t: the KL of each token is in the reward
    A_t <- (A_t - mean(A)) / std(A)                        over all tokens of all rollouts of the iteration
    L = -1/tokens sum min(q A_t, clip(q, 1 - c, 1 + c) A_t),  q = pi / pi_old

The baseline is that of the batch, so one rollout of a prompt is enough, and a prompt whose rollouts score alike still
gives a gradient. With several prompts of different difficulty the groups of GRPO or RLOO have less variance.

Dimensions: B rollouts, T tokens of the longest completion, N completion tokens of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dist_lm.rlhf.algorithm import (
    KL_ESTIMATE,
    NOT_NEGATIVE,
    POSITIVE,
    Algorithm,
    AlgorithmKeys,
    DrawnTokens,
    Experience,
    Prepared,
    key,
)

if TYPE_CHECKING:
    from dist_lm.training.objective import LossSum


@dataclass
class ReinforcePpKeys(AlgorithmKeys):
    """The keys of REINFORCE++."""

    clip: float = key(0.2, POSITIVE)  # the ratio is clipped to [1 - clip, 1 + clip]
    kl_coefficient: float = key(0.01, NOT_NEGATIVE)
    kl_estimate: str = key("k1", KL_ESTIMATE)  # k1 | k2 | k3
    missing_eos_penalty: float = key(1.0, NOT_NEGATIVE)


class ReinforcePp(Algorithm):
    """Compares the return of each token with those of the whole iteration."""

    Keys = ReinforcePpKeys
    keys: ReinforcePpKeys

    def prepare(self, experience: Experience, kl_coefficient: float) -> Prepared:
        """Returns advantages: the rewards from each token on, whitened over all tokens of the iteration.

        A reward is the score at the last token minus `kl_coefficient` times the KL. The policy loss is a mean over
        completion tokens and has no KL of its own.
        """
        # imports torch, which the launcher does without
        from dist_lm.rlhf.policy_gradient import (
            mean_and_std,
            reference_kl,
            rewards_to_come,
            token_columns,
            token_rewards,
            whiten,
        )

        mask_BT = experience.mask_BT
        kl_BT = reference_kl(experience, self.keys.kl_estimate, self.config.largest_kl_weight)
        reward_BT = token_rewards(experience.score_B, kl_BT, mask_BT, kl_coefficient)
        return_BT = rewards_to_come(reward_BT, mask_BT)

        # Whitening subtracts the mean of the iteration, which is the baseline.
        metrics = {"return_mean": float(mean_and_std(return_BT, mask_BT)[0])}
        return Prepared(token_columns(experience, whiten(return_BT, mask_BT)), mask_BT.sum(1), metrics=metrics)

    def policy_loss(self, tokens: DrawnTokens) -> LossSum:
        """Returns the clipped surrogate with the entropy bonus, as a sum over tokens."""
        from dist_lm.rlhf.policy_gradient import penalised_policy_loss

        return penalised_policy_loss(tokens, self.keys.clip, entropy_coefficient=self.config.entropy_coefficient)
