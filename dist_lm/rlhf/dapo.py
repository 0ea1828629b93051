"""DAPO: GRPO with a higher upper clip, a mean over tokens, a soft limit of length, and sampling again (Yu et al. 2025).

    r_i <- r_i + P(|o_i|)                                                                          eq. 13
    A_i = (r_i - mean(r)) / (std(r) + 1e-4)                                                        eq. 9
    L = -1/(sum_i |o_i|) sum_i sum_t min(q A_i, clip(q, 1 - c, 1 + c_high) A_i),  q = pi / pi_old   eq. 8

    P(n) = 0 up to L tokens, then it falls linearly to -1 at rlhf.max_new_tokens; L = max_new_tokens - overlong_tokens

The higher upper clip leaves room to tokens that are unlikely so far (section 3.1). Prompts whose rollouts all score
alike give no gradient and are replaced by others before the length counts (section 3.2, `rlhf.sampling_rounds`). The
mean over tokens lets each token weigh the same, whatever the length of its completion (section 3.3). There is no KL
(section 2.3) unless rlhf.kl_coefficient is above 0.

Dimensions: B rollouts, T tokens of the longest completion, N completion tokens of a micro-batch.
"""

import torch

from dist_lm.config.rlhf import given
from dist_lm.rlhf.algorithm import DrawnTokens, Experience, Prepared, WithoutCritic
from dist_lm.rlhf.policy_gradient import STD_EPS, group_columns, groups_of, penalised_policy_loss
from dist_lm.training.objective import LossSum


def overlong_penalty(length_B: torch.Tensor, longest: int, buffer: int) -> torch.Tensor:
    """0 for completions of at most `longest` - `buffer` tokens, falling to -1 at `longest` (Yu et al. 2025, eq. 13).

    Args:
        buffer: tokens; 0: no penalty.
    """
    if not buffer:
        return torch.zeros_like(length_B)
    return ((longest - buffer - length_B) / buffer).clamp(-1, 0)


class Dapo(WithoutCritic):
    """An `Algorithm`."""

    def prepare(self, experience: Experience, kl_coefficient: float) -> Prepared:
        """Scores with the penalty of length, relative to the group; a completion counts its tokens."""
        length_B = experience.mask_BT.sum(1)
        penalty_B = overlong_penalty(length_B, self.config.max_new_tokens, given(self.config.overlong_tokens))
        score_B = experience.score_B + penalty_B
        groups = groups_of(score_B, experience.prompt_B)
        advantage_B = (score_B - groups.mean_B) / (groups.std_B + STD_EPS)
        metrics = {"overlong_penalty": float(penalty_B.double().mean())}
        return Prepared(group_columns(experience, advantage_B), length_B, kl_coefficient, metrics)

    def policy_loss(self, drawn: DrawnTokens) -> LossSum:
        """The surrogate of each token, clipped further away above 1 than below."""
        return penalised_policy_loss(
            drawn,
            given(self.config.clip),
            clip_high=given(self.config.clip_high),
            entropy_coefficient=self.config.entropy_coefficient,
        )
