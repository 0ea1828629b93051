"""REINFORCE++: advantages whitened over the whole batch, neither a critic nor a group (Hu 2025, section 3).

    A_t = r - beta sum_{s >= t} KL_s                       return of token t: the KL of each token is in the reward
    A_t <- (A_t - mean(A)) / std(A)                        over all tokens of all rollouts of the iteration
    L = -1/tokens sum min(q A_t, clip(q, 1 - c, 1 + c) A_t),  q = pi / pi_old

The baseline is that of the batch, so one rollout of a prompt is enough, and a prompt whose rollouts score alike still
gives a gradient. With several prompts of different difficulty the groups of GRPO or RLOO have less variance.

Dimensions: B rollouts, T tokens of the longest completion, N completion tokens of a micro-batch.
"""

from dist_lm.config.rlhf import given
from dist_lm.rlhf.algorithm import DrawnTokens, Experience, Prepared, WithoutCritic
from dist_lm.rlhf.policy_gradient import (
    mean_and_std,
    penalised_policy_loss,
    reference_kl,
    rewards_to_come,
    token_columns,
    token_rewards,
    whiten,
)
from dist_lm.training.objective import LossSum


class ReinforcePp(WithoutCritic):
    """An `Algorithm`."""

    def prepare(self, experience: Experience, kl_coefficient: float) -> Prepared:
        """Returns of the tokens, whitened over the iteration; a completion counts its tokens."""
        mask_BT = experience.mask_BT
        kl_BT = reference_kl(experience, given(self.config.kl_estimate))
        return_BT = rewards_to_come(token_rewards(experience.score_B, kl_BT, mask_BT, kl_coefficient), mask_BT)
        metrics = {"return_mean": float(mean_and_std(return_BT, mask_BT)[0])}
        return Prepared(token_columns(experience, whiten(return_BT, mask_BT)), mask_BT.sum(1), metrics=metrics)

    def policy_loss(self, drawn: DrawnTokens) -> LossSum:
        """The clipped surrogate of each token."""
        clip, entropy = given(self.config.clip), self.config.entropy_coefficient
        return penalised_policy_loss(drawn, clip, entropy_coefficient=entropy)
