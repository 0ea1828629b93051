"""What measuring costs: the step of training with all that is measured of it and written, against the bare step, in one
process.

The ratio of both is no better than the machine is quiet. So the figure `cost %` is taken too: what measuring takes by
itself, in seconds of this thread on a core (of a GPU's host: on the wall), in per cent of a bare step in the same
seconds. A neighbour changes neither.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from dist_lm.bench.case import Case, Comparison, CrewSize, configurations, describe
from dist_lm.bench.trial import Trial, made_up_batch
from dist_lm.config.root import Config
from dist_lm.data.stream import StepData, StepStream
from dist_lm.model.size import flops_per_token
from dist_lm.parallel.layout import Layout
from dist_lm.parallel.mesh import World, build_mesh
from dist_lm.parallel.sharding import build_model
from dist_lm.parallel.values import squared_norms
from dist_lm.tracking.metrics import MetricsWriter
from dist_lm.training.heartbeat import StopRequest, Unheard
from dist_lm.training.objective import next_token
from dist_lm.training.optimizer import build_optimizer
from dist_lm.training.state import TrainState
from dist_lm.training.step import StepResult, gradients_by_group
from dist_lm.training.step_meter import PARTS, StepMeter
from dist_lm.training.trainer import Trainer, advance

MEASURED, BARE = "measured", "bare"
COST = "cost %"
TIMED_STEPS, TIMED_LINES = 5, 200
SHAPES = (
    ("model=nano", "stage.global_batch=16", "stage.seq_len=256"),  # a step of the quick start
    ("model=tiny", "model.vocab_size=4096", "stage.global_batch=8", "stage.seq_len=512"),
)


def cases(overrides: Sequence[str], quick: bool) -> list[Case]:
    """The shapes above, or the one that `overrides` give."""
    crew = CrewSize(1)
    return [
        Case(
            name=describe(config),
            config=config,
            ways={MEASURED: crew, BARE: crew},
            comparisons=(Comparison(own=MEASURED, peer=BARE), Comparison(own=MEASURED, fact=COST)),
            same_losses=frozenset({MEASURED, BARE}),
            rounds=40,
        )
        for config in configurations(SHAPES, overrides, quick)
    ]


def build(way: str, config: Config, world: World) -> Trial:
    """The one rank's part of one way."""
    training = MeasuredTraining(config, world)
    if way == BARE:
        return Trial(lambda: training.step().loss)
    return Trial(training.measured_step, lambda: {COST: training.cost()})


class MeasuredTraining:
    """The trainer on one made-up batch, by its steps and by its lines."""

    def __init__(
        self, config: Config, world: World, writer_at: Callable[[Path], MetricsWriter] = MetricsWriter
    ) -> None:
        """Build model and optimizer, and a directory for the file of metrics, which goes with this object."""
        model = build_model(config.model, config.parallel, build_mesh(Layout(1, 1, 1), world.device), world.device, 0)
        stage = config.stage
        self._directory = tempfile.TemporaryDirectory(prefix="dlm-bench-")
        self.directory = Path(self._directory.name)
        self.writer = writer_at(self.directory / "metrics.jsonl")
        self._trainer = Trainer(
            config=config,
            world=world,
            counts_once=True,
            model=model,
            optimizer=build_optimizer(model, stage),
            objective=next_token(),
            stream=cast(StepStream, iter(())),
            evaluate=lambda model, everything, alive: {},
            checkpoints=Path(),
            metrics=None,
            stop=StopRequest(),
            heartbeat=Unheard(),
            flops_per_token=flops_per_token(config.model, stage.seq_len),
            peak_flops=1e12,
            bytes_per_token=1.0,
        )
        batch = made_up_batch(config, slice(None), world.device)
        self._data = StepData(0, [batch], batch.tokens_BT.numel())
        self._meter = StepMeter(world, self._trainer.optimizer, stage.steps)
        self._clock = time.perf_counter if world.device.type == "cuda" else time.thread_time
        self._state = TrainState()

    def step(self) -> StepResult:
        """The step alone."""
        return self._trainer.step(self._state, self._data, self._trainer.config.stage.lr)

    def measured_step(self) -> float:
        """The step, what is measured of it, and its line in the file; its loss."""
        self._meter.begin(self._trainer.is_detailed(self._state.step + 1))
        self._meter.data_came()
        result = self._trainer.step(self._state, self._data, self._trainer.config.stage.lr, self._meter.laps)
        self._write(result)
        return result.loss

    def cost(self) -> float:
        """What measuring takes, in per cent of a bare step."""
        steps = [self._seconds(self.step) for _ in range(TIMED_STEPS)]
        result = self.step()
        by_group = {name: 1.0 for name in gradients_by_group(self._trainer.model)}
        result = replace(result, grad_norms=by_group)

        def measure() -> None:
            detailed = self._trainer.is_detailed(self._state.step + 1)
            self._meter.begin(detailed)
            self._meter.data_came()
            self._meter.laps.start()
            if detailed:
                self._optimizer_hooks()
            for part in (*PARTS, "optimizer", "communication"):
                self._meter.laps.lap(part)
            self._write(result)

        lines = self._seconds(lambda: [measure() for _ in range(TIMED_LINES)]) / TIMED_LINES
        return 100 * (lines + self._groups_s()) / statistics.median(steps)

    def _groups_s(self) -> float:
        """What it takes more to look at gradients by group than all together."""
        model = self._trainer.model
        for parameter in model.parameters():
            parameter.grad = parameter.detach()

        def grouped() -> None:
            squared_norms(list(gradients_by_group(model).values()))

        def together() -> None:
            squared_norms([[p.grad for p in model.parameters() if p.grad is not None]])

        more = [self._seconds(grouped) - self._seconds(together) for _ in range(TIMED_LINES)]
        self._trainer.optimizer.zero_grad(set_to_none=True)
        return max(0.0, math.fsum(more) / len(more))

    def _optimizer_hooks(self) -> None:
        """What is hung before the optimizer's step, without the step."""
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
