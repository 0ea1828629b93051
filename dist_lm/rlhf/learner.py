"""The RLHF loop: rollouts, scores, advantages, updates, new weights for generation.

The loop does not depend on the algorithm or the layout.

An iteration:

    sample      the first rank takes the rollouts that the controller has drawn and judged (`controller.py`)
    share       every rank gets them, in memory that the ranks of a node share; those without a score are left out
    experience  forward passes of policy, reference, critic and reward model (`experience.py`)
    advantages  the algorithm computes the inputs of its losses (`algorithm.py`)
    update      `epochs` passes over the rollouts in minibatches, each a step of policy and critic
    push        the new weights go to the engines
    report      metrics and samples

Dimensions: B rollouts, T tokens of the longest completion, N completion tokens of a micro-batch, S rollouts of a
minibatch.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dist_lm.config.cluster import ParallelConfig
from dist_lm.data.batch import Batch
from dist_lm.environments.protocol import FAILURES
from dist_lm.errors import ConfigError
from dist_lm.generation.decoder import WeightStream
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import World, adds_sums
from dist_lm.rlhf.algorithm import Algorithm, DrawnTokens, Prepared
from dist_lm.rlhf.config import RlhfConfig, not_null
from dist_lm.rlhf.constrained_rollouts import RolloutConstraints
from dist_lm.rlhf.controller import ControllerState, RolloutController, on_every_rank
from dist_lm.rlhf.experience import Collected, collect
from dist_lm.rlhf.models import Execution, RlhfModels, RunBoth, Trained, dealing, one_after_other, sent_weights
from dist_lm.rlhf.packed_rollouts import Minibatch, Passes, RolloutBatch
from dist_lm.rlhf.policy_gradient import groups_of, mean_and_std, reference_kl
from dist_lm.rlhf.rewards import REWARD_MODEL, UsableRollouts, refuse_void, usable_of
from dist_lm.rlhf.rollouts import CUTS, Rollouts, read_to_end
from dist_lm.rlhf.schedule import Drawn, draws_rollouts
from dist_lm.rlhf.state import RlhfState
from dist_lm.training.heartbeat import StopRequest
from dist_lm.training.objective import LossSum, Objective, next_token
from dist_lm.training.optimizer import learning_rate, set_learning_rate
from dist_lm.training.step import StepResult, accumulate_gradients, update
from dist_lm.training.step_meter import WallLaps
from dist_lm.training.trainer import NonFiniteGradientsError, is_due, without_collection

Columns = Mapping[str, torch.Tensor]
Pretraining = Callable[[int], Sequence[Batch]]
"""(number of the update since the start of the run) -> this rank's micro-batches of text, on the models' device."""

QUANTILES = (10, 50, 90)  # quantiles of the scores in the metrics, in percent


@dataclass(frozen=True)
class IterationReport:
    """Results of an iteration, the same on every rank."""

    iteration: int  # number of finished iterations
    metrics: Mapping[str, float]
    updates: Sequence[Mapping[str, float]]  # metrics of each update, without the `rlhf/` group
    rollouts: Rollouts  # those with a score
    part_B: Mapping[str, torch.Tensor]  # scores of the reward parts
    score_B: torch.Tensor  # their weighted sum, penalty included
    # bool, by part: where it does not apply; parts that apply to all are left out
    skipped_B: Mapping[str, torch.Tensor] = field(default_factory=dict)


class IterationTasks(Protocol):
    """Benchmarks of stage.eval_tasks after iterations, asked by the engines that draw rollouts (collective)."""

    def reached(self, iteration: int, controller: RolloutController | None) -> None:
        """Called after each iteration; `controller`: on the first rank."""

    def before_checkpoint(self) -> None:
        """Called before each checkpoint."""


@dataclass(frozen=True)
class Learner:
    """The parts of an RLHF run on one rank."""

    config: RlhfConfig
    seed: int
    iterations: int  # length of the whole run
    world: World
    mesh: DeviceMesh
    parallel: ParallelConfig
    models: RlhfModels
    algorithm: Algorithm
    controller: RolloutController | None  # on the first rank
    pretraining: Pretraining | None = None
    constraints: RolloutConstraints | None = None  # on every rank, if rollouts have constraints
    save_every: int = 0  # iterations; 0: only at the end
    save: Callable[[RlhfState], None] = lambda state: None  # on every rank; only the first has pending rollouts
    report: Callable[[IterationReport], None] = lambda report: None  # on every rank
    tasks: IterationTasks | None = None
    alive: Callable[[], None] = lambda: None  # called on progress, from any thread
    # called with the share of the forward passes that is done, in [0, 1]
    scoring: Callable[[float], None] = lambda done: None
    run_both: RunBoth = one_after_other  # runs the work of policy and critic, in turns or at the same time
    drawing: Callable[[], AbstractContextManager[None]] = nullcontext  # entered while engines draw rollouts
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
        assert self.world.is_first == (self.controller is not None), "rollouts come from the first rank"

    def run(self, state: RlhfState) -> RlhfState:
        """Trains from `state` to the last iteration, or until the ranks agree to stop (collective).

        Models and optimizers change in place; `save` and `report` are called on every rank.

        Returns:
            The state after the last finished iteration; on the first rank with the rollouts drawn ahead.

        Raises:
            NonFiniteGradientsError: after rlhf.max_nonfinite_updates skipped updates in a row.
            RewardError: rules failed on more rollouts than rlhf.max_failed_fraction allows, or on all; or scores leave
                no finite inputs of the losses.
            RequestError: a prompt cannot be answered.
            ArtefactError: rollouts followed other grammars than `constraints` make.
            UserError, PoolFailure: of the source of rollouts, see `RolloutSource`; on the first rank.
            CheckpointWriteError: from `save`. `report` and `tasks` may raise others.
        """
        # Gathering weights is collective, so every rank reads them, though only the first one sends them to engines.
        if self.controller is None:
            read_to_end(self._weights())
            return self._loop(state)

        try:
            controller_state = ControllerState(state.version, state.prompt_position, state.pending)
            self.controller.begin(controller_state, self._weights())
            return self._loop(state)
        finally:
            self.controller.end()

    def _loop(self, state: RlhfState) -> RlhfState:
        """Runs iterations until the last one or a stop, and saves when a checkpoint is due and at the end. Returns the
        state after them.

        Raises:
            NonFiniteGradientsError, RewardError, RequestError, ArtefactError, UserError, PoolFailure: as `run`.
        """
        execution = Execution(
            config=self.config,
            models=self.models,
            device=self.world.device,
            dealing=dealing(self.mesh, self.parallel, self.config.micro_batch_tokens),
            adds_sums=adds_sums(self.mesh),
            reduce_every_micro_batch=self.parallel.reduce_every_micro_batch,
            alive=self.alive,
            run_both=self.run_both,
            scoring=self.scoring,
        )
        updater = Updater(execution, self.algorithm, self.stop, self.pretraining)

        while state.iteration < self.iterations:
            # `pending` is filled only for a checkpoint; here the controller owns the rollouts drawn ahead.
            state, stopping = self._iteration(replace(state, pending={}), execution, updater)
            if self.tasks:
                self.tasks.reached(state.iteration, self.controller)

            is_last = state.iteration == self.iterations or stopping
            if is_last or is_due(state.iteration, self.save_every):
                # Save the rollouts that older weights have drawn: the saved weights would draw different ones.
                state = replace(state, pending=self.controller.ahead(state.version) if self.controller else {})
                if self.tasks:
                    self.tasks.before_checkpoint()
                self.save(state)
            if stopping:
                break
        return state

    def _iteration(self, state: RlhfState, execution: Execution, updater: "Updater") -> tuple[RlhfState, bool]:
        """Runs one iteration and reports it (collective). Returns the state after it, and whether a stop was
        requested. Changes models and optimizers, and sends the new weights to the source if they draw later rollouts.

        Raises:
            NonFiniteGradientsError, RewardError, RequestError, ArtefactError, UserError, PoolFailure: as `run`.
        """
        clock = WallLaps()
        self.alive()

        # Sample and score: the controller has drawn them, and its rules have judged (the reward model scores in
        # `collect`). All ranks go on with the same rollouts.
        with self.drawing():
            drawn = on_every_rank(self.controller.take(state.iteration) if self.controller else None, self.world)
        usable = usable_of(drawn.scored, has_reward_model=self.models.reward is not None)
        rollouts = usable.rollouts
        clock.lap("rollout")

        # Advantages: the forward passes use the micro-batches of pass 0, so they round as its first update does, and
        # every probability ratio of that update is exactly 1.
        passes = Passes(
            rollouts,
            execution.dealing,
            execution.device,
            seed=self.seed,
            iteration=state.iteration,
            minibatches=self.config.minibatches,
            sets_of=self.constraints.sets_of(rollouts) if self.constraints else None,
        )
        batches = [batch for minibatch in passes(0) for batch in minibatch.batches]
        collected = collect(
            execution,
            rollouts,
            usable.rule_score_B,
            batches,
            state.reward_scale,
            state.version,
            self.algorithm.ratio_of,
        )
        # The weight of the KL: fixed, or moved after each iteration towards rlhf.kl_target (`state.KlController`).
        prepared = self.algorithm.prepare(collected.experience, state.kl.coefficient)
        # If the models' own numbers are finite, an input of a loss that is not finite must come from a score: it is
        # refused. Otherwise `update` skips the gradients.
        inputs = {"scores": collected.experience.score_B}
        if collected.experience.has_finite_models:
            inputs |= prepared.tokens  # columns (B, T), such as advantages
        refuse_void(self.config.rewards, collected.part_B, inputs)
        clock.lap("forward")

        self._set_learning_rates(state.iteration)
        # A collection on one rank would hold up all of them; between the updates of iterations it is free to come.
        with without_collection():
            updates = updater(state, prepared, passes)
        clock.lap("update")

        # Metrics describe the policy that drew the rollouts, so they come before the state moves on.
        metrics = iteration_metrics(state, usable, collected, prepared, updates, drawn if self.controller else None)
        state = _after_iteration(updates.state, usable.prompts, collected, metrics)
        # The last versions draw nothing, so they are not sent. `drawing_staleness` is rlhf.max_staleness, but 0 with
        # rlhf.asynchronous, where any weights that are there go on drawing.
        if draws_rollouts(state.version, self.config.drawing_staleness, self.iterations):
            if self.controller:
                self.controller.push(state.version, self._weights())
            else:
                read_to_end(self._weights())
        clock.lap("push")

        laps = {f"timing/{name}_s": seconds for name, seconds in clock.take().items()}
        metrics |= laps | {"timing/iteration_s": sum(laps.values())}
        if self.controller:
            metrics |= self.controller.times()
        score_B = collected.experience.score_B
        report = IterationReport(
            state.iteration, metrics, updates.metrics, rollouts, collected.part_B, score_B, usable.skipped_B
        )
        self.report(report)
        return state, updates.stop_requested

    def _weights(self) -> WeightStream:
        return sent_weights(self.models.policy.model, self.parallel, self.world)

    def _set_learning_rates(self, iteration: int) -> None:
        """Sets the rates of an iteration: all its updates have the same one, however many rlhf.stop_kl allows."""
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


def _after_iteration(state: RlhfState, prompts: int, collected: Collected, metrics: Mapping[str, float]) -> RlhfState:
    """Returns the state after an iteration whose updates are done: counters, KL coefficient, reward scale, best reward.

    Args:
        prompts: number of prompts drawn.
        metrics: of the iteration, with `rlhf/reward_mean` and, with a reference, `rlhf/kl`.
    """
    state = replace(
        state,
        iteration=state.iteration + 1,
        prompt_position=state.prompt_position + prompts,
        kl=state.kl.after(metrics.get("rlhf/kl", 0.0), len(collected.experience.score_B)),
        reward_scale=collected.reward_scale,
    )
    reward = metrics["rlhf/reward_mean"]
    if state.best_reward is None or reward > state.best_reward:
        return replace(state, best_reward=reward, best_iteration=state.iteration)
    return state


# --- updates ---


@dataclass(frozen=True)
class Updates:
    """Results of the updates of an iteration, the same on every rank."""

    state: RlhfState
    metrics: Sequence[Mapping[str, float]]  # means over each minibatch, by the weights before its update
    stop_requested: bool


@dataclass(frozen=True)
class Updater:
    """Updates policy and critic on one rank: passes over the rollouts in minibatches."""

    execution: Execution
    algorithm: Algorithm
    stop: StopRequest
    pretraining: Pretraining | None = None

    def __call__(self, state: RlhfState, prepared: Prepared, passes: Passes) -> Updates:
        """Makes all passes over an iteration's rollouts, or fewer if rlhf.stop_kl ends them (collective).

        Raises:
            NonFiniteGradientsError: after rlhf.max_nonfinite_updates skipped updates in a row.
        """
        config = self.execution.config
        metrics: list[dict[str, float]] = []
        stopping = False
        for number in range(not_null(config.epochs)):
            for minibatch in passes(number):
                self.execution.alive()
                policy_result, *critic_results = self._steps(state, prepared, minibatch)

                results = [policy_result, *critic_results]
                state = _after_update(state, results)
                self._check_finite(state)
                stopping = stopping or any(result.stop_requested for result in results)

                metrics.append(policy_result.metrics | {"policy_grad_norm": policy_result.grad_norm})
                for critic in critic_results:
                    metrics[-1] |= critic.metrics | {"value_grad_norm": critic.grad_norm}
                # Rollouts of a policy that is too far away teach nothing reliable.
                if config.stop_kl and metrics[-1]["approx_kl"] > config.stop_kl:
                    return Updates(state, metrics, stopping)
        return Updates(state, metrics, stopping)

    def _steps(self, state: RlhfState, prepared: Prepared, minibatch: Minibatch) -> Sequence[StepResult]:
        """Makes a step of the policy, and of the critic if there is one (collective). Returns their results, the
        policy's first."""
        models, config = self.execution.models, self.execution.config

        def policy_step() -> StepResult:
            """Makes a step of the policy on the rollouts of the minibatch, with pretraining text if there is any."""
            # Text joins the rollouts of the same update, so that one optimizer step sees both gradients.
            batches: list[Batch] = list(minibatch.batches)
            text_weight = 0.0
            if self.pretraining and config.pretrain_coefficient:
                texts = self.pretraining(state.policy_updates)
                divisor = float(prepared.divisor_B[torch.from_numpy(minibatch.rollout_S)].sum())
                text_weight = divisor / max(_targets_of_all_ranks(texts, self.execution.adds_sums), 1.0)
                batches += texts
            return self._step(models.policy, policy_objective(self.algorithm, prepared, config, text_weight), batches)

        if not models.critic:
            return [policy_step()]

        # Two models that share nothing: on one CPU they are updated at the same time.
        critic, objective = models.critic, critic_objective(self.algorithm, prepared.tokens)
        return self.execution.run_both(policy_step, lambda: self._step(critic, objective, minibatch.batches))

    def _step(self, trained: Trained, objective: Objective, batches: Sequence[Batch]) -> StepResult:
        """Adds up gradients over this rank's micro-batches and makes an optimizer step (collective). Returns its
        result. Gradients that are not finite skip the step."""
        execution, model = self.execution, trained.model
        sums = accumulate_gradients(model, objective, batches, execution.reduce_every_micro_batch)
        return update(
            model,
            trained.optimizer,
            sums,
            grad_clip=execution.config.grad_clip,
            adds_sums=execution.adds_sums,
            stop=self.stop,
        )

    def _check_finite(self, state: RlhfState) -> None:
        """Refuses to go on after too many skipped updates.

        Raises:
            NonFiniteGradientsError: rlhf.max_nonfinite_updates updates in a row were skipped.
        """
        config = self.execution.config
        if state.nonfinite_updates >= config.max_nonfinite_updates:
            critic = f" and rlhf.value_lr={config.value_lr:g}" if config.value_lr is not None else ""
            raise NonFiniteGradientsError(
                f"gradients were NaN or infinite in {state.nonfinite_updates} updates in a row, in iteration "
                f"{state.iteration} (rlhf.max_nonfinite_updates={config.max_nonfinite_updates}): lower "
                f"rlhf.lr={config.lr:g}{critic}, or look for an unbounded reward"
            )


