"""Tasks of `stage.eval_tasks`, answered by actors (`eval.pool`) while the ranks train.

    ranks       step 500 | copy of the weights | step 501 | step 502 | ... | figures of step 500 written | step 560
    threads                                    | file of the weights | load, answer, judge              |

Training waits for the copy only. The file is durable before the next checkpoint, and goes when the figures are written.
So a resumed run finds either the figures or the weights of every step up to its checkpoint.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from safetensors.torch import save_file

from dist_lm.cluster.pool import Pool
from dist_lm.config.root import Config
from dist_lm.evaluation.in_loop import loop_tasks
from dist_lm.evaluation.tasks import Record
from dist_lm.generation.decoder import WeightStream
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import World
from dist_lm.parallel.messages import broadcast
from dist_lm.rlhf.rollouts import read_to_end
from dist_lm.stages.pool_start import engine_spec, pool_starter
from dist_lm.stages.training.eval_tasks import (
    BetweenSteps,
    Evaluated,
    TasksOfSteps,
    discard_weights,
    pending,
    stored,
    weights_file,
)
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tracking.metrics import MetricsWriter
from dist_lm.training.heartbeat import Heartbeat, Phase

log = logging.getLogger(__name__)

LOOK_S = 1.0  # between two looks at work that all ranks wait for

Records = dict[str, list[Record]]
StartPool = Callable[[WeightStream, int, Callable[[], bool]], Pool]
"""(weights, their version, whether to go on) -> a started pool."""


class AbandonedError(Exception):
    """The run ends before this evaluation; the next one makes it again."""


class BesideTraining:
    """Hands due tasks to actors. All methods are collective; only the first rank has actors."""

    def __init__(self, parts: Evaluated, start_pool: StartPool | None, steps_done: int) -> None:
        """
        Args:
            start_pool: on the first rank.
            steps_done: steps of the checkpoint that the run continues from.

        Raises:
            ArtefactError: the metrics file is damaged.
        """
        self._parts, self._start_pool = parts, start_pool
        self._closing = threading.Event()
        self._writer = ThreadPoolExecutor(1, "evaluated weights")
        self._evaluator = ThreadPoolExecutor(1, "evaluations")
        self._writing: Future[None] | None = None
        self._open: dict[int, Future[Records]] = {}  # step -> its records, in the order of steps
        self._pool: Pool | None = None
        for step, due in pending(parts, steps_done).items() if parts.world.is_first else ():
            self._open[step] = self._evaluator.submit(self._evaluate, step, due, None)

    def reached(self, step: int) -> None:
        """Writes the figures that have arrived. If tasks are due, it copies the weights to the first rank (collective)
        and queues their evaluation.

        Training waits for the copy, and for the file of the copy before.

        Raises:
            UserError, PoolFailure, OSError: an earlier evaluation failed in its thread, see `_evaluate`; on the first
                rank.
        """
        parts = self._parts
        due = parts.tasks.due(step)
        self._collect()
        if not due:
            return

        began = time.perf_counter()
        parts.heartbeat.beat(Phase.EVALUATING, step)
        weights = parts.weights(receives=parts.world.is_first)
        if parts.metrics is None:
            read_to_end(weights)
            return

        # One copy in memory at a time.
        self.before_checkpoint()
        copy = {name: weight.cpu() for name, weight in weights}
        self._writing = self._writer.submit(self._write, step, copy)
        self._open[step] = self._evaluator.submit(self._evaluate, step, due, self._writing)
        del copy
        parts.metrics.write(step, {"timing/eval_s": time.perf_counter() - began})

    def before_checkpoint(self) -> None:
        """Waits until the weights of the last evaluation are on disk.

        Raises:
            OSError: they could not be written.
        """
        if self._writing:
            self._writing.result()
            self._writing = None

    def finish(self) -> None:
        """Waits for all evaluations and writes their figures, with heartbeats meanwhile (collective).

        Raises:
            UserError, PoolFailure, OSError: an evaluation failed in its thread, see `_evaluate`; on the first rank.
            MessageError: another rank has sent something else.
        """
        parts = self._parts
        while True:
            wait(self._open.values(), timeout=LOOK_S)
            self._collect()
            parts.heartbeat.beat(Phase.CLOSING, parts.tasks.steps)

            # Only the first rank knows how many evaluations are open.
            if not broadcast(len(self._open), int):
                return

    def close(self) -> None:
        """Gives up the evaluations that are not done, waits until their threads have noticed it, and ends the actors; a
        resumed run makes these evaluations.
        """
        self._closing.set()
        for threads in (self._writer, self._evaluator):
            threads.shutdown(cancel_futures=True)
        if self._pool:
            self._pool.close()

    def _collect(self) -> None:
        """Writes the figures of evaluations that are done, in the order of their steps up to the first that is not
        done, and removes their weights from the disk.

        Raises:
            UserError, PoolFailure, OSError: such an evaluation failed, see `_evaluate`.
        """
        # In order, since lines of the metrics file are ordered by step.
        for step, records in list(self._open.items()):
            if not records.done():
                return
            self._parts.write(step, records.result())
            discard_weights(self._parts, step)
            del self._open[step]

    def _write(self, step: int, copy: dict[str, torch.Tensor]) -> None:
        """Writes the copy of the weights (safetensors) and flushes it to disk; runs in the writer's thread.

        Raises:
            OSError: the file cannot be written.
        """
        # The file appears when it is complete: a resumed run takes it for whole.
        path = weights_file(self._parts.run, step)
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".tmp")
        save_file(copy, temporary)
        durable.fsync(temporary)
        temporary.replace(path)
        durable.fsync(path.parent)

    def _evaluate(self, step: int, due: Sequence[str], writing: Future[None] | None) -> Records:
        """Answers the tasks `due` with the stored weights of `step` and returns the records; runs in the evaluator's
        thread.

        The first call starts the actors.

        Args:
            writing: the write of the weights, which it waits for; None: they are on disk.

        Raises:
            AbandonedError: the run ends before the evaluation.
            ActorsLostError: no place for an actor.
            UserError: no node has enough GPUs for an actor, or there is no sandbox for the programs of a task.
            PoolFailure: actors keep dying.
            OSError: the weights could not be written or read.
        """
        if writing:
            writing.result()

        parts = self._parts
        weights, task_round = stored(parts, step), parts.tasks.of(due)
        if self._pool is None:
            assert self._start_pool is not None
            self._pool = self._start_pool(weights, step, self._keep_going)
        else:
            self._pool.load_weights(weights, step)

        with parts.sandboxes(task_round) or nullcontext() as sandboxes:
            for answer in self._pool.generate(task_round.requests):
                task_round.take(answer, sandboxes)
            self._go_on()
            return task_round.records(self._go_on)

    def _keep_going(self) -> bool:
        return not self._closing.is_set()

    def _go_on(self) -> None:
        if self._closing.is_set():
            raise AbandonedError


@contextmanager
def tasks_of_steps(
    config: Config,
    run: RunDirectory,
    world: World,
    tokenizer: Tokenizer,
    model: Transformer,
    metrics: MetricsWriter | None,
    heartbeat: Heartbeat,
    steps_done: int,
) -> Iterator[TasksOfSteps]:
    """Yields what evaluates the tasks of `stage.eval_tasks`, with actors or on the ranks themselves (collective).

    Evaluations that an earlier attempt left are made first, or queued for the actors.

    Args:
        steps_done: steps of the checkpoint that the run continues from.

    Raises:
        UserError: a task cannot be asked.
        ArtefactError: the file of a task has changed since the run began.
        ClusterError: Ray refuses the first rank.
        ConfigError: as `BetweenSteps.reached`, where the ranks answer what was left.
        OSError: a file cannot be read.
        MessageError: another rank has sent something else.
    """
    tasks = loop_tasks(config, run, tokenizer)
    parts = Evaluated(config, run, world, tokenizer, model, tasks, metrics, heartbeat)
    pool = config.pool
    with pool_starter(config, world.device) if world.is_first else nullcontext() as starter:
        # Only the first rank knows whether it could join Ray.
        by_actors = broadcast(starter is not None, bool)
        if not by_actors or pool is None:
            yield BetweenSteps(parts, steps_done)
            return

        spec = engine_spec(config, pool, tokenizer, parts.dtype, world.device, texts=True)
        parts = replace(parts, cluster=starter.cluster if starter else None)
        start_pool = partial(starter.start, spec) if starter else None
        with closing(BesideTraining(parts, start_pool, steps_done)) as beside_training:
            yield beside_training
