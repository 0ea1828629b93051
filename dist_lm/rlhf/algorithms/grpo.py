"""GRPO: group relative policy optimisation (Shao et al. 2024, DeepSeekMath, section 4.1).

    A_i = (r_i - mean(r)) / (std(r) + 1e-4)     over the G rollouts of a prompt, section 4.1.2
    L = -1/G sum_i 1/|o_i| sum_t (min(q A_i, clip(q, 1 - c, 1 + c) A_i) - beta KL),  q = pi / pi_old     eq. 3

The mean is over completions, so a token of a short completion weighs more. KL: see `penalised_policy_loss`.

Dimensions: B rollouts, T tokens of the longest completion, N completion tokens of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dist_lm.rlhf.algorithm import NOT_NEGATIVE, POSITIVE, Algorithm, DrawnTokens, Experience, GroupKeys, Prepared, key

if TYPE_CHECKING:
    from dist_lm.training.objective import LossSum


@dataclass
class GrpoKeys(GroupKeys):
    """The keys of GRPO."""

    clip: float = key(0.2, POSITIVE)  # the ratio is clipped to [1 - clip, 1 + clip]
    kl_coefficient: float = key(0.04, NOT_NEGATIVE)
    missing_eos_penalty: float = key(1.0, NOT_NEGATIVE)


class Grpo(Algorithm):
    """Compares the rollouts of a prompt with each other, without a critic."""

    Keys = GrpoKeys
    keys: GrpoKeys

    def prepare(self, experience: Experience, kl_coefficient: float) -> Prepared:
        """Returns advantages: scores minus the group's mean, over its standard deviation.

        The policy loss is a mean over completions, each a mean over its tokens; `kl_coefficient` weighs the KL in that
        loss.
        """
        # imports torch, which the launcher does without
        from dist_lm.rlhf.policy_gradient import STD_EPS, group_columns, groups_of, inverse_lengths

        groups = groups_of(experience.score_B, experience.prompt_B)
        advantage_B = (experience.score_B - groups.mean_B) / (groups.std_B + STD_EPS)
        columns = group_columns(experience, advantage_B) | {"token_weight": inverse_lengths(experience.mask_BT)}
        return Prepared(columns, advantage_B.new_ones(advantage_B.shape), kl_coefficient)

    def policy_loss(self, tokens: DrawnTokens) -> LossSum:
        """Returns the clipped surrogate of each token with KL penalty and entropy bonus, a sum weighted per token."""
        from dist_lm.rlhf.policy_gradient import penalised_policy_loss

        return penalised_policy_loss(tokens, self.keys.clip, entropy_coefficient=self.config.entropy_coefficient)
