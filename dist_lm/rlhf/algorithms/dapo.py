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

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dist_lm.errors import require
from dist_lm.rlhf.algorithm import (
    NOT_NEGATIVE,
    POSITIVE,
    Algorithm,
    Bounds,
    DrawnTokens,
    Experience,
    GroupKeys,
    Prepared,
    key,
)

if TYPE_CHECKING:
    import torch

    from dist_lm.rlhf.config import RlhfConfig
    from dist_lm.training.objective import LossSum

ROUNDS = Bounds(lambda value: value > 0, "a positive integer; 1: drawn once")


@dataclass
class DapoKeys(GroupKeys):
    """The keys of DAPO."""

    clip: float = key(0.2, POSITIVE)  # distance of the ratio below 1 beyond which the gain is cut off
    clip_high: float = key(0.28, POSITIVE)  # the same distance above 1
    # last tokens over which the score falls by 1; null: max_new_tokens / 5; 0: off
    overlong_tokens: int | None = key(None, NOT_NEGATIVE)
    # largest number of draws of an iteration, to replace groups whose scores are all the same
    sampling_rounds: int = key(8, ROUNDS)

    def complete(self, config: RlhfConfig) -> None:
        if self.overlong_tokens is None:
            self.overlong_tokens = config.max_new_tokens // 5  # a fifth of the limit, as in the paper
        accepted = f"at most rlhf.max_new_tokens={config.max_new_tokens}"
        require(self.overlong_tokens <= config.max_new_tokens, "rlhf.overlong_tokens", self.overlong_tokens, accepted)


def overlong_penalty(length_B: torch.Tensor, longest: int, buffer: int) -> torch.Tensor:
    """Returns 0 for completions of at most `longest` - `buffer` tokens, falling to -1 at `longest` (eq. 13), (B,).

    Args:
        length_B: tokens of each completion, fp32.
        buffer: tokens; 0: no penalty.
    """
    if not buffer:
        return length_B.new_zeros(length_B.shape)
    return ((longest - buffer - length_B) / buffer).clamp(-1, 0)


class Dapo(Algorithm):
    """Compares the rollouts of a prompt with each other; every token of the minibatch weighs the same."""

    Keys = DapoKeys
    keys: DapoKeys

    def prepare(self, experience: Experience, kl_coefficient: float) -> Prepared:
        """Returns advantages: scores with the penalty of length, minus the group's mean, over its standard deviation.

        The policy loss is a mean over completion tokens; `kl_coefficient` weighs the KL in that loss.
        """
        # imports torch, which the launcher does without
        from dist_lm.rlhf.policy_gradient import STD_EPS, group_columns, groups_of

        # The penalty is part of the score, so it moves the mean of the group too.
        length_B = experience.mask_BT.sum(1)
        penalty_B = overlong_penalty(length_B, self.config.max_new_tokens, self.keys.overlong_tokens or 0)
        score_B = experience.score_B + penalty_B

        groups = groups_of(score_B, experience.prompt_B)
        advantage_B = (score_B - groups.mean_B) / (groups.std_B + STD_EPS)

        metrics = {"overlong_penalty": float(penalty_B.double().mean())}
        return Prepared(group_columns(experience, advantage_B), length_B, kl_coefficient, metrics)

    def policy_loss(self, tokens: DrawnTokens) -> LossSum:
        """Returns the surrogate with KL penalty and entropy bonus, as a sum over tokens. The clip leaves the ratio more
        space above 1 than below."""
        from dist_lm.rlhf.policy_gradient import penalised_policy_loss

        return penalised_policy_loss(
            tokens,
            self.keys.clip,
            clip_high=self.keys.clip_high,
            entropy_coefficient=self.config.entropy_coefficient,
        )
