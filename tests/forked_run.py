"""Whole runs in processes that need not import torch again: they are forked from one that has."""

import gc
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess

from dist_lm import train as rank
from dist_lm.parallel.rendezvous import VARIABLE
from dist_lm.storage.process import MARK
from dist_lm.storage.run_directory import RunDirectory
from tests.parallel.ranks import CONTEXT
from tests.patience import patient

DEADLINE_S = patient(480)


def run_forked(run: RunDirectory, ranks: int, *, without: Sequence[str] = ()) -> int:
    """What `torchrun --nproc-per-node RANKS -m dist_lm.train RUN_DIR` does; 0, or the exit code of a rank that failed.

    As with torchrun, the others end with it.

    Args:
        without: packages that ranks cannot import.

    Raises:
        TimeoutError: they are not done in time.
    """
    with forked_ranks(run, ranks, without) as processes:
        return _first_failure(processes)


@contextmanager
def forked_ranks(run: RunDirectory, ranks: int, without: Sequence[str] = ()) -> Iterator[list[ForkServerProcess]]:
    """The ranks of `run_forked`, which train during the block; those that are left at its end are killed."""
    with tempfile.TemporaryDirectory() as folder:
        places = [(rank, ranks, f"{folder}/store", str(run.path), without) for rank in range(ranks)]
        processes = [CONTEXT.Process(target=_rank, args=place, daemon=True) for place in places]
        try:
            for process in processes:
                process.start()
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.join()


def _first_failure(processes: Sequence[ForkServerProcess]) -> int:
    deadline = time.monotonic() + DEADLINE_S
    while running := [process.sentinel for process in processes if process.exitcode is None]:
        if not wait(running, timeout=deadline - time.monotonic()):
            raise TimeoutError(f"ranks did not end in {DEADLINE_S} s")
        if code := next((process.exitcode for process in processes if process.exitcode), 0):
            return code
    return next((process.exitcode for process in processes if process.exitcode), 0)


def _rank(number: int, size: int, store: str, path: str, without: Sequence[str]) -> None:
    gc.freeze()  # what the server has imported stays: the collector passes it over
    for package in without:
        assert package not in sys.modules, f"programs of ranks import {package}"
        sys.modules[package] = None  # type: ignore[assignment]  # an import of it raises
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(size)}
    os.environ |= {VARIABLE: store, "OMP_NUM_THREADS": "1"}
    os.environ[MARK] = "forked"  # the environment is complete
    sys.argv = ["dist_lm.train", path]
    rank.main()