def policy_objective(
    algorithm: Algorithm, prepared: Prepared, config: RlhfConfig, text_weight: float = 0.0
) -> Objective:
    """Returns the objective of a policy: the algorithm's loss on rollouts, and the next-token loss on text (PPO-ptx:
    Ouyang et al. 2022, eq. 2).

    A batch of text has a count of 0 and a metric `pretrain_loss` with a count of its own. The count of a batch of
    rollouts is the sum of the divisors of the rollouts whose first token is in it.

    Args:
        prepared: columns and divisors of all rollouts of the iteration.
        text_weight: factor of the text loss, beside rlhf.pretrain_coefficient: divisor of the policy loss / number of
            text tokens of the update. As the step divides all sums by the policy's divisor, the text loss becomes a
            mean over its own tokens. It may exceed 1.
    """
    # `column_N` of a batch are indices in the flattened (B, T) columns: rollout * T + number of the token.
    flat_columns = {name: column.flatten() for name, column in prepared.tokens.items()}
    longest = next(iter(prepared.tokens.values())).shape[1]
    text_objective = next_token()

    def objective(model: Transformer, batch: Batch) -> LossSum:
        """Returns the summed loss of a micro-batch, of rollouts or of text, with its count and metrics."""
        if not isinstance(batch, RolloutBatch):
            text_loss = text_objective(model, batch)
            weight, name = config.pretrain_coefficient * text_weight, "pretrain_loss"
            # Text adds nothing to the count, which is that of the policy loss; its metric has a count of its own.
            return LossSum(
                total=weight * text_loss.total,
                count=torch.zeros_like(text_loss.count),
                metrics={name: text_loss.total.detach()},
                metric_counts={name: text_loss.count},
            )

        now = model.logprobs(batch, config.temperature, algorithm.uses_entropy, batch.sets)
        tokens = DrawnTokens(
            logprob_N=now.logprob_BT.flatten()[batch.logit_index_N],
            entropy_N=now.entropy_BT.flatten()[batch.logit_index_N],
            rollout_N=batch.column_N // longest,
            columns={name: column[batch.column_N] for name, column in flat_columns.items()},
            kl_coefficient=prepared.kl_coefficient,
            largest_kl_weight=config.largest_kl_weight,
        )
        loss = algorithm.policy_loss(tokens)

        # A rollout adds its `divisor_B` once, at its first token. Metrics are means over tokens, so they have another
        # count.
        is_first_N = batch.column_N % longest == 0
        divisor_N = prepared.divisor_B[tokens.rollout_N] * is_first_N
        metric_counts = {name: loss.count for name in loss.metrics if name != "policy_loss"}
        return replace(loss, count=divisor_N.sum(), metric_counts=metric_counts)

    return objective


