"""Measures the cost of measuring: a training step with all its metrics, against the bare step, in one process.

The ratio of both times depends on how quiet the machine is. So the benchmark also reports `cost %`: thread seconds of
measuring alone (on the host of a GPU: wall seconds), in per cent of a bare step in the same unit. Other processes
change neither.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from dist_lm.bench.case import Case, Comparison, GroupSize, configurations, describe
from dist_lm.bench.rank import Trial, made_up_batch
from dist_lm.config.root import Config
from dist_lm.data.stream import StepData
from dist_lm.dry_run.rehearsal import trainer_of_steps
from dist_lm.parallel.layout import Layout
from dist_lm.parallel.mesh import World, build_mesh
from dist_lm.parallel.sharding import build_model
from dist_lm.parallel.values import squared_norms
from dist_lm.tracking.metrics import MetricsWriter
from dist_lm.training.objective import next_token
from dist_lm.training.optimizer import build_optimizer
from dist_lm.training.state import TrainState, advance
from dist_lm.training.step import StepResult, gradients_by_group
from dist_lm.training.step_meter import PARTS, StepMeter

MEASURED, BARE = "measured", "bare"
COST = "cost %"
TIMED_STEPS, TIMED_LINES = 5, 200
SHAPES = (
    ("model=nano", "stage.global_batch=16", "stage.seq_len=256"),  # a step of the quick start
    ("model=tiny", "model.vocab_size=4096", "stage.global_batch=8", "stage.seq_len=512"),
)


def cases(overrides: Sequence[str], quick: bool) -> list[Case]:
    """Returns cases of SHAPES (`quick`: of the first), or the one of `overrides`.

    Raises:
        ConfigError, ArtefactError, UserError: as `compose_config`.
    """
    size = GroupSize(1)
    return [
        Case(
            name=describe(config),
            config=config,
            variants={MEASURED: size, BARE: size},
            comparisons=(Comparison(variant=MEASURED, peer=BARE), Comparison(variant=MEASURED, fact=COST)),
            same_losses=frozenset({MEASURED, BARE}),
            rounds=40,
        )
        for config in configurations(SHAPES, overrides, quick)
    ]


def build(variant: str, config: Config, world: World) -> Trial:
    """Builds one variant, in one process.

    Raises:
        ConfigError: bf16 is asked for on a GPU without it.
    """
    training = MeasuredTraining(config, world)
    if variant == BARE:
        return Trial(lambda: training.step().loss)
    return Trial(training.measured_step, lambda: {COST: training.cost()})


class MeasuredTraining:
    """Runs the trainer on one made-up batch: its steps and its lines of metrics."""

    def __init__(
        self, config: Config, world: World, writer_at: Callable[[Path], MetricsWriter] = MetricsWriter
    ) -> None:
        """Builds model, optimizer, and a temporary directory for the metrics file, which goes with this object.

        Raises:
            ConfigError: bf16 is asked for on a GPU without it.
        """
        model = build_model(config.model, config.parallel, build_mesh(Layout(1, 1, 1), world.device), world.device, 0)
        stage = config.stage

        self._directory = tempfile.TemporaryDirectory(prefix="dlm-bench-")
        self.directory = Path(self._directory.name)
        self.writer = writer_at(self.directory / "metrics.jsonl")

        optimizer = build_optimizer(model, stage)
        self._trainer = trainer_of_steps(config, world, model, optimizer, next_token(), adds_sums=True)
        batch = made_up_batch(config, slice(None), world.device)
        self._data = StepData(0, [batch], batch.tokens_BT.numel())
        self._meter = StepMeter(world, self._trainer.optimizer, stage.steps, self._trainer.model.blocks)
        # A CPU thread has seconds of its own, which other programs do not change; a GPU works outside the thread.
        self._clock = time.perf_counter if world.device.type == "cuda" else time.thread_time
        self._state = TrainState()

    def step(self) -> StepResult:
        """Takes a step without its metrics."""
        return self._trainer.step(self._state, self._data, self._trainer.config.stage.lr)

    def measured_step(self) -> float:
        """Takes a step with its metrics and their line in the file; returns its loss."""
        self._meter.begin(self._trainer.is_detailed(self._state.step + 1))
        self._meter.data_came()
        result = self._trainer.step(self._state, self._data, self._trainer.config.stage.lr, self._meter.laps)
        self._write(result)
        return result.loss

    def cost(self) -> float:
        """Returns the time of measuring, in per cent of a bare step (median of TIMED_STEPS). It takes steps and writes
        TIMED_LINES lines, so the model and the file change."""
        step_seconds = [self._seconds(self.step) for _ in range(TIMED_STEPS)]
        # The norms of this step are made up: `_groups_s` measures what it costs to compute them.
        norms = dict.fromkeys(gradients_by_group(self._trainer.model), 1.0)
        detailed_step = replace(self.step(), grad_norms=norms)

        def measure() -> None:
            """Does all that measuring adds to a step, with the line, and no step."""
            detailed = self._trainer.is_detailed(self._state.step + 1)
            self._meter.begin(detailed)
            self._meter.data_came()
            self._meter.laps.start()
            if detailed:
                self._optimizer_hooks()
            for part in (*PARTS, "optimizer", "communication"):
                self._meter.laps.lap(part)
            self._write(detailed_step)

        line_seconds = self._seconds(lambda: [measure() for _ in range(TIMED_LINES)]) / TIMED_LINES
        return 100 * (line_seconds + self._groups_s()) / statistics.median(step_seconds)

    def _groups_s(self) -> float:
        """Returns the extra time of gradient norms by group over one global norm, seconds, at least 0. Gradients are
        made up and freed afterwards."""
        model = self._trainer.model
        # Any values do: the time of a norm does not depend on them.
        for parameter in model.parameters():
            parameter.grad = parameter.detach()

        def norms_by_group() -> None:
            squared_norms(list(gradients_by_group(model).values()))

        def global_norm() -> None:
            squared_norms([[p.grad for p in model.parameters() if p.grad is not None]])

        # Measured in pairs, so that a busy moment of the machine slows both alike.
        differences = [self._seconds(norms_by_group) - self._seconds(global_norm) for _ in range(TIMED_LINES)]
        self._trainer.optimizer.zero_grad(set_to_none=True)
        return max(0.0, math.fsum(differences) / len(differences))

    def _optimizer_hooks(self) -> None:
        """Runs the hooks before the optimizer's step, without the step."""
        for hook in self._trainer.optimizer._optimizer_step_pre_hooks.values():
            hook(self._trainer.optimizer, (), {})

    def _write(self, result: StepResult) -> None:
        self._state = advance(self._state, result, 0)
        self._meter.end(self._state.step, result.tokens)
        line = self._trainer.metrics_of(self._state, result, self._trainer.config.stage.lr, self._meter)
        self.writer.write(self._state.step, line)

    def _seconds(self, work: Callable[[], object]) -> float:
        began = self._clock()
        work()
        return self._clock() - began
