"""Measurements of stage `rlhf` beside training: the win rate on held-out prompts, and the tasks of `stage.eval_tasks`.

Dimensions: P prompts, D rollouts drawn, B of these that have a score.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import adds_sums
from dist_lm.rlhf.controller import Records, RolloutController
from dist_lm.rlhf.experience import add_up, end_scores, with_signs_of_life
from dist_lm.rlhf.models import RlhfModels, as_reference, dealing, sent_weights
from dist_lm.rlhf.reward_model import RewardScale
from dist_lm.rlhf.rewards import UsableRollouts, share_usable, total_score
from dist_lm.rlhf.rollouts import Rollouts, read_to_end
from dist_lm.rlhf.schedule import draws_rollouts
from dist_lm.stages.rlhf.config import RlhfRunConfig
from dist_lm.stages.training.eval_tasks import Evaluated
from dist_lm.stages.training.program import RankStart
from dist_lm.training.heartbeat import Phase

log = logging.getLogger(__name__)

POLICY_SEED, REFERENCE_SEED = 1, 2  # added to the seed of the run
POLICY_VERSION, REFERENCE_VERSION = -2, -3  # weight versions for the pool, different from those of all iterations

# --- win rate ---


@dataclass(frozen=True)
class HeldOut:
    """Held-out prompts on every rank, and the comparison of the answers to them.

    The win rate is the share of prompts where the policy's answer scores above the reference's. Both models sample at
    the sampling temperature with different seeds. Before the first iteration they are the same model, so the win rate
    is about one half. A prompt with an answer that has no score is not compared.
    """

    config: RlhfRunConfig
    start: RankStart
    models: RlhfModels
    controller: RolloutController | None  # on the first rank
    prompts: Sequence[Any]  # token ids of each, or the tasks of an environment
    alive: Callable[[], None]
    drawing: Callable[[], AbstractContextManager[None]] = nullcontext  # entered while engines draw answers

    def compare(self, scale: RewardScale | None) -> dict[str, float]:
        """Returns `rlhf/win_rate` (ties count half), the mean scores and the number of prompts compared (collective).

        Empty if no prompt is compared. The weights of the source of rollouts change.

        Args:
            scale: mean and standard deviation of the reward model's scores; None: raw scores.

        Raises:
            RewardError: rules failed on too many answers.
            UserError, PoolFailure: of the source, see `RolloutSource`.
        """
        if not self.prompts:
            return {}

        reference = self.models.reference or self.models.policy.model
        policy_P = self._scores(self.models.policy.model, POLICY_VERSION, POLICY_SEED, scale)
        with as_reference(self.models):
            reference_P = self._scores(reference, REFERENCE_VERSION, REFERENCE_SEED, scale)

        has_both_P = ~(policy_P.isnan() | reference_P.isnan())
        policy_P, reference_P = policy_P[has_both_P], reference_P[has_both_P]
        if not len(policy_P):
            log.warning("no held-out prompt has two answers with a score, so there is no win rate (rlhf.rewards)")
            return {}
        win_P = (policy_P > reference_P).double() + (policy_P == reference_P).double() / 2
        return {
            "rlhf/win_rate": float(win_P.mean()),
            "rlhf/held_out_score": float(policy_P.double().mean()),
            "rlhf/held_out_score_reference": float(reference_P.double().mean()),
            "rlhf/held_out": float(len(policy_P)),
        }

    def _scores(self, model: Transformer, version: int, seed: int, scale: RewardScale | None) -> torch.Tensor:
        """Returns the scores of the answers of `model`, (P,) fp32 on the CPU; NaN where there is none (collective).

        It loads the weights of `model` into the source of rollouts.

        Raises:
            RewardError: rules failed on too many answers.
            UserError, PoolFailure: of the source, see `RolloutSource`.
        """
        weights = sent_weights(model, self.config.parallel, self.start.world)
        judged = None
        with self.drawing():
            if self.controller:
                judged = self.controller.answers(version, weights, self.config.seed + seed)
            else:
                read_to_end(weights)
            # Unlike in training, no answer may have a score: then there is just no win rate.
            usable = share_usable(judged, some=False, has_reward_model=self.models.reward is not None)
        score_P = torch.full((len(self.prompts),), torch.nan)
        if usable.kept_D.any():
            score_P[torch.from_numpy(usable.kept_D)] = self._total(usable, scale)
        return score_P

    def _total(self, usable: UsableRollouts, scale: RewardScale | None) -> torch.Tensor:
        """Returns the weighted sum of all parts, (B,)."""
        group, score_of_part = self.config.rlhf, dict(usable.rule_score_B)
        if self.models.reward:
            raw_B = self._reward_model_scores(self.models.reward, usable.rollouts)
            parts_of_model = [name for name, part in group.rewards.items() if part.kind == "reward_model"]
            score_of_part |= dict.fromkeys(parts_of_model, scale(raw_B) if scale else raw_B)
        ended_B = torch.from_numpy(usable.rollouts.ended)
        return total_score(score_of_part, group.rewards, ended_B, group.missing_eos_penalty or 0.0)

    def _reward_model_scores(self, reward: Transformer, rollouts: Rollouts) -> torch.Tensor:
        mesh, device = self.start.mesh, self.start.world.device
        shares = dealing(mesh, self.config.parallel, self.config.rlhf.micro_batch_tokens)
        score_B = end_scores(reward, rollouts, shares, device, partial(with_signs_of_life, alive=self.alive))
        return add_up([score_B], adds_sums(mesh))[0].cpu()


# --- tasks ---


@dataclass(frozen=True)
class TasksOfIterations:
    """Evaluates tasks after iterations, with the engines that draw rollouts and their weights.

    With staleness 0 the engines answer between two iterations. Otherwise they answer after the rollouts that are asked
    for, while the ranks train. A checkpoint waits for the figures of its iteration. All methods are collective.
    """

    parts: Evaluated
    staleness: int
    _open: dict[int, Callable[[], Records]] = field(default_factory=dict)  # iteration -> records, in their order

    def reached(self, iteration: int, controller: RolloutController | None) -> None:
        """Lets the engines answer the tasks that are due after `iteration` iterations (collective). With staleness 0 it
        waits for the figures and writes them, and on the first rank it raises what the evaluation has raised.
        Otherwise `before_checkpoint` does all of this later.

        Args:
            controller: the controller on the first rank; None on the others.
        """
        parts, due = self.parts, self.parts.tasks.due(iteration)
        if not due:
            return
        began = time.perf_counter()
        parts.heartbeat.beat(Phase.EVALUATING, iteration)

        # The learner has pushed the weights of this iteration, unless they draw no rollouts.
        has_weights = draws_rollouts(iteration, self.staleness, parts.tasks.steps)
        weights = None
        if not has_weights:
            weights = parts.weights(receives=controller is not None)
        if controller:
            self._open[iteration] = controller.evaluate(due, iteration, weights)
        elif weights:
            read_to_end(weights)

        if not self.staleness:
            self.before_checkpoint(time.perf_counter() - began)

    def before_checkpoint(self, waited_s: float | None = None) -> None:
        """Waits for the figures of all iterations so far, and writes them (collective).

        It raises, on the first rank, what an evaluation has raised.

        Args:
            waited_s: see `Evaluated.write`.
        """
        # A run that continues from the checkpoint does not answer these tasks again.
        for iteration, records in self._open.items():
            self.parts.write(iteration, records(), waited_s)
        self._open.clear()
        dist.barrier()
