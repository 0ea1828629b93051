"""The loop: data, step, evaluation, checkpoint, metrics. It knows no stage and no layout."""

import logging
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from dist_lm.config import Config
from dist_lm.data.batch import Batch
from dist_lm.data.stream import SequenceStream, StepData
from dist_lm.errors import UserError
from dist_lm.model.dropout import DropoutKey
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import World
from dist_lm.tracking.metrics import MetricsWriter
from dist_lm.training import checkpoint, checkpoint_files
from dist_lm.training.objective import Forward, Objective
from dist_lm.training.optimizer import set_learning_rate
from dist_lm.training.schedule import learning_rate
from dist_lm.training.state import TrainState
from dist_lm.training.step import StepResult, train_step
from dist_lm.training.stop import StopRequest

log = logging.getLogger(__name__)

Evaluate = Callable[[Forward, bool], dict[str, float]]
"""(forward, whether to take all held-out data) -> metrics, the same on every rank."""


class NonFiniteGradientsError(UserError):
    """NaN or infinite gradients for too many steps in a row."""


@dataclass(frozen=True)
class Trainer:
    """The parts of a training run."""

    config: Config
    world: World
    group: dist.ProcessGroup  # ranks that see different data
    model: Transformer
    optimizer: torch.optim.Optimizer
    objective: Objective
    stream: SequenceStream
    evaluate: Evaluate
    checkpoints: Path
    metrics: MetricsWriter | None  # on the first rank
    stop: StopRequest
    flops_per_token: int
    peak_flops: float  # of all ranks together; 0: unknown

    def run(self, state: TrainState) -> TrainState:
        """Train from `state` to the last step, or to the step at which a stop was agreed on.

        Raises:
            NonFiniteGradientsError: after stage.max_nonfinite_steps skipped steps in a row.
            CheckpointWriteError: a checkpoint could not be written.
        """
        stage = self.config.stage
        while state.step < stage.steps:
            started = time.perf_counter()
            rate = self._learning_rate(state.step)
            data = next(self.stream)
            waited = time.perf_counter() - started
            result = self._step(state, data, rate)
            state = advance(state, result, data.position)
            line = self._metrics_of(state, result, rate, waited, time.perf_counter() - started)
            last = state.step == stage.steps
            score = None
            evaluated = last or is_due(state.step, stage.eval_every)
            if evaluated:
                line |= self._evaluate(last)
                # on the way and at the end by the same sequences
                score = self._evaluate(False)["val/loss"] if last else line["val/loss"]
            if self.metrics and (evaluated or last or state.step % stage.log_every == 0):
                self.metrics.write(state.step, line)
            self._check_finite(state)
            if last or result.stop_requested or is_due(state.step, stage.checkpoint_every):
                state = self._save(state, score)
            if result.stop_requested:
                log.info("stopped at step %d as asked; the checkpoint is written", state.step)
                break
        return state

    def forward(self, dropout: DropoutKey | None) -> Forward:
        """The model as objectives and evaluators see it."""
        rate, masked = (dropout.rate if dropout else 0.0), self.config.stage.document_mask

        def call(batch: Batch) -> torch.Tensor:
            return self.model(
                batch.tokens_BT,
                document_BT=batch.document_BT if masked else None,
                position_BT=batch.position_BT,
                dropout=replace(dropout, sequence_B=batch.sequence_B) if dropout and rate else None,
            )

        return call

    def _evaluate(self, everything: bool) -> dict[str, float]:
        metrics = self.evaluate(self.forward(None), everything)
        # a forward without backward may leave parameters gathered: a checkpoint would take them for other tensors
        # than those the optimizer knows
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return metrics

    def _learning_rate(self, step: int) -> float:
        stage = self.config.stage
        return learning_rate(
            step,
            peak=stage.lr,
            warmup_steps=stage.warmup_steps,
            steps=stage.steps,
            min_ratio=stage.min_lr_ratio,
        )

    def _step(self, state: TrainState, data: StepData, rate: float) -> StepResult:
        stage, device = self.config.stage, self.world.device
        set_learning_rate(self.optimizer, rate)
        key = DropoutKey(
            rate=stage.dropout,
            seed=self.config.seed,
            step=state.step,
            sequence_B=torch.empty(0, dtype=torch.int64),
        )
        return train_step(
            self.model,
            self.optimizer,
            self.forward(key),
            self.objective,
            [batch.to(device) for batch in data.micro_batches],
            grad_clip=stage.grad_clip,
            group=self.group,
            stop_requested=self.stop.requested,
        )

    def _metrics_of(
        self, state: TrainState, result: StepResult, rate: float, waited: float, elapsed: float
    ) -> dict[str, float]:
        tokens_per_s = self.config.stage.global_batch * self.config.stage.seq_len / elapsed
        line = {
            "train/loss": result.loss,
            "train/grad_norm": result.grad_norm,
            "train/lr": rate,
            "train/tokens": state.tokens,
            "train/skipped_steps": state.skipped_steps,
            "perf/tokens_per_s": tokens_per_s,
            "perf/step_s": elapsed,
            "perf/data_wait_s": waited,
            "perf/memory_gib": peak_memory_gib(self.world.device),
        }
        if self.peak_flops:
            line["perf/mfu"] = tokens_per_s * self.flops_per_token / self.peak_flops
        return line | result.metrics

    def _check_finite(self, state: TrainState) -> None:
        limit = self.config.stage.max_nonfinite_steps
        if state.nonfinite_steps >= limit:
            latest = checkpoint_files.read_pointer(self.checkpoints, checkpoint_files.LATEST)
            raise NonFiniteGradientsError(
                f"gradients were NaN or infinite in {limit} steps in a row, the last is step {state.step} "
                f"(stage.max_nonfinite_steps={limit}); the last checkpoint is "
                f"{latest.name if latest else 'none yet'}: lower stage.lr={self.config.stage.lr:g}, raise "
                "stage.warmup_steps, with another run_id, or look for bad data"
            )

    def _save(self, state: TrainState, val_loss: float | None) -> TrainState:
        if val_loss is not None and (state.best_val_loss is None or val_loss < state.best_val_loss):
            state = replace(state, best_val_loss=val_loss, best_step=state.step)
        started = time.perf_counter()
        checkpoint.save(self.checkpoints, self.model, self.optimizer, state, self.config.model, self.world)
        if self.world.is_first:
            self._tidy(state)
        dist.barrier()
        if self.metrics:
            self.metrics.write(state.step, {"checkpoint/stall_s": time.perf_counter() - started})
        return state

    def _tidy(self, state: TrainState) -> None:
        """Point BEST at what the state says (a kill may have come before the pointer), then drop old checkpoints."""
        best = self.checkpoints / checkpoint_files.step_name(state.best_step)
        if state.best_val_loss is not None and best.is_dir():
            checkpoint_files.write_pointer(self.checkpoints, checkpoint_files.BEST, best)
        checkpoint_files.prune(self.checkpoints, self.config.stage.keep_checkpoints)


def advance(state: TrainState, result: StepResult, position: int) -> TrainState:
    """The state after a step; a skipped step consumes its data all the same."""
    return replace(
        state,
        step=state.step + 1,
        tokens=state.tokens + int(result.count),
        position=position,
        nonfinite_steps=0 if result.applied else state.nonfinite_steps + 1,
        skipped_steps=state.skipped_steps + (not result.applied),
    )


def is_due(step: int, every: int) -> bool:
    """Whether something done every `every` steps (0: never) falls on `step`."""
    return every > 0 and step % every == 0


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this rank has held: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
