"""The training loop: data, step, evaluation, checkpoint, metrics. It depends on no stage and no layout."""

import logging
import math
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from dist_lm.config.root import Config
from dist_lm.data.batch import Batch
from dist_lm.data.stream import StepData, StepStream
from dist_lm.errors import UserError
from dist_lm.model.keyed_random import DropoutKey
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import World
from dist_lm.parallel.sharding import reshard
from dist_lm.tracking.metrics import MetricsWriter
from dist_lm.training import checkpoint_files
from dist_lm.training.checkpoint_saver import CheckpointSaver
from dist_lm.training.heartbeat import Heartbeat, Phase, StopRequest
from dist_lm.training.objective import Objective, Prepare
from dist_lm.training.optimizer import muon_momentum, set_learning_rate, set_momentum, stage_rate
from dist_lm.training.state import TrainState
from dist_lm.training.step import StepResult, accumulate_gradients, update
from dist_lm.training.step_meter import Laps, StepMeter
from dist_lm.training.step_profiler import StepProfiler

log = logging.getLogger(__name__)

DETAILED_EVERY = 10  # steps; at least so many between lines with details

Evaluate = Callable[[Transformer, bool, Callable[[], None]], dict[str, float]]
"""(model, whether to use all held-out data, a function to call after every batch) -> metrics, equal on all ranks."""


class StepTasks(Protocol):
    """What is measured beside validation (collective)."""

    def reached(self, step: int) -> None:
        """So many steps are done; it writes its own metrics."""

    def before_checkpoint(self) -> None:
        """Called before each checkpoint."""


class NonFiniteGradientsError(UserError):
    """NaN or infinite gradients for too many steps in a row."""


