"""The loop: prompts, rollouts, rewards, updates, new weights for who draws. It knows no algorithm and no layout.

take rollouts (first rank) -> share -> ask frozen weights -> prepare -> passes of updates -> push weights
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh

from dist_lm.config.parallel import ParallelConfig
from dist_lm.config.rlhf import RlhfConfig
from dist_lm.errors import ConfigError
from dist_lm.generation.params import SamplingParams
from dist_lm.parallel.mesh import World
from dist_lm.parallel.values import whole_weights
from dist_lm.rlhf.algorithm import Algorithm
from dist_lm.rlhf.beside import Beside, one_after_other
from dist_lm.rlhf.collect import REWARD_MODEL, Collected, Collector
from dist_lm.rlhf.forwards import dealing
from dist_lm.rlhf.metrics import Clock, iteration_metrics
from dist_lm.rlhf.models import RlhfModels
from dist_lm.rlhf.packed_rollouts import Dealing, minibatches, rollout_batches
from dist_lm.rlhf.prompts import PromptOrder
from dist_lm.rlhf.rewards import Decode, Rule, rules_of
from dist_lm.rlhf.rollouts import Rollouts, RolloutSource, requests_of, rollouts_of
from dist_lm.rlhf.schedule import RolloutSchedule, Weights, is_drawn_by
from dist_lm.rlhf.sharing import share_judged
from dist_lm.rlhf.state import RlhfState
from dist_lm.rlhf.update import Minibatch, Pretraining, Updater, Updates
from dist_lm.training.optimizer import set_learning_rate
from dist_lm.training.schedule import learning_rate
from dist_lm.training.stop import StopRequest
from dist_lm.training.trainer import is_due


@dataclass(frozen=True)
class IterationReport:
    """What an iteration did, the same on every rank."""

    iteration: int  # how many are done now
    metrics: Mapping[str, float]
    updates: Sequence[Mapping[str, float]]  # metrics of each update, without group
    rollouts: Rollouts
    part_B: Mapping[str, torch.Tensor]  # scores of the parts of the reward
    score_B: torch.Tensor  # their weighted sum, with the penalty


@dataclass(frozen=True)
class RolloutSupply:
    """What the first rank has and no other: prompts, who draws their completions, and texts for rules."""

    source: RolloutSource
    prompts: PromptOrder
    decode: Decode  # tokens to text
    stop_tokens: tuple[int, ...] = ()  # that end a completion, beside end-of-text


@dataclass(frozen=True)
class Learner:
    """The parts of a run on one rank."""

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
    save: Callable[[RlhfState], None] = lambda state: None  # on every rank; pending rollouts are the first one's
    report: Callable[[IterationReport], None] = lambda report: None  # on every rank
    alive: Callable[[], None] = lambda: None  # called as it gets on, from any thread
    beside: Beside = one_after_other  # how it does what belongs to the policy, and what belongs to the critic
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
        assert self.algorithm.has_critic == (self.models.critic is not None), "a critic where the algorithm has one"
        assert self.world.is_first == (self.supply is not None), "rollouts come from the first rank"

    def run(self, state: RlhfState) -> RlhfState:
        """From `state` to the last iteration, or to the one after which a stop was agreed on (collective).

        Raises:
            NonFiniteGradientsError: after rlhf.max_nonfinite_updates skipped updates in a row.
        """
        rules = rules_of(self.config.rewards)
        weights = self._weights()
        if self.supply is None:
            return self._loop(state, rules, None)
        with self._schedule(self.supply, state) as schedule:
            schedule.begin(state.version, weights, state.pending)
            return self._loop(state, rules, schedule)

    def _schedule(self, supply: RolloutSupply, start: RlhfState) -> RolloutSchedule:
        config = self.config
        params = SamplingParams(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            stop_tokens=supply.stop_tokens,
            ignore_eot=config.ignore_eot,
        )

        def draw(source: RolloutSource, iteration: int) -> Rollouts:
            position = start.prompt_position + (iteration - start.iteration) * config.prompts
            prompts = supply.prompts(position, config.prompts)
            requests = requests_of(prompts, position, config.samples, params, self.seed)
            return rollouts_of(requests, source.generate(requests))

        return RolloutSchedule(supply.source, draw, staleness=config.max_staleness, iterations=self.iterations)

    def _loop(self, state: RlhfState, rules: Mapping[str, Rule], schedule: RolloutSchedule | None) -> RlhfState:
        while state.iteration < self.iterations:
            state, stopping = self._iteration(replace(state, pending={}), rules, schedule)
            last = state.iteration == self.iterations or stopping
            if last or is_due(state.iteration, self.save_every):
                ahead = schedule.ahead(state.version) if schedule else {}
                state = replace(state, pending=ahead)
                self.save(state)
            if stopping:
                break
        return state

    def _iteration(
        self, state: RlhfState, rules: Mapping[str, Rule], schedule: RolloutSchedule | None
    ) -> tuple[RlhfState, bool]:
        clock = Clock()
        self.alive()
        rollouts, rule_score_B, drawing_s = self._take(state.iteration, rules, schedule)
        clock.lap("rollout")
        passes = _Passes(rollouts, self.seed, state.iteration, self.config, self._dealing(), self.world.device)
        first = [batch for minibatch in passes(0) for batch in minibatch.batches]
        collected = self._collector()(rollouts, rule_score_B, first, state.reward_scale)
        prepared = self.algorithm.prepare(collected.experience, state.kl.coefficient)
        clock.lap("forward")
        self._set_learning_rates(state.iteration)
        updates = self._updater()(state, prepared.tokens, passes)
        clock.lap("update")
        metrics = iteration_metrics(state, rollouts, collected, prepared, updates, drawing_s)
        state = self._advanced(updates, collected, metrics)
        if is_drawn_by(state.version, self.config.max_staleness, self.iterations):
            weights = self._weights()
            if schedule:
                schedule.push(state.version, weights)
        clock.lap("push")
        parts, score_B = collected.part_B, collected.experience.score_B
        own = metrics | clock.metrics()
        self.report(IterationReport(state.iteration, own, updates.metrics, rollouts, parts, score_B))
        return state, updates.stop_requested

    def _take(
        self, iteration: int, rules: Mapping[str, Rule], schedule: RolloutSchedule | None
    ) -> tuple[Rollouts, dict[str, torch.Tensor], float]:
        """The rollouts of an iteration, their scores under the rules, and (first rank) how long drawing took."""
        rollouts, seconds = None, 0.0
        if schedule:
            drawn = schedule.take(iteration)
            rollouts, seconds = drawn.rollouts, drawn.seconds
        rollouts, parts = share_judged(rollouts, rules, self.supply.decode if self.supply else None)
        return rollouts, parts, seconds

    def _advanced(self, updates: Updates, collected: Collected, metrics: Mapping[str, float]) -> RlhfState:
        state, reward = updates.state, metrics["rlhf/reward_mean"]
        better = state.best_reward is None or reward > state.best_reward
        return replace(
            state,
            iteration=state.iteration + 1,
            prompt_position=state.prompt_position + self.config.prompts,
            kl=state.kl.after(metrics.get("rlhf/kl", 0.0), len(collected.experience.score_B)),
            reward_scale=collected.reward_scale,
            best_reward=reward if better else state.best_reward,
            best_iteration=state.iteration + 1 if better else state.best_iteration,
        )

    def _weights(self) -> Weights:
        """The policy's, as nobody will change them (collective)."""
        model = self.models.policy.model
        whole = whole_weights(model, model.config, torch.float32)
        return {name: np.array(value.cpu().numpy()) for name, value in whole.items()} if self.supply else {}

    def _set_learning_rates(self, iteration: int) -> None:
        config = self.config
        for trained, peak in ((self.models.policy, config.lr), (self.models.critic, config.value_lr)):
            if trained:
                rate = learning_rate(
                    iteration,
                    peak=peak,
                    warmup_steps=config.warmup_iterations,
                    steps=self.iterations,
                    min_ratio=config.min_lr_ratio,
                )
                set_learning_rate(trained.optimizer, rate)

    def _dealing(self) -> Dealing:
        return dealing(self.mesh, self.parallel, self.config.micro_batch_tokens)

    def _collector(self) -> Collector:
        return Collector(
            config=self.config,
            models=self.models,
            chunk_bytes=self._chunk_bytes,
            counts=self._counts,
            dealing=self._dealing(),
            device=self.world.device,
            alive=self.alive,
            beside=self.beside,
        )

    def _updater(self) -> Updater:
        return Updater(
            config=self.config,
            algorithm=self.algorithm,
            models=self.models,
            chunk_bytes=self._chunk_bytes,
            counts=self._counts,
            reduce_every_micro_batch=self.parallel.reduce_every_micro_batch,
            stop=self.stop,
            pretraining=self.pretraining,
            alive=self.alive,
            beside=self.beside,
        )

    @property
    def _chunk_bytes(self) -> int:
        return self.parallel.loss_chunk_mib << 20

    @property
    def _counts(self) -> bool:
        return self.mesh.get_local_rank("tp") == 0


@dataclass(frozen=True)
class _Passes:
    """The passes over an iteration's rollouts. The first one is kept, as its batches are used again."""

    rollouts: Rollouts
    seed: int
    iteration: int
    config: RlhfConfig
    dealing: Dealing
    device: torch.device
    kept: dict[int, list[Minibatch]] = field(default_factory=dict)

    def __call__(self, number: int) -> list[Minibatch]:
        if self.config.minibatches == 1:
            number = 0  # all of them together are the same in every pass
        if number in self.kept:
            return self.kept[number]
        parts = minibatches(self.seed, self.iteration, number, len(self.rollouts), self.config.minibatches)
        made = [
            Minibatch(
                [batch.to(self.device) for batch in rollout_batches(self.rollouts, part, self.dealing)],
                int(self.rollouts.new_tokens_B[part].sum()),
            )
            for part in parts
        ]
        if number == 0:
            self.kept[0] = made
        return made
