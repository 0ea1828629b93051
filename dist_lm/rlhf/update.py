"""The updates of an iteration: passes over its rollouts in minibatches, each a step of policy and critic.

Dimensions: B rollouts, T tokens of the longest completion, N drawn tokens of a micro-batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from dist_lm.config.rlhf import RlhfConfig
from dist_lm.data.batch import Batch
from dist_lm.rlhf.algorithm import Algorithm, DrawnTokens
from dist_lm.rlhf.beside import Beside, one_after_other
from dist_lm.rlhf.models import RlhfModels, Trained
from dist_lm.rlhf.packed_rollouts import RolloutBatch
from dist_lm.rlhf.state import RlhfState
from dist_lm.training.forward import BoundModel
from dist_lm.training.loss import next_token
from dist_lm.training.objective import LossModel, LossSum, Objective
from dist_lm.training.step import StepResult, train_step
from dist_lm.training.stop import StopRequest
from dist_lm.training.trainer import NonFiniteGradientsError

Columns = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Minibatch:
    """What is seen together in one update."""

    batches: Sequence[RolloutBatch]  # this rank's, on the models' device
    tokens: int  # drawn tokens over all ranks


Passes = Callable[[int], Sequence[Minibatch]]
"""(number of a pass) -> its minibatches, in their order."""
Pretraining = Callable[[int], Sequence[Batch]]
"""(number of an update since the start of the run) -> this rank's micro-batches of text, on the models' device."""


@dataclass(frozen=True)
class Updates:
    """What the updates of an iteration did, the same on every rank."""

    state: RlhfState
    metrics: Sequence[Mapping[str, float]]  # of each update: means over its tokens before it was made
    stop_requested: bool
    ended_by_kl: bool


def policy_objective(
    algorithm: Algorithm, columns: Columns, config: RlhfConfig, pretraining_share: float = 0.0
) -> Objective:
    """The policy's loss on rollouts, and the next-token loss on batches that are none (PPO-ptx: Ouyang et al. 2022,
    equation 2).

    Args:
        columns: (B, T) each.
        pretraining_share: drawn tokens for each pretraining token: a step divides by the former, and so both are means.
    """
    flat = {name: column.flatten() for name, column in columns.items()}
    longest = next(iter(columns.values())).shape[1]
    plain = next_token()

    def objective(model: LossModel, batch: Batch) -> LossSum:
        if not isinstance(batch, RolloutBatch):
            loss = plain(model, batch)
            total = loss.total * pretraining_share
            metrics = {"pretrain_loss": total.detach()}
            return LossSum(config.pretrain_coefficient * total, torch.zeros_like(loss.count), metrics)
        now = model.logprobs(batch, config.temperature, entropy_gradient=algorithm.uses_entropy)
        drawn = DrawnTokens(
            logprob_N=now.logprob_BT.flatten()[batch.counted_N],
            entropy_N=now.entropy_BT.flatten()[batch.counted_N],
            rollout_N=batch.drawn_N // longest,
            columns={name: column[batch.drawn_N] for name, column in flat.items()},
        )
        return algorithm.policy_loss(drawn)

    return objective


def critic_objective(algorithm: Algorithm, columns: Columns) -> Objective:
    """The critic's loss on rollouts; `columns` (B, T) each."""
    flat = {name: column.flatten() for name, column in columns.items()}

    def objective(model: LossModel, batch: Batch) -> LossSum:
        assert isinstance(batch, RolloutBatch)
        value_N = model.scores(batch, batch.counted_N).flatten()[batch.counted_N]
        return algorithm.value_loss(value_N, {name: column[batch.drawn_N] for name, column in flat.items()})

    return objective


def counted_over_ranks(batches: Sequence[Batch], counts: bool) -> float:
    """Targets that count in the batches of all ranks (collective)."""
    own = sum(float(batch.loss_mask_BT.sum()) for batch in batches) if counts else 0.0
    total = torch.tensor(own, dtype=torch.float64, device=batches[0].tokens_BT.device)
    dist.all_reduce(total)
    return float(total)


