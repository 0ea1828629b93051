"""Tasks of `stage.eval_tasks` in stage `rlhf`, answered by the engines that draw rollouts, with the weights they have.

With staleness 0 they answer between two iterations. Otherwise the tasks are answered after the rollouts that are asked
for, while the ranks train. A checkpoint waits for the figures of its iteration.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch.distributed as dist

from dist_lm.cluster.ray_cluster import RayCluster
from dist_lm.evaluation.in_loop import Round, loop_tasks
from dist_lm.evaluation.tasks import Record
from dist_lm.model.transformer import Transformer
from dist_lm.rlhf.rollouts import RolloutSource, read_to_end
from dist_lm.rlhf.schedule import RolloutSchedule, is_drawn_by
from dist_lm.stages.rlhf.stage import RlhfRunConfig
from dist_lm.stages.training.eval_tasks import Evaluated
from dist_lm.stages.training.program import RankStart
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.metrics import MetricsWriter
from dist_lm.training.heartbeat import Heartbeat, Phase

Records = dict[str, list[Record]]


@dataclass(frozen=True)
class TasksOfIterations:
    """Evaluates tasks after iterations. All methods are collective."""

    parts: Evaluated
    source: RolloutSource | None  # on the first rank
    staleness: int
    _open: dict[int, Callable[[], Records]] = field(default_factory=dict)  # by iteration, in their order

    def reached(self, iteration: int, schedule: RolloutSchedule | None) -> None:
        """Have the tasks answered that are due after so many iterations; `schedule`: on the first rank."""
        parts, due = self.parts, self.parts.tasks.due(iteration)
        if not due:
            return
        began = time.perf_counter()
        parts.heartbeat.beat(Phase.EVALUATING, iteration)
        pushed = is_drawn_by(iteration, self.staleness, parts.tasks.steps)
        weights = None if pushed else parts.weights(receives=schedule is not None)
        if schedule:
            work = partial(self._evaluate, parts.tasks.of(due))
            self._open[iteration] = schedule.beside(work, iteration, weights)
        elif weights:
            read_to_end(weights)
        if not self.staleness:
            self.before_checkpoint(time.perf_counter() - began)

    def before_checkpoint(self, waited_s: float | None = None) -> None:
        """Wait for the figures of all iterations so far, and write them."""
        for iteration, records in self._open.items():
            self.parts.write(iteration, records(), waited_s)
        self._open.clear()
        dist.barrier()

    def _evaluate(self, asked: Round) -> Records:
        assert self.source is not None
        with self.parts.sandboxes(asked) or nullcontext() as sandboxes:
            for result in self.source.results(asked.requests):
                asked.take(result, sandboxes)
            return asked.records(lambda: None)


def tasks_of_iterations(
    config: RlhfRunConfig,
    run: RunDirectory,
    start: RankStart,
    policy: Transformer,
    source: RolloutSource | None,
    metrics: MetricsWriter | None,
    heartbeat: Heartbeat,
    cluster: RayCluster | None = None,
) -> TasksOfIterations:
    """What evaluates the tasks of `stage.eval_tasks`.

    Args:
        source: on the first rank.
        cluster: see `Evaluated`.
    """
    tasks = loop_tasks(config, run, start.tokenizer)
    parts = Evaluated(config, run, start.world, start.tokenizer, policy, tasks, metrics, heartbeat, cluster)
    return TasksOfIterations(parts, source, config.rlhf.max_staleness)
