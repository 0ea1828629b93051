"""Runs the tasks of one pass of a build in worker processes of this machine, and goes on when one is lost.

A lost worker costs the tasks in work: results of all others are on disk. Tasks may end in any order.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from dist_lm.data.build_tasks import run_task
from dist_lm.errors import UserError
from dist_lm.tokenizer.encode import follow_parent

LOSSES = 3  # losses of workers one after the other, with no task that ends in between

RunPass = Callable[[Path, str, Sequence[int]], Iterator[int]]
"""Runs tasks of one pass, by (folder of the build, pass, numbers); yields the number of each one that has ended."""


def in_this_process(folder: Path, pass_name: str, numbers: Sequence[int]) -> Iterator[int]:
    """As `RunPass`."""
    for number in numbers:
        run_task(folder, pass_name, number)
        yield number


def in_processes(workers: int) -> RunPass:
    """Returns a `RunPass` that uses `workers` processes of this machine."""

    def run(folder: Path, pass_name: str, numbers: Sequence[int]) -> Iterator[int]:
        left = set(numbers)
        n_losses = 0
        while left:
            try:
                for number in _in_pool(folder, pass_name, sorted(left), min(workers, len(left))):
                    left.discard(number)
                    n_losses = 0
                    yield number
            except BrokenProcessPool as error:
                n_losses += 1
                if n_losses == LOSSES:
                    raise UserError(
                        f"a process of pass {pass_name} died {LOSSES} times, with {len(left)} tasks left (out of "
                        f"memory, or killed): set tokenizer.workers below {workers}"
                    ) from error

    return in_this_process if workers == 1 else run


def _in_pool(folder: Path, pass_name: str, numbers: Sequence[int], workers: int) -> Iterator[int]:
    """Yields the number of each task that has ended.

    Raises:
        BrokenProcessPool: a worker died.
        Exception: an error of a task is raised unchanged; tasks in work are waited for, and others do not begin.
    """
    # Spawned, not forked: a fork would copy the locks that threads of the caller hold.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=follow_parent)
    try:
        futures = {pool.submit(run_task, folder, pass_name, number): number for number in numbers}
        for future in as_completed(futures):
            future.result()
            yield futures[future]
    finally:
        pool.shutdown(cancel_futures=True)
