"""What runs on each node: looks at the node, starts torchrun for its ranks, watches, interrupts, ends it.

A plain class; the gang makes a Ray actor of it. Calls come one at a time, in the actor's main thread: the
kernel binds a child's life to the thread that started it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from dist_lm.cluster import link
from dist_lm.cluster.heartbeat import VARIABLE, HeartbeatBoard, Pulse
from dist_lm.cluster.node_facts import NodeFacts, examine
from dist_lm.cluster.node_usage import NodeUsage, UsageMeter
from dist_lm.cluster.rank_environment import interface_of, rank_environment
from dist_lm.cluster.ray_access import access_variables
from dist_lm.storage import process
from dist_lm.storage.run_directory import RunDirectory

# when a rank fails torchrun asks the others on its node to leave; on NCCL they wait in a collective and do not hear it
PEERS_LEAVE_S = 5
QUIET_S = 2.0  # a rank that has not been heard of for so long has the state of its process looked at
STACKS_SIGNAL = signal.SIGUSR2  # a rank writes the stacks of its threads to its log
PY_SPY_S = 20.0  # for all ranks of a node


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
    address: str  # of this node, as the others know it
    device: str  # cpu | cuda
    run: RunDirectory
    mark: str
    directory: Path  # working directory, where it exists on the node
    environment: Mapping[str, str] = field(default_factory=dict)  # over what the node has
    core_users: int = 0  # processes that share the node's cores; 0: its ranks alone
    drives_actors: tuple[str, ...] = ()  # the first rank may join Ray: addresses of all nodes of the gang

    @property
    def first_rank(self) -> int:
        return self.node * self.ranks_per_node


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
    pulses: tuple[Pulse, ...] = ()  # of its ranks, while they run
    usage: NodeUsage | None = None  # of the whole node, while they run


class NodeAgent:
    """The ranks of one node."""

    def __init__(self) -> None:
        self._torchrun: subprocess.Popen[bytes] | None = None
        self._report = -1  # read end of the pipe that torchrun's report comes through
        self._assignment: Assignment | None = None
        self._interrupt = False
        self._interrupted: set[int] = set()
        self._board: HeartbeatBoard | None = None
        self._links: link.LinkServer | None = None
        self._meter = UsageMeter()

    def ready(self) -> None:
        """Answers as soon as the agent is there."""

    def examine(self, directory: Path, mark: str) -> NodeFacts:
        """What this node is like; see `node_facts.examine`."""
        return examine(directory, mark)

    def listen(self, address: str) -> tuple[int, bytes]:
        """(port, secret) at which other nodes can try their link to this one, until `launch` or `stop`."""
        self._links = link.LinkServer(address)
        return self._links.port, self._links.secret

    def try_link(self, address: str, port: int, secret: bytes, n_bytes: int) -> float | str:
        """Send to another node: bytes per second, or why it cannot be reached."""
        return link.send(address, port, secret, n_bytes)

    def free_port(self, address: str) -> int:
        """A TCP port of `address` for the ranks to meet at."""
        return process.free_port(address)

    def launch(self, assignment: Assignment) -> None:
        """Start torchrun."""
        assert self._torchrun is None
        self._close_links()
        self._assignment = assignment
        self._board = HeartbeatBoard(assignment.ranks_per_node)
        self._report, write_end = os.pipe()
        command = [sys.executable, "-m", "dist_lm.cluster.torchrun", str(os.getpid()), str(write_end)]
        environment = rank_environment(
            os.environ,
            mark=assignment.mark,
            logs=assignment.run.logs,
            device=assignment.device,
            cores_per_rank=process.cores() // (assignment.core_users or assignment.ranks_per_node),
            interface=interface_of(assignment.address),
            given=assignment.environment,
        )
        if assignment.drives_actors and assignment.node == 0:
            environment |= access_variables(os.environ, _ray_address(), assignment.drives_actors)
        with assignment.run.node_log(assignment.node).open("ab") as log:
            self._torchrun = subprocess.Popen(
                [*command, *torchrun_arguments(assignment)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment | {VARIABLE: self._board.path},
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
            return NodeReport(None, pulses=self._pulses(), usage=self._meter.read())
        return NodeReport(exit_code, self._read_report() if exit_code else ())

    def interrupt(self) -> None:
        """Ask the ranks (SIGUSR1) to write a checkpoint and leave; one still starting is asked in `poll`."""
        self._interrupt = True
        self._deliver_interrupt()

    def dump_stacks(self) -> None:
        """Have every rank write the stacks of its threads to its log; with py-spy installed, its C++ frames too."""
        assert self._assignment is not None
        ranks = self._ranks()
        for rank in ranks.values():
            if process.catches(rank, STACKS_SIGNAL):
                process.send(rank, STACKS_SIGNAL)
        spy, deadline = shutil.which("py-spy"), time.monotonic() + PY_SPY_S
        for local, rank in sorted(ranks.items()) if spy else ():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return
            with self._assignment.run.rank_log(self._assignment.first_rank + local).open("ab") as log:
                command = [spy, "dump", "--nonblocking", "--native", "--pid", str(rank.pid)]
                with suppress(subprocess.TimeoutExpired):  # one that waits for a device cannot be looked at
                    subprocess.run(command, stdout=log, stderr=log, timeout=left_s, check=False)

    def stop(self, grace_s: float) -> list[int]:
        """End all that `launch` started: SIGTERM, then SIGKILL after `grace_s`; the ids of what is left."""
        self._close_links()
        if self._assignment is None:
            return []
        mark = self._assignment.mark
        left = process.end(lambda: process.marked(mark), grace_s)
        if self._torchrun is not None:
            self._torchrun.poll()  # takes it from the process table
        return left

    def _deliver_interrupt(self) -> None:
        for rank in self._ranks().values():
            if rank.pid not in self._interrupted and process.catches(rank, signal.SIGUSR1):
                self._interrupted.add(rank.pid)
                process.send(rank, signal.SIGUSR1)

    def _pulses(self) -> tuple[Pulse, ...]:
        assert self._assignment is not None
        assert self._board is not None
        first = self._assignment.first_rank
        pulses = self._board.read(first, {})
        if min(pulse.age_s for pulse in pulses) > QUIET_S:
            pulses = self._board.read(first, {local: process.state(rank) for local, rank in self._ranks().items()})
        return pulses

    def _ranks(self) -> dict[int, psutil.Process]:
        """The processes of the ranks that are there, by local rank."""
        assert self._torchrun is not None
        found = {}
        try:
            for child in psutil.Process(self._torchrun.pid).children():
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended
                    local = child.environ().get("LOCAL_RANK")
                    if local is not None:
                        found[int(local)] = child
        except psutil.NoSuchProcess:
            return {}
        return found

    def _close_links(self) -> None:
        if self._links:
            self._links.close()
            self._links = None

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
        *("--shutdown-timeout", str(PEERS_LEAVE_S)),
        *("--master-addr", assignment.master_address, "--master-port", str(assignment.master_port)),
        *("-m", assignment.module, *assignment.arguments),
    ]


def _ray_address() -> str:
    """The head, as this node knows it."""
    import ray

    return ray.get_runtime_context().gcs_address