def critic_objective(algorithm: Algorithm, columns: Columns) -> Objective:
    """Returns the critic's loss on rollouts, a sum over completion tokens.

    Args:
        columns: the columns of `Prepared`, (B, T) each.
    """
    flat_columns = {name: column.flatten() for name, column in columns.items()}

    def objective(model: Transformer, batch: Batch) -> LossSum:
        assert isinstance(batch, RolloutBatch)
        value_N = model.scores(batch, batch.logit_index_N).flatten()[batch.logit_index_N]
        return algorithm.value_loss(value_N, {name: column[batch.column_N] for name, column in flat_columns.items()})

    return objective


def _targets_of_all_ranks(batches: Sequence[Batch], adds_sums: bool) -> float:
    """Returns the number of targets in the loss masks of all ranks (collective)."""
    total = torch.zeros((), dtype=torch.float64, device=batches[0].tokens_BT.device)
    if adds_sums:
        total += sum(float(batch.loss_mask_BT.sum()) for batch in batches)
    dist.all_reduce(total)
    return float(total)


def _after_update(state: RlhfState, results: Sequence[StepResult]) -> RlhfState:
    """Returns the state after one update of the policy, and of the critic if there is one."""
    return replace(
        state,
        policy_updates=state.policy_updates + 1,
        value_updates=state.value_updates + len(results) - 1,
        nonfinite_updates=0 if all(result.applied for result in results) else state.nonfinite_updates + 1,
    )


