"""Whole runs in processes that need not import torch again: they are forked from one that has."""

import os
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess

from dist_lm import train as rank
from dist_lm.storage.process import MARK, reserve_port
from dist_lm.storage.run_directory import RunDirectory
from tests.parallel.ranks import CONTEXT
from tests.patience import patient

DEADLINE_S = patient(480)


def run_forked(run: RunDirectory, ranks: int) -> int:
    """What `torchrun --nproc-per-node RANKS -m dist_lm.train RUN_DIR` does; 0, or the exit code of a rank that failed.

    As with torchrun, the others end with it.

    Raises:
        TimeoutError: they are not done in time.
    """
    with reserve_port() as reserved:
        port = reserved.getsockname()[1]
        made = [CONTEXT.Process(target=_rank, args=(r, ranks, port, str(run.path)), daemon=True) for r in range(ranks)]
        try:
            for process in made:
                process.start()
            return _first_failure(made)
        finally:
            for process in made:
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


def _rank(number: int, size: int, port: int, path: str) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    os.environ[MARK] = "forked"  # the environment is complete
    sys.argv = ["dist_lm.train", path]
    rank.main()
