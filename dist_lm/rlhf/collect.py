"""From rollouts to experience: what frozen weights and rules say of them, the same on every rank.

Dimensions: B rollouts, T tokens of the longest completion.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dist_lm.config.rlhf import RlhfConfig
from dist_lm.model.transformer import Transformer
from dist_lm.rlhf.algorithm import Experience
from dist_lm.rlhf.beside import Beside, one_after_other
from dist_lm.rlhf.clipped_losses import truncated_importance
from dist_lm.rlhf.forwards import OwnShare, add_up, end_scores
from dist_lm.rlhf.models import RlhfModels
from dist_lm.rlhf.packed_rollouts import Dealing, RolloutBatch, completion_mask
from dist_lm.rlhf.reward_scale import RewardScale
from dist_lm.rlhf.rewards import total_score
from dist_lm.rlhf.rollouts import Rollouts
from dist_lm.training.forward import BoundModel

REWARD_MODEL = "reward_model"


@dataclass(frozen=True)
class Collected:
    """An iteration's experience, with what is only looked at."""

    experience: Experience
    entropy_BT: torch.Tensor  # nats, of the policy that is about to be trained
    engine_logprob_BT: torch.Tensor  # nats, as the rollouts say
    part_B: Mapping[str, torch.Tensor]  # score of each part of the reward, by name
    reward_scale: RewardScale | None


@dataclass(frozen=True)
class Collector:
    """How this rank looks at rollouts."""

    config: RlhfConfig
    models: RlhfModels
    chunk_bytes: int  # largest block of fp32 logits; 0: no limit
    counts: bool  # of the ranks that see the same rollouts, this is the one whose sums count
    dealing: Dealing  # of whole rollouts, for the reward model
    device: torch.device
    alive: Callable[[], None] = lambda: None  # called before every forward, from any thread
    beside: Beside = one_after_other  # how models of tokens and models of scores are asked

    def __call__(
        self,
        rollouts: Rollouts,
        rule_score_B: Mapping[str, torch.Tensor],
        batches: Sequence[RolloutBatch],
        reward_scale: RewardScale | None,
    ) -> Collected:
        """Ask all models (collective).

        Args:
            rule_score_B: scores of the parts that are rules.
            batches: this rank's micro-batches of all rollouts, each in one of them. Let them be those that the first
                update sees: both then round alike, and its ratio is 1.
            reward_scale: None: the scores of these rollouts give it, which the reference policy drew.
        """
        mask_BT = torch.from_numpy(completion_mask(rollouts)).to(self.device)
        found = self._ask(rollouts, batches, mask_BT.shape[1])
        engine_BT = torch.zeros(mask_BT.shape, device=self.device)
        engine_BT[mask_BT] = torch.from_numpy(rollouts.logprobs_M).to(self.device)
        part_B = {name: score.to(self.device) for name, score in rule_score_B.items()}
        if "score" in found:
            raw_B = found["score"]
            if reward_scale is None and self.config.normalise_reward:
                reward_scale = RewardScale.of(raw_B)
            own = [name for name, part in self.config.rewards.items() if part.kind == REWARD_MODEL]
            part_B |= dict.fromkeys(own, reward_scale(raw_B) if reward_scale else raw_B)
        whole_B = torch.from_numpy(rollouts.whole).to(self.device)
        importance_BT = None
        if self.config.importance_cap:
            importance_BT = truncated_importance(found["logprob"], engine_BT, self.config.importance_cap)
        experience = Experience(
            mask_BT=mask_BT.float(),
            score_B=total_score(part_B, self.config.rewards, whole_B, self.config.missing_eos_penalty),
            prompt_B=torch.from_numpy(rollouts.position_B).to(self.device),
            logprob_BT=found["logprob"],
            reference_logprob_BT=found.get("reference"),
            value_BT=found.get("value"),
            importance_BT=importance_BT,
        )
        return Collected(experience, found["entropy"], engine_BT, part_B, reward_scale)

    def _ask(self, rollouts: Rollouts, batches: Sequence[RolloutBatch], longest: int) -> dict[str, torch.Tensor]:
        share = OwnShare(batches, len(rollouts), longest, self.alive)
        models, temperature = self.models, self.config.temperature

        def of_tokens() -> dict[str, torch.Tensor]:
            found = {}
            found["logprob"], found["entropy"] = share.logprobs(self._bound(models.policy.model), temperature)
            if models.reference:
                found["reference"], _ = share.logprobs(self._bound(models.reference), temperature)
            return found

        def of_scores() -> dict[str, torch.Tensor]:
            found = {}
            if models.critic:
                found["value"] = share.values(self._bound(models.critic.model))
            if models.reward:
                bound = self._bound(models.reward)
                found["score"] = end_scores(bound, rollouts, self.dealing, self.device, self.alive)
            return found

        tokens, scores = self.beside(of_tokens, of_scores)
        found = tokens | scores
        return dict(zip(found, add_up(list(found.values()), self.counts), strict=True))

    def _bound(self, model: Transformer) -> BoundModel:
        return BoundModel(model, document_mask=True, chunk_bytes=self.chunk_bytes)
