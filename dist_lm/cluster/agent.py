"""What runs on each node: starts torchrun for the node's ranks, watches it, interrupts it, ends it.

A plain class; the gang makes a Ray actor of it. Calls come one at a time, in the actor's main thread: the
kernel binds a child's life to the thread that started it.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from dist_lm.cluster import process
from dist_lm.tracking.redact import without_secrets

# glibc hands big blocks back to the kernel and faults them in again at every step: a fifth of a step of a small model.
# Blocks of 64 MiB and more still go back: kept, they leave holes that cost a larger model memory and win no time.
CPU_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(64 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}


@dataclass(frozen=True)
class Assignment:
    """The part of a gang that one node runs."""

    node: int
    nodes: int
    ranks_per_node: int
    module: str  # run as `python -m`
    arguments: tuple[str, ...]
    master_address: str
    master_port: int
    loopback: bool  # all nodes are this machine
    device: str  # cpu | cuda
    log: Path  # appended to
    mark: str
    directory: Path  # working directory, where it exists on the node
    environment: Mapping[str, str] = field(default_factory=dict)  # over what the node has


@dataclass(frozen=True)
class RankExit:
    """A rank that ended badly, as torchrun saw it."""

    rank: int
    exit_code: int  # negative: the number of a signal
    time: float  # seconds since 1970


@dataclass(frozen=True)
class NodeReport:
    """How torchrun on one node stands; `exit_code` is None while it runs."""

    exit_code: int | None
    exits: tuple[RankExit, ...] = ()


class NodeAgent:
    """The ranks of one node."""

    def __init__(self) -> None:
        self._torchrun: subprocess.Popen[bytes] | None = None
        self._report = -1  # read end of the pipe that torchrun's report comes through
        self._assignment: Assignment | None = None
        self._interrupt = False
        self._interrupted: set[int] = set()

    def sees(self, path: Path) -> bool:
        """Whether this node sees a directory."""
        return path.is_dir()

    def free_port(self, address: str) -> int:
        """A TCP port of `address` for the ranks to meet at."""
        return process.free_port(address)

    def launch(self, assignment: Assignment) -> None:
        """Start torchrun."""
        assert self._torchrun is None
        self._assignment = assignment
        self._report, write_end = os.pipe()
        command = [sys.executable, "-m", "dist_lm.cluster.torchrun", str(os.getpid()), str(write_end)]
        assignment.log.parent.mkdir(parents=True, exist_ok=True)
        with assignment.log.open("ab") as log:
            self._torchrun = subprocess.Popen(
                [*command, *torchrun_arguments(assignment)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=rank_environment(assignment, os.environ, process.cores()),
                cwd=assignment.directory if assignment.directory.is_dir() else None,
                pass_fds=(write_end,),
                start_new_session=True,
            )
        os.close(write_end)

    def poll(self) -> NodeReport:
        """How it stands; a pending interrupt goes to ranks that have become ready for it."""
        assert self._torchrun is not None
        exit_code = self._torchrun.poll()
        if exit_code is None:
            if self._interrupt:
                self._deliver_interrupt()
            return NodeReport(None)
        return NodeReport(exit_code, self._read_report() if exit_code else ())

    def interrupt(self) -> None:
        """Ask the ranks (SIGUSR1) to write a checkpoint and leave; one still starting is asked in `poll`."""
        self._interrupt = True
        self._deliver_interrupt()

    def stop(self, grace_s: float) -> list[int]:
        """End all that `launch` started: SIGTERM, then SIGKILL after `grace_s`; the ids of what is left."""
        if self._assignment is None:
            return []
        mark = self._assignment.mark
        left = process.end(lambda: process.marked(mark), grace_s)
        if self._torchrun is not None:
            self._torchrun.poll()  # takes it from the process table
        return left

    def _deliver_interrupt(self) -> None:
        assert self._assignment is not None
        for rank in self._ranks(self._assignment.mark):
            if rank.pid not in self._interrupted and process.catches(rank, signal.SIGUSR1):
                self._interrupted.add(rank.pid)
                process.send(rank, signal.SIGUSR1)

    def _ranks(self, mark: str) -> list[psutil.Process]:
        assert self._torchrun is not None
        try:
            children = psutil.Process(self._torchrun.pid).children()
        except psutil.NoSuchProcess:
            return []
        ours = {found.pid for found in process.marked(mark)}
        return [child for child in children if child.pid in ours]

    def _read_report(self) -> tuple[RankExit, ...]:
        if self._report < 0:
            return ()
        with os.fdopen(self._report, "rb") as pipe:
            content = pipe.read()
        self._report = -1
        failures: list[dict[str, Any]] = json.loads(content) if content else []
        return tuple(RankExit(**failure) for failure in failures)


def torchrun_arguments(assignment: Assignment) -> list[str]:
    """torchrun's command line for one node.

    The rendezvous is static: ranks follow the order of the nodes, and it is 0.6 s faster than c10d's.
    """
    return [
        *("--nnodes", str(assignment.nodes), "--node-rank", str(assignment.node)),
        *("--nproc-per-node", str(assignment.ranks_per_node), "--max-restarts", "0"),
        *("--master-addr", assignment.master_address, "--master-port", str(assignment.master_port)),
        *("-m", assignment.module, *assignment.arguments),
    ]


def rank_environment(assignment: Assignment, environ: Mapping[str, str], cores: int) -> dict[str, str]:
    """What torchrun and the ranks of a node find in their environment: `environ` without secrets, and ours.

    Args:
        cores: CPU cores this node's ranks share.
    """
    ours = {
        process.MARK: assignment.mark,
        "OMP_NUM_THREADS": str(max(1, cores // assignment.ranks_per_node)),
        "PYTHONUNBUFFERED": "1",
    }
    if assignment.device == "cpu":
        ours |= CPU_ALLOCATOR
    inherited = without_secrets(environ)
    if assignment.loopback and sys.platform == "linux":
        # otherwise gloo asks the resolver for this host's name, which may lead nowhere
        inherited.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return inherited | ours | dict(assignment.environment)