@dataclass(frozen=True)
class Updater:
    """How this rank updates policy and critic."""

    config: RlhfConfig
    algorithm: Algorithm
    models: RlhfModels
    chunk_bytes: int  # largest block of fp32 logits; 0: no limit
    counts: bool  # of the ranks that see the same rollouts, this is the one whose sums count
    reduce_every_micro_batch: bool
    stop: StopRequest
    pretraining: Pretraining | None = None
    alive: Callable[[], None] = lambda: None  # called before every update
    beside: Beside = one_after_other  # how policy and critic are updated

    def __call__(self, state: RlhfState, columns: Columns, passes: Passes) -> Updates:
        """All passes over an iteration's rollouts, or as many as `rlhf.stop_kl` leaves (collective).

        Raises:
            NonFiniteGradientsError: after rlhf.max_nonfinite_updates skipped updates in a row.
        """
        done: list[dict[str, float]] = []
        stopping = False
        for number in range(self.config.epochs):
            for minibatch in passes(number):
                self.alive()
                results = self._steps(state, columns, minibatch)
                state = _counted(state, results)
                self._check_finite(state)
                stopping = stopping or any(result.stop_requested for result in results)
                done.append(results[0].metrics | {"policy_grad_norm": results[0].grad_norm})
                if self.models.critic:
                    done[-1] |= results[1].metrics | {"value_grad_norm": results[1].grad_norm}
                if self.config.stop_kl and done[-1]["approx_kl"] > self.config.stop_kl:
                    return Updates(state, done, stopping, ended_by_kl=True)
        return Updates(state, done, stopping, ended_by_kl=False)

    def _steps(self, state: RlhfState, columns: Columns, minibatch: Minibatch) -> Sequence[StepResult]:
        """Of the policy, and of the critic where there is one."""
        critic = self.models.critic
        if not critic:
            return [self._policy_step(state, columns, minibatch)]
        return self.beside(
            lambda: self._policy_step(state, columns, minibatch),
            lambda: self._critic_step(critic, columns, minibatch),
        )

    def _policy_step(self, state: RlhfState, columns: Columns, minibatch: Minibatch) -> StepResult:
        batches: list[Batch] = list(minibatch.batches)
        share = 0.0
        if self.pretraining and self.config.pretrain_coefficient:
            texts = self.pretraining(state.policy_updates)
            share = minibatch.tokens / max(counted_over_ranks(texts, self.counts), 1.0)
            batches += texts
        objective = policy_objective(self.algorithm, columns, self.config, share)
        return self._step(self.models.policy, objective, batches)

    def _critic_step(self, critic: Trained, columns: Columns, minibatch: Minibatch) -> StepResult:
        return self._step(critic, critic_objective(self.algorithm, columns), minibatch.batches)

    def _step(self, trained: Trained, objective: Objective, batches: Sequence[Batch]) -> StepResult:
        return train_step(
            trained.model,
            trained.optimizer,
            BoundModel(trained.model, document_mask=True, chunk_bytes=self.chunk_bytes),
            objective,
            batches,
            grad_clip=self.config.grad_clip,
            counts=self.counts,
            stop=self.stop,
            reduce_every_micro_batch=self.reduce_every_micro_batch,
        )

    def _check_finite(self, state: RlhfState) -> None:
        if state.nonfinite_updates >= self.config.max_nonfinite_updates:
            raise NonFiniteGradientsError(
                f"gradients were NaN or infinite in {state.nonfinite_updates} updates in a row, in iteration "
                f"{state.iteration} (rlhf.max_nonfinite_updates={self.config.max_nonfinite_updates}): lower "
                f"rlhf.lr={self.config.lr:g} and rlhf.value_lr={self.config.value_lr:g}, or look for a reward that is "
                "not bounded"
            )


def _counted(state: RlhfState, results: Sequence[StepResult]) -> RlhfState:
    """The state after an update of the policy, and perhaps one of the critic."""
    return replace(
        state,
        policy_updates=state.policy_updates + 1,
        value_updates=state.value_updates + len(results) - 1,
        nonfinite_updates=0 if all(result.applied for result in results) else state.nonfinite_updates + 1,
    )
