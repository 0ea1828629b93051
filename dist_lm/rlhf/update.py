"""The updates of an iteration: passes over its rollouts in minibatches, each a step of policy and critic.

Dimensions: B rollouts, T tokens of the longest completion, N completion tokens of a micro-batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from dist_lm.config.rlhf import RlhfConfig, given
from dist_lm.data.batch import Batch
from dist_lm.model.transformer import Transformer
from dist_lm.rlhf.algorithm import Algorithm, DrawnTokens, Prepared
from dist_lm.rlhf.models import Execution, Trained
from dist_lm.rlhf.packed_rollouts import Minibatch, Passes, RolloutBatch
from dist_lm.rlhf.state import RlhfState
from dist_lm.training.heartbeat import StopRequest
from dist_lm.training.objective import LossSum, Objective, next_token
from dist_lm.training.step import StepResult, accumulate_gradients, update
from dist_lm.training.trainer import NonFiniteGradientsError

Columns = Mapping[str, torch.Tensor]
Pretraining = Callable[[int], Sequence[Batch]]
"""(number of the update since the start of the run) -> this rank's micro-batches of text, on the models' device."""


@dataclass(frozen=True)
class Updates:
    """Results of the updates of an iteration, the same on every rank."""

    state: RlhfState
    metrics: Sequence[Mapping[str, float]]  # of each update: means, before the update
    stop_requested: bool


def policy_objective(
    algorithm: Algorithm, prepared: Prepared, config: RlhfConfig, pretraining_share: float = 0.0
) -> Objective:
    """The policy loss on rollouts, and the next-token loss on batches of text (PPO-ptx: Ouyang et al. 2022, eq. 2).

    Args:
        pretraining_share: count of the policy loss / text tokens of the update. The step divides all losses by that
            count, so this factor makes the text loss a mean over the text tokens.
    """
    flat = {name: column.flatten() for name, column in prepared.tokens.items()}
    longest = next(iter(prepared.tokens.values())).shape[1]
    plain = next_token()

    def objective(model: Transformer, batch: Batch) -> LossSum:
        if not isinstance(batch, RolloutBatch):
            loss = plain(model, batch)
            weight, name = config.pretrain_coefficient * pretraining_share, "pretrain_loss"
            metrics, counts = {name: loss.total.detach()}, {name: loss.count}
            return LossSum(weight * loss.total, torch.zeros_like(loss.count), metrics, counts)
        now = model.logprobs(batch, config.temperature, algorithm.uses_entropy, batch.sets)
        drawn = DrawnTokens(
            logprob_N=now.logprob_BT.flatten()[batch.counted_N],
            entropy_N=now.entropy_BT.flatten()[batch.counted_N],
            rollout_N=batch.drawn_N // longest,
            columns={name: column[batch.drawn_N] for name, column in flat.items()},
            kl_coefficient=prepared.kl_coefficient,
        )
        loss = algorithm.policy_loss(drawn)
        count_N = prepared.count_B[drawn.rollout_N] * (batch.drawn_N % longest == 0)  # once, at the first token
        counts = {name: loss.count for name in loss.metrics if name != "policy_loss"}
        return replace(loss, count=count_N.sum(), counts=counts)

    return objective


def critic_objective(algorithm: Algorithm, columns: Columns) -> Objective:
    """The critic's loss on rollouts; `columns` (B, T) each."""
    flat = {name: column.flatten() for name, column in columns.items()}

    def objective(model: Transformer, batch: Batch) -> LossSum:
        assert isinstance(batch, RolloutBatch)
        value_N = model.scores(batch, batch.counted_N).flatten()[batch.counted_N]
        return algorithm.value_loss(value_N, {name: column[batch.drawn_N] for name, column in flat.items()})

    return objective


@dataclass(frozen=True)
class Updater:
    """Updates policy and critic on one rank."""

    run: Execution
    algorithm: Algorithm
    stop: StopRequest
    pretraining: Pretraining | None = None

    def __call__(self, state: RlhfState, prepared: Prepared, passes: Passes) -> Updates:
        """All passes over an iteration's rollouts, or fewer if rlhf.stop_kl ends them (collective).

        Raises:
            NonFiniteGradientsError: after rlhf.max_nonfinite_updates skipped updates in a row.
        """
        config, done, stopping = self.run.config, [], False
        for number in range(given(config.epochs)):
            for minibatch in passes(number):
                self.run.alive()
                results = self._steps(state, prepared, minibatch)
                state = _counted(state, results)
                self._check_finite(state)
                stopping = stopping or any(result.stop_requested for result in results)
                done.append(results[0].metrics | {"policy_grad_norm": results[0].grad_norm})
                for critic in results[1:]:
                    done[-1] |= critic.metrics | {"value_grad_norm": critic.grad_norm}
                if config.stop_kl and done[-1]["approx_kl"] > config.stop_kl:
                    return Updates(state, done, stopping)
        return Updates(state, done, stopping)

    def _steps(self, state: RlhfState, prepared: Prepared, minibatch: Minibatch) -> Sequence[StepResult]:
        """A step of the policy, and of the critic if there is one."""
        models, config = self.run.models, self.run.config

        def policy_step() -> StepResult:
            batches: list[Batch] = list(minibatch.batches)
            share = 0.0
            if self.pretraining and config.pretrain_coefficient:
                texts = self.pretraining(state.policy_updates)
                count = float(prepared.count_B[torch.from_numpy(minibatch.rollout_S)].sum())
                share = count / max(_targets_of_all_ranks(texts, self.run.counts), 1.0)
                batches += texts
            return self._step(models.policy, policy_objective(self.algorithm, prepared, config, share), batches)

        if not models.critic:
            return [policy_step()]
        critic, objective = models.critic, critic_objective(self.algorithm, prepared.tokens)
        return self.run.beside(policy_step, lambda: self._step(critic, objective, minibatch.batches))

    def _step(self, trained: Trained, objective: Objective, batches: Sequence[Batch]) -> StepResult:
        run, model = self.run, trained.model
        sums = accumulate_gradients(model, objective, batches, run.reduce_every_micro_batch)
        return update(model, trained.optimizer, sums, grad_clip=run.config.grad_clip, counts=run.counts, stop=self.stop)

    def _check_finite(self, state: RlhfState) -> None:
        config = self.run.config
        if state.nonfinite_updates >= config.max_nonfinite_updates:
            critic = f" and rlhf.value_lr={config.value_lr:g}" if config.value_lr is not None else ""
            raise NonFiniteGradientsError(
                f"gradients were NaN or infinite in {state.nonfinite_updates} updates in a row, in iteration "
                f"{state.iteration} (rlhf.max_nonfinite_updates={config.max_nonfinite_updates}): lower "
                f"rlhf.lr={config.lr:g}{critic}, or look for an unbounded reward"
            )


def _targets_of_all_ranks(batches: Sequence[Batch], counts: bool) -> float:
    """Number of targets in the loss masks of all ranks (collective)."""
    own = sum(float(batch.loss_mask_BT.sum()) for batch in batches) if counts else 0.0
    total = torch.tensor(own, dtype=torch.float64, device=batches[0].tokens_BT.device)
    dist.all_reduce(total)
    return float(total)


def _counted(state: RlhfState, results: Sequence[StepResult]) -> RlhfState:
    """The state after one update."""
    return replace(
        state,
        policy_updates=state.policy_updates + 1,
        value_updates=state.value_updates + len(results) - 1,
        nonfinite_updates=0 if all(result.applied for result in results) else state.nonfinite_updates + 1,
    )
