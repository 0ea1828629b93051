"""Tasks of stage evaluate during training (`stage.eval_tasks`), answered by the ranks between two steps.

Every rank has an engine with the weights of the model, answers its share of the questions, and the first rank judges.
With `eval.pool.actors` actors answer instead, while the ranks train (`eval_actors.py`).
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from dist_lm.cluster.ray_cluster import RayCluster
from dist_lm.cluster.sandboxes import sandboxes_of
from dist_lm.config.root import TRUST_ME, Config
from dist_lm.evaluation.in_loop import LoopTasks, Round, figure_name, metrics_of, write_records
from dist_lm.evaluation.tasks import Record
from dist_lm.generation.decoder import WeightStream
from dist_lm.generation.engine import Engine
from dist_lm.generation.engine_options import EngineOptions
from dist_lm.model.size import parameter_shapes
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import World
from dist_lm.parallel.messages import broadcast
from dist_lm.parallel.sharding import generation_dtype, reshard
from dist_lm.parallel.values import stream_weights
from dist_lm.sandbox.pool import Sandboxes
from dist_lm.stages.sampling import shared_answers
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tracking.metrics import MetricsWriter, read_metrics
from dist_lm.training.heartbeat import Heartbeat, Phase
from dist_lm.training.trainer import StepTasks

log = logging.getLogger(__name__)

CACHE_TOKENS = 16384  # KV cache of an engine, as in stage evaluate
BLOCK = 16  # judgements between two signs of life of the ranks that wait for them


@dataclass(frozen=True)
class Evaluated:
    """The parts of a run that an evaluation needs."""

    config: Config
    run: RunDirectory
    world: World
    tokenizer: Tokenizer
    model: Transformer
    tasks: LoopTasks
    metrics: MetricsWriter | None  # on the first rank
    heartbeat: Heartbeat
    cluster: RayCluster | None = None  # its nodes run programs; None: only this one does

    @property
    def dtype(self) -> torch.dtype:
        """Returns the dtype of the copies of the model that answer.

        Raises:
            ConfigError: bf16 is asked for on a GPU without it.
        """
        return generation_dtype(self.config.parallel, self.world.device)

    def sandboxes(self, task_round: Round) -> Sandboxes | None:
        """Sandboxes for the programs of a round, not started; None if it has none."""
        return sandboxes_of(self.cluster, 0, self.config.sandbox == TRUST_ME) if task_round.executes else None

    def weights(self, receives: bool) -> WeightStream:
        """Returns the weights of the model; every rank reads them to the end (collective)."""
        # Parameters may still be gathered from the last step.
        reshard(self.model)
        return stream_weights(self.model, self.model.config, self.dtype, receives)

    def write(self, step: int, records: Mapping[str, list[Record]], waited_s: float | None = None) -> None:
        """Writes figures and answers (first rank).

        Args:
            waited_s: seconds that training waited; None: written before.
        """
        assert self.metrics is not None
        write_records(self.run, step, records)
        self.metrics.write(step, metrics_of(records) | ({} if waited_s is None else {"timing/eval_s": waited_s}))


class TasksOfSteps(StepTasks, Protocol):
    """Evaluates tasks during training. The next checkpoint is not durable before what must survive a kill with it."""

    def finish(self) -> None:
        """Waits for all figures (collective).

        Raises:
            UserError, PoolFailure, OSError: an evaluation beside training failed, see `BesideTraining`.
        """


def weights_file(run: RunDirectory, step: int) -> Path:
    """Returns the file of the weights after `step` steps, while their evaluation by actors is not done."""
    return run.evaluations / f"step_{step:08d}.safetensors"


def stored(parts: Evaluated, step: int) -> WeightStream:
    """Returns the weights in `weights_file`."""
    weights = load_file(weights_file(parts.run, step))
    return ((name, weights[name]) for name in parameter_shapes(parts.model.config.plain))


def discard_weights(parts: Evaluated, step: int) -> None:
    """Removes the weights of an evaluation, once its figures are on disk (first rank)."""
    assert parts.metrics is not None
    # A crash in between must find either the figures or the weights.
    parts.metrics.sync()
    weights_file(parts.run, step).unlink(missing_ok=True)


def pending(parts: Evaluated, steps_done: int) -> dict[int, tuple[str, ...]]:
    """Returns the tasks without figures, by the steps whose weights are stored. Removes other files of weights (first
    rank).

    Args:
        steps_done: steps of the checkpoint that the run continues from; later ones are trained again.

    Raises:
        ArtefactError: the metrics file is damaged.
        FileNotFoundError: the run has no metrics.
    """
    written = {(line["step"], name) for line in read_metrics(parts.run.metrics) for name in line}
    pending_tasks = {}
    for path in sorted(parts.run.evaluations.glob("step_*")):
        step = int(path.stem.removeprefix("step_"))
        due = tuple(task for task in parts.tasks.due(step) if (step, figure_name(task)) not in written)
        if path == weights_file(parts.run, step) and step <= steps_done and due:
            pending_tasks[step] = due
        else:
            path.unlink()
    return pending_tasks


class BetweenSteps:
    """Answers due tasks at once, on all ranks. Figures are written before the checkpoint of their step."""

    def __init__(self, parts: Evaluated, steps_done: int) -> None:
        """Answers what actors of an earlier attempt have left (collective).

        Args:
            steps_done: steps of the checkpoint that the run continues from.

        Raises:
            ArtefactError: the metrics file is damaged.
            ConfigError: as `reached`.
        """
        self._parts = parts
        # The first rank has read the metrics file; all must evaluate the same tasks.
        pending_tasks = pending(parts, steps_done) if parts.world.is_first else {}
        for step, due in broadcast(pending_tasks, dict[int, tuple[str, ...]]).items():
            self._evaluate(step, due, stored(parts, step))
            dist.barrier()
            if parts.world.is_first:
                discard_weights(parts, step)

    def reached(self, step: int) -> None:
        """Answers the tasks that are due, if any (collective).

        Raises:
            ConfigError: this machine has no sandbox for the programs of a task, or bf16 is asked for on a GPU without
                it.
        """
        due = self._parts.tasks.due(step)
        if due:
            self._evaluate(step, due, self._parts.weights(receives=True))

    def before_checkpoint(self) -> None:
        """The figures are written already."""

    def finish(self) -> None:
        """The figures are written already."""

    def _evaluate(self, step: int, due: Sequence[str], weights: WeightStream) -> None:
        """Answers the tasks `due` on all ranks and writes their figures and answers on the first (collective).

        Raises:
            ConfigError: this machine has no sandbox for the programs of a task, or bf16 is asked for on a GPU without
                it.
        """
        began = time.perf_counter()
        parts = self._parts
        alive = partial(parts.heartbeat.beat, Phase.EVALUATING, step)
        alive()

        task_round = parts.tasks.of(due)
        with (parts.sandboxes(task_round) if parts.world.is_first else None) or nullcontext() as sandboxes:
            records = self._records(task_round, weights, sandboxes, alive)
        if parts.world.is_first:
            parts.write(step, records, time.perf_counter() - began)

    def _records(
        self, task_round: Round, weights: WeightStream, sandboxes: Sandboxes | None, alive: Callable[[], None]
    ) -> dict[str, list[Record]]:
        """Returns the records of a round on the first rank, by task; empty on the others (collective).

        Each rank builds an engine for the call. The other ranks write heartbeats while the first one judges.

        Raises:
            ArtefactError: the stored weights do not fit the model.
        """
        parts = self._parts
        first, shape = parts.world.is_first, parts.model.config.plain
        engine = Engine(
            shape,
            weights,
            eot_id=parts.tokenizer.eot_id,
            vocabulary=tuple(parts.tokenizer.vocabulary()),
            options=EngineOptions(cache_tokens=max(CACHE_TOKENS, shape.max_seq_len)),
            dtype=parts.dtype,
            device=parts.world.device,
        )
        take = partial(task_round.take, sandboxes=sandboxes)
        for result in shared_answers(engine, task_round.requests, parts.world, alive, take if first else None):
            if first:
                # Those of other ranks; its own are being judged.
                take(result)
        del engine

        # The other ranks count along, so that all of them show signs of life while the first one judges.
        n_judged = 0

        def count_judgement() -> None:
            nonlocal n_judged
            n_judged += 1
            alive()
            if n_judged % BLOCK == 0:
                dist.barrier()

        if first:
            return task_round.records(count_judgement)
        for _ in range(task_round.size):
            count_judgement()
        return {}
