"""GRPO: group relative policy optimisation (Shao et al. 2024, DeepSeekMath, section 4.1).

    A_i = (r_i - mean(r)) / (std(r) + 1e-4)     over the G rollouts of a prompt, section 4.1.2
    L = -1/G sum_i 1/|o_i| sum_t (min(q A_i, clip(q, 1 - c, 1 + c) A_i) - beta KL),  q = pi / pi_old     eq. 3

The mean is over completions, so a token of a short completion weighs more. KL: see `penalised_policy_loss`.

Dimensions: B rollouts, T tokens of the longest completion, N completion tokens of a micro-batch.
"""

import torch

from dist_lm.config.rlhf import given
from dist_lm.rlhf.algorithm import DrawnTokens, Experience, Prepared, WithoutCritic
from dist_lm.rlhf.policy_gradient import (
    STD_EPS,
    completion_shares,
    group_columns,
    groups_of,
    penalised_policy_loss,
)
from dist_lm.training.objective import LossSum


class Grpo(WithoutCritic):
    """An `Algorithm`."""

    def prepare(self, experience: Experience, kl_coefficient: float) -> Prepared:
        """Scores relative to the group; a completion counts 1, whatever its length."""
        groups = groups_of(experience.score_B, experience.prompt_B)
        advantage_B = (experience.score_B - groups.mean_B) / (groups.std_B + STD_EPS)
        columns = group_columns(experience, advantage_B) | {"share": completion_shares(experience.mask_BT)}
        return Prepared(columns, torch.ones_like(advantage_B), kl_coefficient)

    def policy_loss(self, drawn: DrawnTokens) -> LossSum:
        """The clipped surrogate of each token with the KL penalty."""
        return penalised_policy_loss(
            drawn, given(self.config.clip), entropy_coefficient=self.config.entropy_coefficient
        )
