"""The training loop: data, step, evaluation, checkpoint, metrics. It depends on no stage and no layout."""

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from dist_lm.config.root import Config
from dist_lm.data.batch import Batch
from dist_lm.data.epochs import CorpusPass, epochs_of
from dist_lm.data.stream import StepData, StepStream
from dist_lm.errors import UserError
from dist_lm.model.keyed_random import DropoutKey
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import World
from dist_lm.parallel.sharding import reshard
from dist_lm.tracking.metrics import MetricsWriter
from dist_lm.training import averages, checkpoint_files
from dist_lm.training.checkpoint_saver import CheckpointSaver
from dist_lm.training.heartbeat import Heartbeat, Phase, StopRequest
from dist_lm.training.objective import Objective, Prepare
from dist_lm.training.optimizer import ShardedAdamW, muon_momentum, set_learning_rate, set_momentum, stage_rate
from dist_lm.training.state import TrainState, advance
from dist_lm.training.step import StepResult, accumulate_gradients, update
from dist_lm.training.step_meter import Laps, StepMeter, peak_memory_gib
from dist_lm.training.step_profiler import StepProfiler

log = logging.getLogger(__name__)

# Python collects garbage whenever enough objects have been made, so on many ranks some rank pauses in almost every
# step, and all others wait for it. Here all ranks pause after the same steps, and scan only what training has made.
COLLECT_EVERY = 50  # steps between collections of garbage
DETAILED_EVERY = 10  # at least so many steps lie between two lines with details

Evaluate = Callable[[Transformer, bool, Callable[[], None]], dict[str, float]]
"""A function (model, whether to use all held-out data, a function to call after every batch) -> metrics, equal on all
ranks."""


class StepTasks(Protocol):
    """Measurements beside validation, such as generated samples (collective)."""

    def reached(self, step: int) -> None:
        """Measures after `step` completed steps, if it is due, and writes its own metrics."""

    def before_checkpoint(self) -> None:
        """Finishes what the next checkpoint must include."""


class NonFiniteGradientsError(UserError):
    """Gradients were NaN or infinite for too many steps in a row."""


