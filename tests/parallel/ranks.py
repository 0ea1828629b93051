"""A function on N ranks of one gloo group.

Processes start once for a world size and then run one function after another, so a test costs no start of its own. They
are forked from a server that has imported torch, and killed in the end: there is nothing of theirs to keep.

Process groups live as long as the function that runs: each gloo group has threads that wake a hundred times a second,
so ranks that kept them would take the CPU from all other tests.
"""

import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import _redistribute
from torch.distributed.tensor._collective_utils import MeshTopoInfo
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from dist_lm.parallel.mesh import World, leave_groups
from tests.patience import patient

DEADLINE_S = patient(480)
COLLECTIVE_TIMEOUT_S = patient(60)
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["dist_lm.stages.training.program", "dist_lm.stages.rlhf.program"])


class RankFailureError(Exception):
    """A rank raised, died, or did not answer in time."""


class RankGroups:
    """One group of processes a world size, started when it is first needed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory  # where ranks find each other
        self.groups: dict[int, RankGroup] = {}
        self.started = 0

    def run(self, size: int, function: Callable, *arguments: Any, **options: Any) -> Any:
        """`function(world, *arguments, **options)` on each of `size` ranks; what rank 0 returned.

        Function, arguments and result travel through a pipe: plain values and numpy arrays.

        Raises:
            RankFailureError: with the traceback of the first rank that failed. The next call starts a new group.
        """
        if size not in self.groups:
            self.started += 1
            self.groups[size] = RankGroup(size, self.directory / f"ranks_{self.started}")
        try:
            return self.groups[size].run(function, arguments, options)
        except RankFailureError:
            self.groups.pop(size).kill()
            raise

    def close(self) -> None:
        for group in self.groups.values():
            group.kill()
        self.groups.clear()


class RankGroup:
    """`size` processes that wait for work."""

    def __init__(self, size: int, store: Path) -> None:
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            here, there = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(rank, size, str(store), there), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function: Callable, arguments: tuple, options: dict[str, Any]) -> Any:
        for pipe in self.pipes:
            pipe.send((function, arguments, options))
        deadline = time.monotonic() + DEADLINE_S
        results: dict[int, Any] = {}
        while len(results) < len(self.pipes):
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in results]
            ready = wait(waiting, timeout=deadline - time.monotonic())
            if not ready:
                silent = [rank for rank in range(len(self.pipes)) if rank not in results]
                raise RankFailureError(f"ranks {silent} did not answer in {DEADLINE_S} s")
            for pipe in ready:
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                results[rank] = _received(pipe, rank)  # type: ignore[arg-type]
        # only now: a rank that left its groups earlier would break collectives that others have not finished
        for pipe in self.pipes:
            pipe.send(None)
        return results[0]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def _received(pipe: Connection, rank: int) -> Any:
    try:
        failure, result = pipe.recv()
    except EOFError:
        raise RankFailureError(f"rank {rank} died") from None
    if failure:
        raise RankFailureError(f"rank {rank}:\n{failure}")
    return result


def _serve(rank: int, size: int, store_path: str, pipe: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(store_path, size)
    world = World(rank, size, rank, torch.device("cpu"))
    n_functions = 0
    gc.freeze()  # what is imported stays: without it every collection of garbage takes a tenth of a second
    while True:
        work = pipe.recv()
        if work is None:
            _leave_groups()
            continue

        n_functions += 1
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(f"function_{n_functions}", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
        )
        function, arguments, options = work
        try:
            answer = (None, function(world, *arguments, **options))
        except Exception:
            answer = (traceback.format_exc(), None)
        pipe.send(answer)


def _leave_groups() -> None:
    """Destroy all groups, with everything that remembers them: equal meshes of later functions have other groups."""
    _clear_sharding_prop_cache()
    _redistribute._gen_transform_infos.cache_clear()
    _redistribute.clear_redistribute_planner_cache()
    MeshTopoInfo.build_from_mesh.cache_clear()
    leave_groups()