# --- metrics ---


def iteration_metrics(
    state: RlhfState,
    usable: UsableRollouts,
    collected: Collected,
    prepared: Prepared,
    updates: Updates,
    drawn: Drawn | None,
) -> dict[str, float]:
    """Returns the metrics of an iteration by their names in the metrics file, without the clock's.

    Names follow TRL and OpenRLHF where the meaning is the same. Log-probabilities, entropy and KL are in nats. Metrics
    of the updates are means over them. `rlhf/kl` is the mean over rollouts of the sum over tokens; `rlhf/reward_mean`
    is the score less the weighted KL.

    Args:
        state: the state before the iteration.
        drawn: None except on the first rank, which alone has the metrics of drawing and judging.
    """
    experience, mask_BT = collected.experience, collected.experience.mask_BT
    rollouts = usable.rollouts
    metrics = score_metrics(state.version, rollouts, experience.score_B, experience.prompt_B)
    score = metrics["rlhf/score_mean"]
    metrics |= {
        "rlhf/reward_mean": score,
        "rlhf/entropy": float(mean_and_std(collected.entropy_BT, mask_BT)[0]),
        "rlhf/updates": float(len(updates.metrics)),
        "rollout/prompts": float(usable.prompts),
    }

    if experience.reference_logprob_BT is not None:
        kl = float(reference_kl(experience, "k1").double().sum() / len(rollouts))
        metrics |= {
            "rlhf/kl": kl,  # nats per rollout
            "rlhf/kl_coefficient": state.kl.coefficient,
            "rlhf/reward_mean": score - state.kl.coefficient * kl,
        }

    if len(rollouts.set_size_M):
        metrics["rollout/set_bytes"] = float(rollouts.set_size_M.mean())
    if len(rollouts.grammar_BG):
        metrics["rollout/forced_rate"] = float((rollouts.logprobs_M == 0).mean())
    # With fresh weights the engine and the trainer compute the same model; a gap shows that they don't.
    gap_BT = (experience.logprob_BT - collected.engine_logprob_BT).abs() * mask_BT
    metrics["rollout/logprob_gap"] = float(gap_BT.max())
    if drawn and drawn.drawing_s:
        metrics["rollout/tokens_per_s"] = float(drawn.scored.rollouts.new_tokens_B.sum()) / drawn.drawing_s
        metrics["timing/judging_s"] = drawn.judging_s
    if drawn and drawn.scored.rollouts.are_conversations:
        metrics |= conversation_metrics(drawn.scored.rollouts)
    if drawn:
        metrics |= drawn.metrics

    metrics |= usable.metrics
    metrics |= {f"rlhf/part_{name}": mean for name, mean in usable.means(collected.part_B).items()}
    metrics |= {f"rlhf/{name}": number for name, number in prepared.metrics.items()}
    for name in updates.metrics[0]:
        metrics[f"rlhf/{name}"] = sum(means[name] for means in updates.metrics) / len(updates.metrics)
    return metrics