@dataclass(frozen=True)
class Trainer:
    """Trains a model. It owns the loop; the program of a rank builds the parts."""

    config: Config
    world: World
    # whether the loss sums of this rank count in the all-reduce: ranks of tp and cp see the same data, so rank 0 counts
    adds_sums: bool
    model: Transformer
    optimizer: ShardedAdamW
    objective: Objective
    stream: StepStream
    evaluate: Evaluate
    checkpoints: Path
    metrics: MetricsWriter | None  # on the first rank
    stop: StopRequest
    heartbeat: Heartbeat
    flops_per_token: int
    peak_flops: float  # FLOP/s, sum over ranks; 0: unknown
    bytes_per_token: float = 0.0  # UTF-8 bytes of the training text per token; 0: unknown
    passes: Sequence[CorpusPass] = ()  # corpora of `stream`, that of the stage first
    profiler: StepProfiler | None = None
    prepare: Prepare | None = None  # called on the micro-batches before the passes of a step
    tasks: StepTasks | None = None

    def __post_init__(self) -> None:
        self.model.document_mask = self.config.stage.document_mask

    def run(self, state: TrainState) -> TrainState:
        """Trains from `state` to the last step, or to the step at which all ranks agreed to stop (collective).

        Model and optimizer change in place; metrics, checkpoints and, if asked for, a profile are written. What
        `stream`, `prepare`, `evaluate` and `tasks` raise passes, without a new checkpoint.

        Returns:
            The state after the last step taken, which the last checkpoint also holds.

        Raises:
            NonFiniteGradientsError: after stage.max_nonfinite_steps skipped steps in a row.
            CheckpointWriteError: a checkpoint could not be written; raised after the next step, or at the end.
            StrangerError: another user has connected to a port of this rank.
        """
        stage = self.config.stage
        if stage.eval_at_start and state.step == 0:
            self._evaluate_untrained()

        # The meter hooks into the blocks, so it exists once per attempt, not per step.
        meter = StepMeter(self.world, self.optimizer, stage.steps, self.model.blocks)
        with self._saver() as saver, self.profiler or nullcontext(), ScheduledCollection() as garbage:
            while state.step < stage.steps:
                self._advance_profiler(state.step)
                meter.begin(self.is_detailed(state.step + 1))

                # Data: this rank's micro-batches of the next global batch.
                self.heartbeat.beat(Phase.DATA, state.step)
                self.stream.wait(partial(self.heartbeat.beat, Phase.DATA, state.step))
                step_data = next(self.stream)
                meter.data_came()

                # All ranks agree to stop at this step, and its checkpoint raises the error on each of them.
                if saver.has_failed:
                    self.stop.requested = True

                # Step: forward and backward passes, then the update. The outcome is the same on every rank.
                self.heartbeat.beat(Phase.STEP, state.step)
                rate = stage_rate(stage, state.step)
                laps = self.profiler.marked(meter.laps) if self.profiler else meter.laps
                outcome = self.step(state, step_data, rate, laps)
                state = advance(state, outcome, step_data.position)
                if stage.ema_decay:
                    averages.follow(self.optimizer, stage.ema_decay, state.step)
                meter.end(state.step, outcome.tokens)
                garbage.after_step(state.step)

                # Metrics, and the held-out loss if it is due.
                val_loss = self._report(state, outcome, rate, meter, garbage)
                if self.tasks:
                    with garbage.automatic():
                        self.tasks.reached(state.step)
                self._check_finite(state, saver)

                # Checkpoint, always after the last step: the next attempt or stage begins there.
                is_final = state.step == stage.steps or outcome.stop_requested
                if is_final or is_due(state.step, stage.checkpoint_every):
                    state = self._save(saver, state, val_loss, is_final)
                if outcome.stop_requested:
                    log.info("stopped at step %d as requested; the checkpoint is written", state.step)
                    return state

            if self.profiler:
                self.profiler.reached(state.step)  # writes the trace if the window includes the last step
        return state

    def step(self, state: TrainState, data: StepData, rate: float, laps: Laps | None = None) -> StepResult:
        """Takes one optimizer step at learning rate `rate` and returns its outcome (collective).

        Model and optimizer change in place, unless the gradients are not finite (`StepResult.applied`). What `prepare`
        raises passes.

        Args:
            state: counters before the step; a caller makes those after it with `advance`.
            rate: the rate of `stage.lr`; groups follow in proportion.
            data: this rank's micro-batches, in host memory.
            laps: measures the parts of the step; given on every rank or on none.
        """
        stage, model = self.config.stage, self.model

        # All micro-batches go to the device at once: copies from pinned memory overlap with the first passes.
        micro_batches: Sequence[Batch] = [batch.to(self.world.device) for batch in data.micro_batches]
        if self.prepare:
            micro_batches = self.prepare(model, micro_batches)

        # The schedule is a function of the step, so a resumed run needs no scheduler state.
        set_learning_rate(self.optimizer, rate)
        set_momentum(self.optimizer, muon_momentum(stage, state.step))

        # The key holds the step, so a resumed run drops what the uninterrupted run would have dropped. It is set for
        # the training passes only: evaluation uses the same model without dropout.
        if stage.dropout or stage.lora.dropout:
            model.dropout = DropoutKey(stage.dropout, self.config.seed, state.step, adapter_rate=stage.lora.dropout)
        reduces_every = self.config.parallel.reduce_every_micro_batch
        sums = accumulate_gradients(model, self.objective, micro_batches, reduces_every, laps)
        model.dropout = None

        return update(
            model,
            self.optimizer,
            sums,
            grad_clip=stage.grad_clip,
            adds_sums=self.adds_sums,
            stop=self.stop,
            tokens=data.tokens,
            laps=laps,
        )

    def _report(
        self, state: TrainState, outcome: StepResult, rate: float, meter: StepMeter, garbage: "ScheduledCollection"
    ) -> float | None:
        """Measures and writes the metrics of a step if they are due (collective); after the last step they are due,
        with the loss on all held-out data.

        Returns:
            The held-out loss by which this checkpoint competes for BEST, in nats per token; None if nothing was
            evaluated.
        """
        stage = self.config.stage
        is_last = state.step == stage.steps
        evaluates = is_last or is_due(state.step, stage.eval_every)
        if not evaluates and not is_due(state.step, stage.log_every):
            return None

        line = self.metrics_of(state, outcome, rate, meter)
        val_loss = None
        if evaluates:
            with garbage.automatic():
                held_out, val_loss = self._evaluate_after(state.step, is_last)
            line |= held_out
        if self.metrics:
            self.metrics.write(state.step, line)
        return val_loss

    def _evaluate_after(self, step: int, is_last: bool) -> tuple[dict[str, float], float]:
        """Returns the held-out metrics after `step`, and the loss by which its checkpoint competes for BEST
        (collective)."""
        stage = self.config.stage
        metrics = self._evaluate(step, everything=is_last)
        if stage.ema_decay:
            metrics |= averages.measured(self.optimizer, partial(self._evaluate, step, is_last))

        # The last step is evaluated twice: on all held-out data for the report, and on `eval_sequences`, so that
        # checkpoints are compared on the same sequences.
        val_loss = metrics["val/loss"]
        if is_last and stage.eval_sequences > 0:
            val_loss = self._evaluate(step, everything=False)["val/loss"]
        return metrics, val_loss

    def metrics_of(self, state: TrainState, result: StepResult, rate: float, meter: StepMeter) -> dict[str, float]:
        """Returns the metrics of a step by their names, without held-out metrics; nothing is written. Collective if
        `is_detailed`.

        It resets the meter for the next line. Norms by group are there if `result` has them, MFU if the peak is known.

        Args:
            state: counters after the step.
        """
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
        line |= epochs_of(self.passes, state.position)
        line |= {f"train/grad_norm_{group}": norm for group, norm in result.grad_norms.items()}
        line |= result.metrics | meter.line()

        # MFU counts the planned tokens of a step, also if some of them are padding.
        if self.peak_flops:
            flops_per_step = self.flops_per_token * stage.global_batch * stage.seq_len
            line["perf/mfu"] = flops_per_step / line["perf/step_s"] / self.peak_flops
        if self.bytes_per_token:
            line["perf/bytes_per_token"] = self.bytes_per_token
        # These need another all-reduce and a copy of the parameters, so only some lines have them.
        if self.is_detailed(state.step):
            line |= meter.details()
        return line

    def is_detailed(self, step: int) -> bool:
        """Returns whether the line of `step` has the metrics that cost a pass over the parameters."""
        return step == self.config.stage.steps or is_due(step, detailed_every(self.config.stage.log_every))

    def _evaluate_untrained(self) -> None:
        line = self._evaluate(0, everything=True)
        if self.metrics:
            self.metrics.write(0, line)
        if self.tasks:
            self.tasks.reached(0)

    def _evaluate(self, step: int, everything: bool) -> dict[str, float]:
        """Returns held-out metrics; `everything`: on all held-out data, not on `stage.eval_sequences` (collective)."""

        def beat() -> None:
            self.heartbeat.beat(Phase.EVALUATING, step)

        beat()
        metrics = self.evaluate(self.model, everything, beat)
        reshard(self.model)  # a checkpoint needs the shards
        return metrics

    def _advance_profiler(self, step: int) -> None:
        if self.profiler:
            self.heartbeat.beat(Phase.TRACING, step)  # writing a trace may take minutes, which is no hang
            self.profiler.reached(step)

    def _check_finite(self, state: TrainState, saver: CheckpointSaver) -> None:
        """Refuses to go on after too many skipped steps; then it first waits for the checkpoint that is being written
        (collective).

        Raises:
            NonFiniteGradientsError: stage.max_nonfinite_steps steps in a row were skipped.
            CheckpointWriteError: that checkpoint could not be written.
        """
        limit = self.config.stage.max_nonfinite_steps
        if state.nonfinite_steps < limit:
            return
        saver.wait()
        latest = checkpoint_files.read_pointer(self.checkpoints, checkpoint_files.LATEST)
        raise NonFiniteGradientsError(
            f"gradients were NaN or infinite in {limit} steps in a row, the last is step {state.step} "
            f"(stage.max_nonfinite_steps={limit}); the last checkpoint is "
            f"{latest.name if latest else 'none yet'}: lower stage.lr={self.config.stage.lr:g}, raise "
            "stage.warmup_steps, with another run_id, or look for bad data"
        )

    def _saver(self) -> CheckpointSaver:
        """Returns a new saver of this run's checkpoints, with a thread and a process group of its own (collective)."""
        stage = self.config.stage
        return CheckpointSaver(
            self.checkpoints,
            self.model.config,
            self.world,
            keep=stage.keep_checkpoints,
            asynchronous=stage.checkpoint_async,
        )

    def _save(self, saver: CheckpointSaver, state: TrainState, val_loss: float | None, is_final: bool) -> TrainState:
        """Saves a checkpoint, after all metrics are on disk, and writes the seconds that it held up training as a
        metric (collective).

        Args:
            val_loss: held-out loss of the checkpoint; None: it was not evaluated and cannot become the best one.
            is_final: waits until the checkpoint is written.

        Returns:
            The saved state, which names the best checkpoint so far.

        Raises:
            CheckpointWriteError: the previous checkpoint could not be written, or this one if `is_final` or not
                asynchronous. What `tasks.before_checkpoint` raises passes.
        """
        if val_loss is not None and is_better(val_loss, state.best_val_loss):
            state = replace(state, best_val_loss=val_loss, best_step=state.step)
        self.heartbeat.beat(Phase.SAVING, state.step)

        # Metrics up to this step must be on disk first: a run that resumes here does not write them again.
        if self.tasks:
            self.tasks.before_checkpoint()
        if self.metrics:
            self.metrics.sync()

        started = time.perf_counter()
        saver.save(self.model, self.optimizer, state)
        if is_final:
            saver.wait()
        if self.metrics:
            self.metrics.write(state.step, {"checkpoint/stall_s": time.perf_counter() - started})
        return state


