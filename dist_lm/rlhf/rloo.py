"""RLOO: REINFORCE with the mean of the other rollouts as the baseline (Kool et al. 2019; Ahmadian et al. 2024).

    R_i = r_i - beta sum_t KL_t                                                 the KL is in the reward
    A_i = R_i - 1/(G - 1) sum_{j != i} R_j                                      over the G rollouts of a prompt
    L = -1/G sum_i min(q_i A_i, clip(q_i, 1 - c, 1 + c) A_i),  q_i = pi(o_i) / pi_old(o_i)

A whole completion is one action, so the ratio is of the completion. In the first update of an iteration q_i is 1 and
the gradient is that of REINFORCE; the clip, which the papers do not have, holds later updates (as in TRL).

Dimensions: B rollouts, T tokens of the longest completion, N completion tokens of a micro-batch.
"""

import torch

from dist_lm.config.rlhf import given
from dist_lm.rlhf.algorithm import DrawnTokens, Experience, Prepared, WithoutCritic
from dist_lm.rlhf.policy_gradient import (
    completion_shares,
    group_columns,
    groups_of,
    over_completion,
    penalised_policy_loss,
    reference_kl,
)
from dist_lm.training.objective import LossSum


class Rloo(WithoutCritic):
    """An `Algorithm`."""

    def prepare(self, experience: Experience, kl_coefficient: float) -> Prepared:
        """Rewards less the mean of the others of the group; a completion counts 1. A group of one has advantage 0."""
        kl_BT = reference_kl(experience, given(self.config.kl_estimate))
        reward_B = experience.score_B - kl_coefficient * kl_BT.sum(1)
        groups = groups_of(reward_B, experience.prompt_B)
        others_B = (groups.size_B - 1).clamp(min=1)
        advantage_B = (reward_B - groups.mean_B) * groups.size_B / others_B  # = reward - mean of the others
        columns = group_columns(experience, advantage_B) | {"share": completion_shares(experience.mask_BT)}
        return Prepared(columns, torch.ones_like(advantage_B))

    def policy_loss(self, drawn: DrawnTokens) -> LossSum:
        """The clipped surrogate of each completion."""
        log_ratio_N = drawn.logprob_N - drawn.columns["old_logprob"]
        ratio_N = over_completion(log_ratio_N, drawn.rollout_N, mean=False).exp()
        clip, entropy = given(self.config.clip), self.config.entropy_coefficient
        return penalised_policy_loss(drawn, clip, ratio_N=ratio_N, entropy_coefficient=entropy)
