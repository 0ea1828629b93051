"""Runs the tasks of a build of corpora on all nodes of a Ray cluster: one process a task, of one CPU.

Results are files, so nodes must share the file system of the work directory, as for training. A task whose process or
node is lost runs again elsewhere; nothing else is repeated.
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dist_lm.cluster.ray_cluster import ClusterError, connect
from dist_lm.config.cluster import ClusterConfig
from dist_lm.data.build_tasks import run_task
from dist_lm.data.task_workers import LOSSES, RunPass

IN_FLIGHT = 3  # tasks for each CPU that Ray knows of: Ray places the next one at once
FEWEST_IN_FLIGHT = 64  # where nodes are still to come


@contextmanager
def ray_workers(config: ClusterConfig) -> Iterator[RunPass]:
    """Gives a `RunPass` to a block that uses all nodes of the cluster, also those that join it later.

    The pass raises the error of a task unchanged, and ClusterError if a task loses `LOSSES` processes.

    Raises:
        ClusterError: the cluster cannot be joined.
    """
    import ray

    with ExitStack() as stack:
        # A stage between two others on the cluster finds it joined.
        if not ray.is_initialized():
            stack.enter_context(connect(config))
        remote = ray.remote(num_cpus=1, max_retries=LOSSES - 1)(_run_at)
        folder_here = str(Path.cwd())

        def run(folder: Path, pass_name: str, numbers: Sequence[int]) -> Iterator[int]:
            waiting = deque(numbers)
            in_flight: dict[ray.ObjectRef, int] = {}
            try:
                while waiting or in_flight:
                    most = max(FEWEST_IN_FLIGHT, IN_FLIGHT * int(ray.cluster_resources().get("CPU", 0)))
                    while waiting and len(in_flight) < most:
                        number = waiting.popleft()
                        in_flight[remote.remote(folder_here, folder, pass_name, number)] = number
                    (ended,), _ = ray.wait(list(in_flight), num_returns=1)
                    _require_done(ended, pass_name)
                    yield in_flight.pop(ended)
            finally:
                for task in in_flight:
                    ray.cancel(task, force=True)

        yield run


def _run_at(folder_here: str, folder: Path, pass_name: str, number: int) -> None:
    """Runs in a process of Ray. Paths of sources may be relative to the folder of the command."""
    os.chdir(folder_here)
    run_task(folder, pass_name, number)


def _require_done(task: object, pass_name: str) -> None:
    """Raises the error of a task, if it has one.

    Raises:
        ClusterError: its processes or nodes were lost.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        ray.get(task)  # type: ignore[call-overload]
    except RayTaskError as error:
        # The error of our own code says more than its copy by Ray.
        raise error.cause from error
    except RayError as error:
        raise ClusterError(
            f"a task of pass {pass_name} lost {LOSSES} processes or nodes ({error}); results of other tasks are kept: "
            "run the command again"
        ) from error