def is_better(val_loss: float, best: float | None) -> bool:
    """Returns whether a checkpoint with this loss is the best so far; one with NaN or infinity never is."""
    return math.isfinite(val_loss) and (best is None or not best <= val_loss)


def detailed_every(log_every: int) -> int:
    """Returns the steps between lines with details: a multiple of `log_every`, since only these steps write a line."""
    return log_every * math.ceil(DETAILED_EVERY / log_every)


def is_due(step: int, every: int) -> bool:
    """Returns whether `step` is a multiple of `every`; never if `every` is 0."""
    return every > 0 and step % every == 0


@contextmanager
def without_collection() -> Iterator[None]:
    """Turns automatic collection off inside the block, for the whole process."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class ScheduledCollection:
    """A context manager that turns automatic collection off inside its block, for the whole process.

    Afterwards the collector is as it was before, also after an error: other stages may run in the process.
    """

    def __init__(self) -> None:
        self._was_enabled = False
        self._froze = False
        self._is_cost_known = False

    def __enter__(self) -> Self:
        self._was_enabled = gc.isenabled()
        gc.disable()
        gc.collect()

        # Collections scan what set-up has left no more. What somebody else has frozen could not be told apart later.
        self._froze = gc.get_freeze_count() == 0
        if self._froze:
            gc.freeze()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._froze:
            gc.unfreeze()
        if self._was_enabled:
            gc.enable()

    def after_step(self, step: int) -> None:
        """Collects if it is due after `step` completed steps; the first time, logs what that costs."""
        if step % COLLECT_EVERY:
            return
        started = time.perf_counter()
        gc.collect()

        if not self._is_cost_known:
            self._is_cost_known = True
            elapsed_ms = 1000 * (time.perf_counter() - started)
            log.info("garbage is collected every %d steps: the first time took %.1f ms", COLLECT_EVERY, elapsed_ms)

    @contextmanager
    def automatic(self) -> Iterator[None]:
        """Lets Python collect as before inside the block: for long work between steps, such as an evaluation."""
        if self._was_enabled:
            gc.enable()
        try:
            yield
        finally:
            gc.disable()
