"""Runs the tasks of a build in worker processes of this machine, and goes on when one is lost.

A lost worker costs the tasks in work: results of all others are on disk. Tasks may end in any order.
"""

import logging
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from dist_lm.data.build_tasks import run_task
from dist_lm.errors import UserError
from dist_lm.tokenizer.encode import follow_parent

log = logging.getLogger(__name__)

LOSSES = 3  # losses of workers one after the other, with no task that ends in between

RunPass = Callable[[Path, str, Sequence[int]], Iterator[int]]
"""Runs tasks of one pass, by (folder of the build, pass, numbers); yields the number of each one that has ended."""


def in_this_process(folder: Path, pass_name: str, numbers: Sequence[int]) -> Iterator[int]:
    """As `RunPass`.

    Raises:
        ArtefactError, ChangedInputError, ConfigError, OSError: as `run_task`.
    """
    for number in numbers:
        run_task(folder, pass_name, number)
        yield number


@contextmanager
def local_workers(workers: int) -> Iterator[RunPass]:
    """Gives a `RunPass` to a block that uses `workers` processes of this machine, or this process if that is one.

    At the end of the block tasks in work are waited for, and others do not begin.

    Raises:
        UserError: workers have died `LOSSES` times with no task that ended in between; raised by the `RunPass`, which
            also raises an error of a task unchanged.
    """
    if workers == 1:
        yield in_this_process
        return
    pool = _new_pool(workers)

    def run(folder: Path, pass_name: str, numbers: Sequence[int]) -> Iterator[int]:
        nonlocal pool
        unfinished = set(numbers)
        n_losses = 0
        while unfinished:
            try:
                futures = {pool.submit(run_task, folder, pass_name, number): number for number in sorted(unfinished)}
                for future in as_completed(futures):
                    future.result()
                    unfinished.discard(futures[future])
                    n_losses = 0
                    yield futures[future]

            except BrokenProcessPool as error:
                # One lost process breaks the whole pool, so a new one takes its place.
                pool.shutdown()
                n_losses += 1
                if n_losses == LOSSES:
                    raise UserError(
                        f"a process of pass {pass_name} died {LOSSES} times, with {len(unfinished)} tasks left: "
                        f"give the same command again; if memory was the reason, with tokenizer.workers below {workers}"
                    ) from error

                log.warning(
                    "a process of pass %s has died (%d of %d times in a row): its tasks run again",
                    pass_name,
                    n_losses,
                    LOSSES,
                )
                pool = _new_pool(workers)

    try:
        yield run
    finally:
        pool.shutdown(cancel_futures=True)


def _new_pool(workers: int) -> ProcessPoolExecutor:
    # Spawned, not forked: a fork would copy the locks that threads of the caller hold.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=follow_parent)