@dataclass(frozen=True)
class Trainer:
    """The parts of a training run."""

    config: Config
    world: World
    counts_once: bool  # whether this rank's sums count: True on one of the ranks that see the same data
    model: Transformer
    optimizer: torch.optim.Optimizer
    objective: Objective
    stream: StepStream
    evaluate: Evaluate
    checkpoints: Path
    metrics: MetricsWriter | None  # on the first rank
    stop: StopRequest
    heartbeat: Heartbeat
    flops_per_token: int
    peak_flops: float  # of all ranks together; 0: unknown
    bytes_per_token: float = 0.0  # of the training text; 0: unknown
    profiler: StepProfiler | None = None
    prepare: Prepare | None = None  # called before the passes of a step
    tasks: StepTasks | None = None

    def __post_init__(self) -> None:
        self.model.document_mask = self.config.stage.document_mask

    def run(self, state: TrainState) -> TrainState:
        """Train from `state` to the last step, or to the step at which all ranks agreed to stop.

        Raises:
            NonFiniteGradientsError: after stage.max_nonfinite_steps skipped steps in a row.
            CheckpointWriteError: a checkpoint could not be written; raised when the next one is due, or at the end.
        """
        stage = self.config.stage
        if stage.eval_at_start and state.step == 0:
            line = self._evaluate(0, everything=True)
            if self.metrics:
                self.metrics.write(0, line)
            if self.tasks:
                self.tasks.reached(0)
        meter = StepMeter(self.world, self.optimizer, stage.steps, self.model.blocks)
        with self._saver() as saver, self.profiler or nullcontext():
            while state.step < stage.steps:
                if self.profiler:
                    self.heartbeat.beat(Phase.TRACING, state.step)  # a long trace is no hang
                    self.profiler.reached(state.step)
                meter.begin(self.is_detailed(state.step + 1))
                rate = stage_rate(stage, state.step)
                self.heartbeat.beat(Phase.DATA, state.step)
                data = next(self.stream)
                meter.data_came()
                self.heartbeat.beat(Phase.STEP, state.step)
                laps = self.profiler.marked(meter.laps) if self.profiler else meter.laps
                result = self.step(state, data, rate, laps)
                state = advance(state, result, data.position)
                if stage.ema_decay:
                    self._follow_average(state.step)
                meter.end(state.step, result.tokens)
                last = state.step == stage.steps
                score = None
                evaluated = last or is_due(state.step, stage.eval_every)
                written = evaluated or is_due(state.step, stage.log_every)
                line = self.metrics_of(state, result, rate, meter) if written else {}
                if evaluated:
                    line |= self._evaluate(state.step, last)
                    if stage.ema_decay:
                        line |= self._evaluate_average(state.step, last)
                    # the score of every checkpoint is on the same sequences, that of the last one too
                    others = last and stage.eval_sequences > 0
                    score = self._evaluate(state.step, False)["val/loss"] if others else line["val/loss"]
                if self.metrics and written:
                    self.metrics.write(state.step, line)
                if self.tasks:
                    self.tasks.reached(state.step)
                self._check_finite(state, saver)
                final = last or result.stop_requested
                if final or is_due(state.step, stage.checkpoint_every):
                    state = self._save(saver, state, score, final)
                if result.stop_requested:
                    log.info("stopped at step %d as requested; the checkpoint is written", state.step)
                    break
            else:
                if self.profiler:
                    self.profiler.reached(state.step)
        return state

    def _evaluate(self, step: int, everything: bool) -> dict[str, float]:
        def alive() -> None:
            self.heartbeat.beat(Phase.EVALUATING, step)

        alive()
        metrics = self.evaluate(self.model, everything, alive)
        reshard(self.model)  # a checkpoint needs the shards
        return metrics

    def _follow_average(self, step: int) -> None:
        from dist_lm.training.averages import follow

        follow(self.optimizer, self.config.stage.ema_decay, step)

    def _evaluate_average(self, step: int, everything: bool) -> dict[str, float]:
        from dist_lm.training.averages import measured

        return measured(self.optimizer, partial(self._evaluate, step, everything))

    def step(self, state: TrainState, data: StepData, rate: float, laps: Laps | None = None) -> StepResult:
        """One optimizer step at learning rate `rate` (collective)."""
        stage, model = self.config.stage, self.model
        batches: Sequence[Batch] = [batch.to(self.world.device) for batch in data.micro_batches]
        if self.prepare:
            batches = self.prepare(model, batches)
        set_learning_rate(self.optimizer, rate)
        set_momentum(self.optimizer, muon_momentum(stage, state.step))
        model.dropout = DropoutKey(stage.dropout, self.config.seed, state.step) if stage.dropout else None
        every = self.config.parallel.reduce_every_micro_batch
        sums = accumulate_gradients(model, self.objective, batches, every, laps)
        model.dropout = None
        return update(
            model,
            self.optimizer,
            sums,
            grad_clip=stage.grad_clip,
            counts=self.counts_once,
            stop=self.stop,
            tokens=data.tokens,
            laps=laps,
        )

    def metrics_of(self, state: TrainState, result: StepResult, rate: float, meter: StepMeter) -> dict[str, float]:
        """The line of metrics of a step (collective)."""
        stage = self.config.stage
        line = {
            "train/loss": result.loss,
            "train/grad_norm": result.grad_norm,
            "train/lr": rate,
            "train/tokens": state.tokens,
            "train/skipped_steps": state.skipped_steps,
            "train/loss_spikes": state.loss_spikes,
            "perf/memory_gib": peak_memory_gib(self.world.device),
        }
        line |= {f"train/grad_norm_{group}": norm for group, norm in result.grad_norms.items()}
        line |= result.metrics | meter.line()
        if self.peak_flops:
            flops = self.flops_per_token * stage.global_batch * stage.seq_len
            line["perf/mfu"] = flops / line["perf/step_s"] / self.peak_flops
        if self.bytes_per_token:
            line["perf/bytes_per_token"] = self.bytes_per_token
        if self.is_detailed(state.step):
            line |= meter.details()
        return line

    def is_detailed(self, step: int) -> bool:
        """Whether the line of `step` has the metrics that cost a pass over the parameters."""
        return step == self.config.stage.steps or is_due(step, detailed_every(self.config.stage.log_every))

    def _check_finite(self, state: TrainState, saver: CheckpointSaver) -> None:
        limit = self.config.stage.max_nonfinite_steps
        if state.nonfinite_steps >= limit:
            saver.wait()
            latest = checkpoint_files.read_pointer(self.checkpoints, checkpoint_files.LATEST)
            raise NonFiniteGradientsError(
                f"gradients were NaN or infinite in {limit} steps in a row, the last is step {state.step} "
                f"(stage.max_nonfinite_steps={limit}); the last checkpoint is "
                f"{latest.name if latest else 'none yet'}: lower stage.lr={self.config.stage.lr:g}, raise "
                "stage.warmup_steps, with another run_id, or look for bad data"
            )

    def _saver(self) -> CheckpointSaver:
        stage = self.config.stage
        return CheckpointSaver(
            self.checkpoints,
            self.model.config,
            self.world,
            keep=stage.keep_checkpoints,
            beside_training=stage.checkpoint_async,
        )

    def _save(self, saver: CheckpointSaver, state: TrainState, val_loss: float | None, final: bool) -> TrainState:
        if val_loss is not None and is_better(val_loss, state.best_val_loss):
            state = replace(state, best_val_loss=val_loss, best_step=state.step)
        self.heartbeat.beat(Phase.SAVING, state.step)
        if self.tasks:
            self.tasks.before_checkpoint()
        if self.metrics:
            self.metrics.sync()
        started = time.perf_counter()
        saver.save(self.model, self.optimizer, state)
        if final:
            saver.wait()
        if self.metrics:
            self.metrics.write(state.step, {"checkpoint/stall_s": time.perf_counter() - started})
        return state


def advance(state: TrainState, result: StepResult, position: int) -> TrainState:
    """The state after a step; a skipped step also consumes its data."""
    return replace(
        state,
        step=state.step + 1,
        tokens=state.tokens + int(result.count),
        position=position,
        nonfinite_steps=0 if result.applied else state.nonfinite_steps + 1,
        skipped_steps=state.skipped_steps + (not result.applied),
        loss_spikes=state.loss_spikes + state.loss_trend.is_spike(result.loss),
        loss_trend=state.loss_trend.after(result.loss),
    )


def is_better(val_loss: float, best: float | None) -> bool:
    """Whether a checkpoint with this score is the best one; NaN or infinity never is, and does not stay."""
    return math.isfinite(val_loss) and (best is None or not best <= val_loss)


def detailed_every(log_every: int) -> int:
    """Steps between lines with details: a multiple of `log_every`, because only those steps write a line."""
    return log_every * math.ceil(DETAILED_EVERY / log_every)


def is_due(step: int, every: int) -> bool:
    """Whether `step` is a multiple of `every` (0: never)."""
    return every > 0 and step % every == 0


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this rank: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