def score_metrics(version: int, rollouts: Rollouts, score_B: torch.Tensor, prompt_B: torch.Tensor) -> dict[str, float]:
    """Returns metrics that follow from the rollouts of an iteration and their scores, without a model, by registered
    name; those of groups only if some prompt has several rollouts.

    Args:
        version: of the policy, before the iteration.
        rollouts: those with a score; at least one.
        score_B: the weighted sum of all parts, penalty included.
        prompt_B: equal for rollouts of one prompt.
    """
    metrics = {
        "rlhf/score_mean": float(score_B.double().mean()),
        "rlhf/truncated_rate": 1 - float(rollouts.ended.mean()),
        "rlhf/new_tokens_mean": float(rollouts.new_tokens_B.mean()),
        "rlhf/new_tokens_min": float(rollouts.new_tokens_B.min()),
        "rlhf/new_tokens_max": float(rollouts.new_tokens_B.max()),
        "rollout/staleness": float((version - rollouts.version_B).mean()),
    }
    for percent, quantile in zip(QUANTILES, np.percentile(score_B.cpu().double(), QUANTILES), strict=True):
        metrics[f"rlhf/score_p{percent}"] = float(quantile)

    has_groups = int(np.unique(rollouts.position_B).size) < len(rollouts)
    if has_groups:
        groups = groups_of(score_B, prompt_B)
        # A mean over groups: each rollout weighs the inverse of its group's size.
        group_weight_B = 1 / groups.size_B.double()
        metrics["rlhf/group_std_mean"] = float((groups.std_B * group_weight_B).sum() / group_weight_B.sum())
        metrics["rlhf/groups_without_signal"] = float(
            ((groups.std_B == 0) * group_weight_B).sum() / group_weight_B.sum()
        )
    return metrics


def conversation_metrics(rollouts: Rollouts) -> dict[str, float]:
    """Returns what happened in the conversations drawn, those without a verdict included."""
    valid_B, n_turns = rollouts.failure_B < 0, max(1, int(rollouts.turns_B.sum()))
    metrics = {
        "rollout/turns": float(rollouts.turns_B.mean()),
        "rollout/turn_tokens": float(rollouts.new_tokens_B.sum()) / max(1, int(rollouts.turns_B[valid_B].sum())),
        "rollout/unreadable_turns": float(rollouts.unreadable_B.sum()) / n_turns,
        "rollout/tool_errors": float(rollouts.tool_errors_B.mean()),
        "rollout/broken_prefixes": float(np.maximum(rollouts.samples_B - 1, 0).sum()),
    }
    for index, cut in enumerate(CUTS):
        if cut:
            metrics[f"rollout/cut_{cut}"] = float((rollouts.cut_B == index).mean())
    for index, reason in enumerate(FAILURES):
        count = int((rollouts.failure_B == index).sum())
        if count:
            metrics[f"rollout/invalid_{reason}"] = float(count)
    return metrics
