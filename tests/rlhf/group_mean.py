"""Another algorithm: a completion against the mean of the others of its prompt (Kool et al. 2019)."""

from collections.abc import Mapping

import torch

from dist_lm.rlhf.algorithm import DrawnTokens, Experience, Prepared
from dist_lm.training.objective import LossSum


class GroupMean:
    """An `Algorithm` with neither critic nor clip."""

    has_critic = False
    uses_entropy = False

    def prepare(self, experience: Experience, kl_coefficient: float) -> Prepared:
        same_BB = (experience.prompt_B[:, None] == experience.prompt_B[None]).float()
        others_B = same_BB.sum(1) - 1
        baseline_B = (same_BB @ experience.score_B - experience.score_B) / others_B
        advantage_BT = (experience.score_B - baseline_B)[:, None] * experience.mask_BT
        return Prepared(
            {"advantage": advantage_BT, "old": experience.logprob_BT}, {"others_mean": float(others_B.mean())}
        )

    def policy_loss(self, drawn: DrawnTokens) -> LossSum:
        gain = (drawn.logprob_N * drawn.columns["advantage"]).sum()
        moved = (drawn.columns["old"] - drawn.logprob_N).detach().sum()
        return LossSum(-gain, torch.tensor(float(len(drawn.logprob_N))), {"approx_kl": moved})

    def value_loss(self, value_N: torch.Tensor, columns: Mapping[str, torch.Tensor]) -> LossSum:
        raise NotImplementedError
