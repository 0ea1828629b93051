"""Dr. GRPO: GRPO without its biases of length and of difficulty (Liu et al. 2025, section 3).

    A_i = r_i - mean(r)                                                         over the G rollouts of a prompt
    L = -1/(G M) sum_i sum_t min(q A_i, clip(q, 1 - c, 1 + c) A_i),  q = pi / pi_old, M = rlhf.max_new_tokens

Two changes to GRPO. The division by 1/|o_i| made the tokens of a long wrong completion weigh less, so wrong completions
grew; here every token weighs 1/M, a constant (listing 1 of the paper; `loss_type=dr_grpo` of TRL). The
division by std(r) made prompts that are nearly always or nearly never answered weigh more than the others.

Dimensions: B rollouts, T tokens of the longest completion, N completion tokens of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dist_lm.rlhf.algorithm import NOT_NEGATIVE, POSITIVE, Algorithm, DrawnTokens, Experience, GroupKeys, Prepared, key

if TYPE_CHECKING:
    from dist_lm.training.objective import LossSum


@dataclass
class DrGrpoKeys(GroupKeys):
    """The keys of Dr. GRPO."""

    clip: float = key(0.2, POSITIVE)  # the ratio is clipped to [1 - clip, 1 + clip]
    missing_eos_penalty: float = key(1.0, NOT_NEGATIVE)


class DrGrpo(Algorithm):
    """Compares the rollouts of a prompt with each other; every token weighs the same constant."""

    Keys = DrGrpoKeys
    keys: DrGrpoKeys

    def prepare(self, experience: Experience, kl_coefficient: float) -> Prepared:
        """Returns advantages: scores minus the group's mean.

        The policy loss is a sum over tokens, divided by rlhf.max_new_tokens for each completion; `kl_coefficient`
        weighs the KL in that loss.
        """
        # imports torch, which the launcher does without
        from dist_lm.rlhf.policy_gradient import group_columns, groups_of

        advantage_B = experience.score_B - groups_of(experience.score_B, experience.prompt_B).mean_B
        divisor_B = advantage_B.new_full(advantage_B.shape, self.config.max_new_tokens)
        return Prepared(group_columns(experience, advantage_B), divisor_B, kl_coefficient)

    def policy_loss(self, tokens: DrawnTokens) -> LossSum:
        """Returns the clipped surrogate with KL penalty and entropy bonus, where these are on, as a sum over tokens."""
        from dist_lm.rlhf.policy_gradient import penalised_policy_loss

        return penalised_policy_loss(tokens, self.keys.clip, entropy_coefficient=self.config.entropy_coefficient)
