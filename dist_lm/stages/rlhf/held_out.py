"""Win rate on held-out prompts: share of prompts where the policy's answer scores above the reference's.

Both models sample at the sampling temperature with different seeds. Before the first iteration they are the same model,
so the win rate is about one half. A prompt with an answer that has no score is not compared.

Dimensions: P prompts, B scored rollouts.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dist_lm.model.transformer import Transformer
from dist_lm.rlhf.experience import add_up, end_scores
from dist_lm.rlhf.learner import RolloutSupply
from dist_lm.rlhf.models import RlhfModels, as_reference, dealing, sent_weights
from dist_lm.rlhf.reward_model import RewardScale
from dist_lm.rlhf.rewards import Scored, share_scored, total_score
from dist_lm.rlhf.rollouts import Rollouts, read_to_end
from dist_lm.stages.rlhf.stage import RlhfRunConfig
from dist_lm.stages.training.program import RankStart

log = logging.getLogger(__name__)

POLICY_SEED, REFERENCE_SEED = 1, 2  # added to the seed of the run
POLICY_VERSION, REFERENCE_VERSION = -2, -3  # weight versions for the pool, different from those of all iterations


@dataclass(frozen=True)
class HeldOut:
    """Held-out prompts on every rank, and the comparison of the answers to them."""

    config: RlhfRunConfig
    start: RankStart
    models: RlhfModels
    supply: RolloutSupply | None  # on the first rank
    prompts: Sequence[Sequence[int]]
    alive: Callable[[], None]

    def compare(self, scale: RewardScale | None) -> dict[str, float]:
        """`rlhf/win_rate` (ties count half) and the mean scores; empty if no prompt is compared (collective).

        Args:
            scale: mean and standard deviation of the reward model's scores.
        """
        if not self.prompts:
            return {}
        reference = self.models.reference or self.models.policy.model
        own = self._scores(self.models.policy.model, POLICY_VERSION, POLICY_SEED, scale)
        with as_reference(self.models):
            other = self._scores(reference, REFERENCE_VERSION, REFERENCE_SEED, scale)
        compared = ~(own.isnan() | other.isnan())
        own, other = own[compared], other[compared]
        if not len(own):
            log.warning("no held-out prompt has two answers with a score, so there is no win rate (rlhf.rewards)")
            return {}
        wins = (own > other).double() + (own == other).double() / 2
        return {
            "rlhf/win_rate": float(wins.mean()),
            "rlhf/held_out_score": float(own.double().mean()),
            "rlhf/held_out_score_reference": float(other.double().mean()),
            "rlhf/held_out": float(len(own)),
        }

    def _scores(self, model: Transformer, version: int, seed: int, scale: RewardScale | None) -> torch.Tensor:
        """Scores of the answers of `model`, (P,); NaN: none."""
        group = self.config.rlhf
        weights = sent_weights(model, self.config.parallel, self.start.world)
        judged = None
        if not self.supply:
            read_to_end(weights)
        else:
            self.supply.source.load_weights(weights, version)
            rollouts = self.supply.draw(self.prompts, 0, 1, group, self.config.seed + seed)
            judged = self.supply.judge(rollouts, expected=group.prompts * group.group)
        scored = share_scored(judged, some=False)
        score_P = torch.full((len(self.prompts),), torch.nan)
        if not scored.kept_D.any():
            return score_P
        score_P[torch.from_numpy(scored.kept_D)] = self._total(scored, scale)
        return score_P

    def _total(self, scored: Scored, scale: RewardScale | None) -> torch.Tensor:
        group, parts = self.config.rlhf, dict(scored.rule_score_B)
        if self.models.reward:
            raw_B = self._ask_reward_model(self.models.reward, scored.rollouts)
            own = [name for name, part in group.rewards.items() if part.kind == "reward_model"]
            parts |= dict.fromkeys(own, scale(raw_B) if scale else raw_B)
        whole_B = torch.from_numpy(scored.rollouts.whole)
        return total_score(parts, group.rewards, whole_B, group.missing_eos_penalty or 0.0)

    def _ask_reward_model(self, reward: Transformer, rollouts: Rollouts) -> torch.Tensor:
        mesh, device = self.start.mesh, self.start.world.device
        shares = dealing(mesh, self.config.parallel, self.config.rlhf.micro_batch_tokens)
        scores = end_scores(reward, rollouts, shares, device, self.alive)
        return add_up([scores], mesh.get_local_rank("tp") == 0)[0].cpu()
