"""GSPO: group sequence policy optimisation (Zheng et al. 2025).

    A_i = (r_i - mean(r)) / (std(r) + 1e-4)                      as in GRPO, eq. 6
    s_i = (pi(o_i) / pi_old(o_i))^(1/|o_i|)                      the geometric mean of the token ratios, eq. 7
    L = -1/G sum_i min(s_i A_i, clip(s_i, 1 - c, 1 + c_high) A_i)    eq. 5

A whole completion is kept or clipped. The geometric mean of many ratios stays near 1, so the clip is about a thousandth
of that of GRPO: the paper's 3e-4 and 4e-4 (section 5.1) are for long completions; short ones need more.

Dimensions: N completion tokens of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dist_lm.rlhf.algorithm import NOT_NEGATIVE, POSITIVE, DrawnTokens, GroupKeys, key
from dist_lm.rlhf.algorithms.grpo import Grpo

if TYPE_CHECKING:
    from dist_lm.training.objective import LossSum


@dataclass
class GspoKeys(GroupKeys):
    """The keys of GSPO."""

    clip: float = key(3e-4, POSITIVE)  # distance of the ratio below 1 beyond which the gain is cut off
    clip_high: float = key(4e-4, POSITIVE)  # the same distance above 1
    missing_eos_penalty: float = key(1.0, NOT_NEGATIVE)


class Gspo(Grpo):
    """Shares `prepare` with GRPO: the advantages and the weights of the tokens are the same."""

    Keys = GspoKeys
    keys: GspoKeys
    ratio_of = "mean"

    def policy_loss(self, tokens: DrawnTokens) -> LossSum:
        """Returns the clipped surrogate of each completion, its tokens weighted by its inverse length, with the KL
        penalty if rlhf.kl_coefficient is above 0 and the entropy bonus."""
        # imports torch, which the launcher does without
        from dist_lm.rlhf.policy_gradient import over_completion, penalised_policy_loss

        log_ratio_N = tokens.logprob_N - tokens.columns["old_logprob"]
        return penalised_policy_loss(
            tokens,
            self.keys.clip,
            clip_high=self.keys.clip_high,
            ratio_N=over_completion(log_ratio_N, tokens.rollout_N, mean=True).exp(),
            entropy_coefficient=self.config.entropy_coefficient,
        )
