"""RLOO: REINFORCE with the mean of the other rollouts as the baseline (Kool et al. 2019; Ahmadian et al. 2024).

    R_i = r_i - beta sum_t KL_t                                                 the KL is in the reward
    A_i = R_i - 1/(G - 1) sum_{j != i} R_j                                      over the G rollouts of a prompt
    L = -1/G sum_i min(q_i A_i, clip(q_i, 1 - c, 1 + c) A_i),  q_i = pi(o_i) / pi_old(o_i)

A whole completion is one action, so the ratio is of the completion. In the first update of an iteration q_i is 1 and
the gradient is that of REINFORCE; the clip, which the papers do not have, holds later updates (as in TRL).

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
    DrawnTokens,
    Experience,
    GroupKeys,
    Prepared,
    key,
)

if TYPE_CHECKING:
    from dist_lm.training.objective import LossSum


@dataclass
class RlooKeys(GroupKeys):
    """The keys of RLOO."""

    clip: float = key(0.2, POSITIVE)  # the ratio is clipped to [1 - clip, 1 + clip]
    kl_coefficient: float = key(0.05, NOT_NEGATIVE)
    kl_estimate: str = key("k1", KL_ESTIMATE)  # k1 | k2 | k3
    missing_eos_penalty: float = key(1.0, NOT_NEGATIVE)


class Rloo(Algorithm):
    """Compares each rollout with the mean of the others of its prompt; a completion is one action."""

    Keys = RlooKeys
    keys: RlooKeys
    ratio_of = "completion"

    def prepare(self, experience: Experience, kl_coefficient: float) -> Prepared:
        """Returns advantages: the score minus `kl_coefficient` times the completion's KL, relative to the mean of the
        others of the group.

        The policy loss is a mean over completions and has no KL of its own.
        """
        # imports torch, which the launcher does without
        from dist_lm.rlhf.policy_gradient import group_columns, groups_of, inverse_lengths, reference_kl

        kl_BT = reference_kl(experience, self.keys.kl_estimate, self.config.largest_kl_weight)
        reward_B = experience.score_B - kl_coefficient * kl_BT.sum(1)

        # (R_i - mean of all) G / (G - 1) equals R_i less the mean of the others.
        groups = groups_of(reward_B, experience.prompt_B)
        n_others_B = (groups.size_B - 1).clamp(min=1)
        advantage_B = (reward_B - groups.mean_B) * groups.size_B / n_others_B

        columns = group_columns(experience, advantage_B) | {"token_weight": inverse_lengths(experience.mask_BT)}
        return Prepared(columns, advantage_B.new_ones(advantage_B.shape))

    def policy_loss(self, tokens: DrawnTokens) -> LossSum:
        """Returns the clipped surrogate of each completion, its tokens weighted by its inverse length, with the entropy
        bonus."""
        from dist_lm.rlhf.policy_gradient import over_completion, penalised_policy_loss

        log_ratio_N = tokens.logprob_N - tokens.columns["old_logprob"]
        return penalised_policy_loss(
            tokens,
            self.keys.clip,
            ratio_N=over_completion(log_ratio_N, tokens.rollout_N, mean=False).exp(),
            entropy_coefficient=self.config.entropy_coefficient,
        )
