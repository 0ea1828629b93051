"""The RLHF loop: prompts, rollouts, rewards, updates, new weights for generation. It depends on no algorithm or layout.

take judged rollouts (first rank) -> share -> forward passes of all models -> prepare -> updates -> push weights
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh

from dist_lm.config.parallel import ParallelConfig
from dist_lm.config.rlhf import RlhfConfig
from dist_lm.errors import ConfigError
from dist_lm.generation.decoder import WeightStream
from dist_lm.generation.request import SamplingParams
from dist_lm.parallel.mesh import World
from dist_lm.rlhf.algorithm import Algorithm, Prepared
from dist_lm.rlhf.experience import Collected, collect
from dist_lm.rlhf.models import Beside, Execution, RlhfModels, dealing, one_after_other, sent_weights
from dist_lm.rlhf.packed_rollouts import Passes
from dist_lm.rlhf.policy_gradient import groups_of, k1, mean_and_std
from dist_lm.rlhf.rewards import REWARD_MODEL, Judge, Scored, share_scored
from dist_lm.rlhf.rollouts import (
    PromptOrder,
    Rollouts,
    RolloutSource,
    read_to_end,
    requests_of,
    rollouts_of,
)
from dist_lm.rlhf.sampling_again import SamplingAgain
from dist_lm.rlhf.schedule import Drawn, RolloutSchedule, is_drawn_by
from dist_lm.rlhf.state import RlhfState
from dist_lm.rlhf.update import Pretraining, Updater, Updates
from dist_lm.training.heartbeat import StopRequest
from dist_lm.training.optimizer import learning_rate, set_learning_rate
from dist_lm.training.step_meter import WallLaps
from dist_lm.training.trainer import is_due

QUANTILES = (10, 50, 90)  # of the scores, in percent


@dataclass(frozen=True)
class IterationReport:
    """Results of an iteration, the same on every rank."""

    iteration: int  # number of finished iterations
    metrics: Mapping[str, float]
    updates: Sequence[Mapping[str, float]]  # metrics of each update, without the `rlhf/` group
    rollouts: Rollouts  # those with a score
    part_B: Mapping[str, torch.Tensor]  # scores of the reward parts
    score_B: torch.Tensor  # their weighted sum, penalty included


@dataclass(frozen=True)
class RolloutSupply:
    """What only the first rank has: prompts, the source of completions, and the rules."""

    source: RolloutSource
    prompts: PromptOrder
    judge: Judge
    stop_tokens: tuple[int, ...] = ()  # that end a completion, besides end-of-text; not with rlhf.ignore_eot

    def draw(
        self, prompts: Sequence[Sequence[int]], position: int, samples: int, config: RlhfConfig, seed: int
    ) -> Rollouts:
        """`samples` completions of each prompt.

        Args:
            position: of the first prompt in the order of prompts.
        """
        params = SamplingParams(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            stop_tokens=() if config.ignore_eot else self.stop_tokens,
            ignore_eot=config.ignore_eot,
        )
        requests = requests_of(prompts, position, samples, params, seed)
        return rollouts_of(requests, self.source.generate(requests, self.judge.begin))


class IterationTasks(Protocol):
    """What is measured after iterations, with the engines that draw rollouts (collective)."""

    def reached(self, iteration: int, schedule: RolloutSchedule | None) -> None:
        """So many iterations are done; `schedule`: on the first rank."""

    def before_checkpoint(self) -> None:
        """Called before each checkpoint."""


@dataclass(frozen=True)
class Learner:
    """The parts of an RLHF run on one rank."""

    config: RlhfConfig
    seed: int
    iterations: int  # of the whole run
    world: World
    mesh: DeviceMesh
    parallel: ParallelConfig
    models: RlhfModels
    algorithm: Algorithm
    supply: RolloutSupply | None  # on the first rank
    pretraining: Pretraining | None = None
    save_every: int = 0  # iterations; 0: only at the end
    save: Callable[[RlhfState], None] = lambda state: None  # on every rank; only the first has pending rollouts
    report: Callable[[IterationReport], None] = lambda report: None  # on every rank
    tasks: IterationTasks | None = None
    alive: Callable[[], None] = lambda: None  # called on progress, from any thread
    beside: Beside = one_after_other  # how the work of policy and critic is run
    stop: StopRequest = field(default_factory=StopRequest)

    def __post_init__(self) -> None:
        parts = [name for name, part in self.config.rewards.items() if part.kind == REWARD_MODEL]
        if not self.config.rewards:
            raise ConfigError("rlhf.rewards={}: expected at least one part whose weight is not 0")
        if bool(parts) != (self.models.reward is not None):
            raise ConfigError(f"rlhf.rewards: parts of kind reward_model are {parts}; expected one with a reward model")
        if self.config.kl_coefficient and self.models.reference is None:
            raise ConfigError(f"rlhf.kl_coefficient={self.config.kl_coefficient}: expected 0 without a reference")
        if self.config.pretrain_coefficient and self.pretraining is None:
            coefficient = self.config.pretrain_coefficient
            raise ConfigError(f"rlhf.pretrain_coefficient={coefficient}: expected 0 without pretraining text")
        assert self.algorithm.has_critic == (self.models.critic is not None), "a critic if the algorithm has one"
        assert self.world.is_first == (self.supply is not None), "rollouts come from the first rank"

    def run(self, state: RlhfState) -> RlhfState:
        """From `state` to the last iteration, or to the one after which the ranks agreed to stop (collective).

        Raises:
            NonFiniteGradientsError: after rlhf.max_nonfinite_updates skipped updates in a row.
            RewardError: rules failed on more rollouts than rlhf.max_failed_fraction allows.
        """
        if self.supply is None:
            read_to_end(self._weights())
            return self._loop(state, None)
        config, supply = self.config, self.supply

        def draw(position: int, prompts: int) -> Rollouts:
            return supply.draw(supply.prompts(position, prompts), position, config.group, config, self.seed)

        again = None
        if config.sampling_rounds:
            judge = partial(supply.judge, expected=config.prompts * config.group)
            again = SamplingAgain(draw, judge, config.rewards, config.prompts, config.sampling_rounds)
        with RolloutSchedule(
            supply.source,
            partial(draw, prompts=config.prompts),
            supply.judge,
            staleness=config.max_staleness,
            iterations=self.iterations,
            prompts=config.prompts,
            draw_judged=again,
        ) as schedule:
            schedule.begin(state.version, self._weights(), state.pending, state.prompt_position)
            return self._loop(state, schedule)

    def _loop(self, state: RlhfState, schedule: RolloutSchedule | None) -> RlhfState:
        run = self._execution()
        updater = Updater(run, self.algorithm, self.stop, self.pretraining)
        while state.iteration < self.iterations:
            state, stopping = self._iteration(replace(state, pending={}), run, updater, schedule)
            if self.tasks:
                self.tasks.reached(state.iteration, schedule)
            last = state.iteration == self.iterations or stopping
            if last or is_due(state.iteration, self.save_every):
                state = replace(state, pending=schedule.ahead(state.version) if schedule else {})
                if self.tasks:
                    self.tasks.before_checkpoint()
                self.save(state)
            if stopping:
                break
        return state

    def _iteration(
        self, state: RlhfState, run: Execution, updater: Updater, schedule: RolloutSchedule | None
    ) -> tuple[RlhfState, bool]:
        """One iteration: the state after it, and whether a stop was requested."""
        clock = WallLaps()
        self.alive()
        drawn = schedule.take(state.iteration) if schedule else None
        scored = share_scored(drawn.judged if drawn else None)
        rollouts = scored.rollouts
        clock.lap("rollout")
        order = {"seed": self.seed, "iteration": state.iteration, "parts": self.config.minibatches}
        passes = Passes(rollouts, run.dealing, run.device, **order)
        first = [batch for minibatch in passes(0) for batch in minibatch.batches]
        collected = collect(run, rollouts, scored.rule_score_B, first, state.reward_scale)
        prepared = self.algorithm.prepare(collected.experience, state.kl.coefficient)
        clock.lap("forward")
        self._set_learning_rates(state.iteration)
        updates = updater(state, prepared, passes)
        clock.lap("update")
        metrics = iteration_metrics(state, scored, collected, prepared, updates, drawn)
        state = self._advanced(updates.state, scored.prompts, collected, metrics)
        if is_drawn_by(state.version, self.config.max_staleness, self.iterations):
            if schedule:
                schedule.push(state.version, self._weights())
            else:
                read_to_end(self._weights())
        clock.lap("push")
        parts, score_B = collected.part_B, collected.experience.score_B
        laps = {f"timing/{name}_s": seconds for name, seconds in clock.take().items()}
        own = metrics | laps | {"timing/iteration_s": sum(laps.values())}
        self.report(IterationReport(state.iteration, own, updates.metrics, rollouts, parts, score_B))
        return state, updates.stop_requested

    def _advanced(
        self, state: RlhfState, prompts: int, collected: Collected, metrics: Mapping[str, float]
    ) -> RlhfState:
        reward = metrics["rlhf/reward_mean"]
        better = state.best_reward is None or reward > state.best_reward
        return replace(
            state,
            iteration=state.iteration + 1,
            prompt_position=state.prompt_position + prompts,
            kl=state.kl.after(metrics.get("rlhf/kl", 0.0), len(collected.experience.score_B)),
            reward_scale=collected.reward_scale,
            best_reward=reward if better else state.best_reward,
            best_iteration=state.iteration + 1 if better else state.best_iteration,
        )

    def _weights(self) -> WeightStream:
        return sent_weights(self.models.policy.model, self.parallel, self.world)

    def _set_learning_rates(self, iteration: int) -> None:
        config = self.config
        for trained, peak in ((self.models.policy, config.lr), (self.models.critic, config.value_lr)):
            if trained and peak is not None:
                rate = learning_rate(
                    iteration,
                    peak=peak,
                    warmup_steps=config.warmup_iterations,
                    steps=self.iterations,
                    min_ratio=config.min_lr_ratio,
                )
                set_learning_rate(trained.optimizer, rate)

    def _execution(self) -> Execution:
        return Execution(
            config=self.config,
            models=self.models,
            device=self.world.device,
            dealing=dealing(self.mesh, self.parallel, self.config.micro_batch_tokens),
            counts=self.mesh.get_local_rank("tp") == 0,
            reduce_every_micro_batch=self.parallel.reduce_every_micro_batch,
            alive=self.alive,
            beside=self.beside,
        )


# --- metrics ---


def iteration_metrics(
    state: RlhfState,
    scored: Scored,
    collected: Collected,
    prepared: Prepared,
    updates: Updates,
    drawn: Drawn | None,
) -> dict[str, float]:
    """Metrics of an iteration, without the clock's. Names follow TRL and OpenRLHF where the meaning is the same.

    Args:
        state: before the iteration.
        drawn: None except on the first rank.
    """
    experience, mask_BT = collected.experience, collected.experience.mask_BT
    rollouts = scored.rollouts
    score = float(experience.score_B.double().mean())
    metrics = {
        "rlhf/score_mean": score,
        "rlhf/reward_mean": score,
        "rlhf/entropy": float(mean_and_std(collected.entropy_BT, mask_BT)[0]),
        "rlhf/truncated_rate": 1 - float(rollouts.whole.mean()),
        "rlhf/new_tokens_mean": float(rollouts.new_tokens_B.mean()),
        "rlhf/new_tokens_min": float(rollouts.new_tokens_B.min()),
        "rlhf/new_tokens_max": float(rollouts.new_tokens_B.max()),
        "rlhf/updates": float(len(updates.metrics)),
        "rollout/prompts": float(scored.prompts),
        "rollout/staleness": float((state.version - rollouts.version_B).mean()),
    }
    for percent, value in zip(QUANTILES, np.percentile(experience.score_B.cpu().double(), QUANTILES), strict=True):
        metrics[f"rlhf/score_p{percent}"] = float(value)
    if int(np.unique(rollouts.position_B).size) < len(rollouts):
        groups = groups_of(experience.score_B, experience.prompt_B)
        share_B = 1 / groups.size_B.double()  # a group counts 1
        metrics["rlhf/group_std_mean"] = float((groups.std_B * share_B).sum() / share_B.sum())
        metrics["rlhf/groups_without_signal"] = float(((groups.std_B == 0) * share_B).sum() / share_B.sum())
    if experience.reference_logprob_BT is not None:
        kl_BT = k1(experience.logprob_BT, experience.reference_logprob_BT) * mask_BT
        kl = float(kl_BT.double().sum() / len(rollouts))
        metrics |= {
            "rlhf/kl": kl,  # nats per sequence
            "rlhf/kl_coefficient": state.kl.coefficient,
            "rlhf/reward_mean": score - state.kl.coefficient * kl,
        }
    if len(rollouts.set_size_M):
        metrics["rollout/set_bytes"] = float(rollouts.set_size_M.mean())
    gap_BT = (experience.logprob_BT - collected.engine_logprob_BT).abs() * mask_BT
    metrics["rollout/logprob_gap"] = float(gap_BT.max())
    if drawn and drawn.drawing_s:
        metrics["rollout/tokens_per_s"] = float(drawn.judged.rollouts.new_tokens_B.sum()) / drawn.drawing_s
        metrics["timing/judging_s"] = drawn.judging_s
    metrics |= scored.metrics
    metrics |= {f"rlhf/part_{name}": float(score_B.double().mean()) for name, score_B in collected.part_B.items()}
    metrics |= {f"rlhf/{name}": value for name, value in prepared.metrics.items()}
    for name in updates.metrics[0]:
        metrics[f"rlhf/{name}"] = sum(update[name] for update in updates.metrics) / len(updates.metrics)
    return metrics
