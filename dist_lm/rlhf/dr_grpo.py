"""Dr. GRPO: GRPO without its biases of length and of difficulty (Liu et al. 2025, section 3).

    A_i = r_i - mean(r)                                                         over the G rollouts of a prompt
    L = -1/(G M) sum_i sum_t min(q A_i, clip(q, 1 - c, 1 + c) A_i),  q = pi / pi_old, M = rlhf.max_new_tokens

Two changes to GRPO. The division by 1/|o_i| made the tokens of a long wrong completion weigh less, so wrong completions
grew; here every token weighs 1/M, a constant (listing 1 of the paper; `loss_type=dr_grpo` of TRL). The
division by std(r) made prompts that are nearly always or nearly never answered weigh more than the others.

Dimensions: B rollouts, T tokens of the longest completion, N completion tokens of a micro-batch.
"""

import torch

from dist_lm.config.rlhf import given
from dist_lm.rlhf.algorithm import DrawnTokens, Experience, Prepared, WithoutCritic
from dist_lm.rlhf.policy_gradient import group_columns, groups_of, penalised_policy_loss
from dist_lm.training.objective import LossSum


class DrGrpo(WithoutCritic):
    """An `Algorithm`."""

    def prepare(self, experience: Experience, kl_coefficient: float) -> Prepared:
        """Scores less the group's mean; a completion counts rlhf.max_new_tokens, however many tokens it has."""
        advantage_B = experience.score_B - groups_of(experience.score_B, experience.prompt_B).mean_B
        count_B = torch.full_like(advantage_B, self.config.max_new_tokens)
        return Prepared(group_columns(experience, advantage_B), count_B, kl_coefficient)

    def policy_loss(self, drawn: DrawnTokens) -> LossSum:
        """The clipped surrogate of each token, with the KL penalty if rlhf.kl_coefficient is above 0."""
        clip, entropy = given(self.config.clip), self.config.entropy_coefficient
        return penalised_policy_loss(drawn, clip, entropy_coefficient=entropy)
