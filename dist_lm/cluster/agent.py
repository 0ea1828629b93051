"""The agent of a node: measures the node, starts torchrun for its ranks, watches, interrupts and ends them.

A plain class; the gang makes it a Ray actor. Its calls run one after another in the actor's main thread, because the
kernel ties the life of a child (PR_SET_PDEATHSIG) to the thread that started it.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from dist_lm.cluster import flight_recorder, node_facts
from dist_lm.cluster.gpu_health import Health, HealthWatch
from dist_lm.cluster.gpu_probe import START_S, Probes
from dist_lm.cluster.heartbeat import VARIABLE, HeartbeatBoard, Pulse
from dist_lm.cluster.node_facts import LinkServer, NodeFacts, NodeUsage, UsageMeter
from dist_lm.cluster.ray_cluster import access_variables
from dist_lm.cluster.torchrun import interface_of, rank_environment
from dist_lm.parallel.rendezvous import BACKEND, NODES_BACKEND, allow_store
from dist_lm.storage import process
from dist_lm.storage.run_directory import RunDirectory

# after a failure torchrun asks the other ranks of its node to leave; a rank in an NCCL collective does not react
PEERS_LEAVE_S = 5
QUIET_S = 2.0  # after this silence of a rank, the state of its process is read too
STACKS_SIGNAL = signal.SIGUSR2  # makes a rank write the stacks of its threads to its log
NUMA_NODES = Path("/sys/devices/system/node")
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
    master_port: int  # 0: not used, as on one node
    address: str  # this node's, by which the others reach it
    device: str  # cpu | cuda
    run: RunDirectory
    mark: str
    directory: Path  # working directory, if it exists on the node
    environment: Mapping[str, str] = field(default_factory=dict)  # overrides the node's
    core_users: int = 0  # processes that share the node's cores; 0: its ranks alone
    drives_actors: tuple[str, ...] = ()  # addresses of all nodes of the gang, if rank 0 may join Ray

    @property
    def first_rank(self) -> int:
        return self.node * self.ranks_per_node


@dataclass(frozen=True)
class RankExit:
    """A failed rank, as torchrun reports it."""

    rank: int
    exit_code: int  # negative: a signal number
    time: float  # seconds since 1970


@dataclass(frozen=True)
class NodeReport:
    """State of torchrun on one node; `exit_code` is None while it runs."""

    exit_code: int | None
    exits: tuple[RankExit, ...] = ()
    pulses: tuple[Pulse, ...] = ()  # last heartbeats of its ranks, while they run
    usage: NodeUsage | None = None  # load of the whole node, while they run


class NodeAgent:
    """The ranks of one node."""

    def __init__(self) -> None:
        self._torchrun: subprocess.Popen[bytes] | None = None
        self._report = -1  # read end of the pipe for torchrun's report
        self._assignment: Assignment | None = None
        self._interrupt = False
        self._interrupted: set[int] = set()
        self._board: HeartbeatBoard | None = None
        self._sockets: tempfile.TemporaryDirectory[str] | None = None  # the ranks' flight recorders listen there
        self._links: LinkServer | None = None
        self._reserved: list[socket.socket] = []
        self._meter = UsageMeter()
        self._probes: Probes | None = None

    def ready(self) -> None:
        """Returns once the agent has started."""

    def examine(self, directory: Path, mark: str) -> NodeFacts:
        """See `node_facts.examine`."""
        return node_facts.examine(directory, mark)

    def listen(self, address: str) -> tuple[int, bytes]:
        """(port, secret) for `measure_link` of other nodes, until `launch` or `stop`."""
        self._links = LinkServer(address)
        return self._links.port, self._links.secret

    def measure_link(self, address: str, port: int, secret: bytes, n_bytes: int) -> float | str:
        """See `node_facts.send`."""
        return node_facts.send(address, port, secret, n_bytes)

    def check_gpus(self, device: str, count: int, burn_s: float, address: str) -> Health:
        """Returns the health of the first `count` GPUs, watched during matrix products. Wrong products, and a process
        that fails or is silent, are faults too.

        It waits up to `START_S` + `burn_s` seconds. The processes stay for `sum_up`; `end_probes` ends them.

        Args:
            device: cuda, or cpu to try the products without GPUs.
            burn_s: seconds of products; 0: no processes start, only NVML is read.
            address: this node's, by which the others reach it.
        """
        gpus: tuple[str, ...] = ()
        if device == "cuda":
            gpus = node_facts.shown_gpus()[:count]
        # Without GPUs nothing is asked of NVML.
        watch = HealthWatch(gpus and node_facts.open_nvml(), gpus)
        wrong: list[str] = []
        if burn_s:
            # A GPU that hangs keeps only its own process, which can be killed.
            self._probes = Probes(device, count, address)
            request = {"do": "burn", "seconds": burn_s}
            answers = self._probes.ask([request] * count, START_S + burn_s, watch.look)
            texts = [answer if isinstance(answer, str) else answer["fault"] for answer in answers]
            names = [f"GPU {gpu}" for gpu in gpus] or [f"rank {local}" for local in range(count)]
            wrong = [f"{name}: {text}" for name, text in zip(names, texts, strict=True) if text]

        health = watch.read()
        return replace(health, faults=(*health.faults, *wrong))

    def sum_up(self, first: int, world: int, address: str, port: int, timeout_s: float) -> list[dict[str, Any] | str]:
        """The answers of this node's processes, the first of which is rank `first`, to an all-reduce over `world`."""
        assert self._probes
        count = self._probes.count
        # Processes of one node meet in a file, which no other user can write.
        meeting = {"store": self._probes.new_store()} if world == count else {"address": address, "port": port}
        request = {"do": "all_reduce", "world": world} | meeting
        return self._probes.ask([request | {"rank": first + local} for local in range(count)], timeout_s)

    def end_probes(self) -> None:
        """Ends the processes of `check_gpus`."""
        if self._probes:
            self._probes.close()
            self._probes = None

    def reserve_port(self) -> int:
        """Returns a TCP port for a rendezvous of ranks, kept from others until `stop`.

        Raises:
            OSError: no port is free.
        """
        # The socket stays open, or another program could take the port before the ranks do.
        reserved = process.reserve_port()
        self._reserved.append(reserved)
        return reserved.getsockname()[1]

    def launch(self, assignment: Assignment) -> None:
        """Starts torchrun with the ranks of the node; only once in the life of an agent. It does not wait for the
        ranks.

        The node gets pipes and shared memory for reports, and torchrun writes to the node's log. The server of `listen`
        is closed.

        Raises:
            OSError: torchrun or its log cannot be opened.
            ConfigError: this process may have too few open files for so many ranks.
        """
        assert self._torchrun is None
        self._close_links()

        if assignment.node == 0:
            allow_store(assignment.nodes * assignment.ranks_per_node)
        self._assignment = assignment
        self._board = HeartbeatBoard(assignment.ranks_per_node)
        self._sockets = tempfile.TemporaryDirectory(prefix="dlm-")
        # torchrun's exit code does not tell which rank failed and when, so it reports that through a pipe.
        self._report, write_end = os.pipe()
        command = [sys.executable, "-m", "dist_lm.cluster.torchrun", str(os.getpid()), str(write_end)]

        # Ranks get the cores of the node in equal shares, and nothing that Ray has set for this actor.
        environment = rank_environment(
            os.environ,
            mark=assignment.mark,
            logs=assignment.run.logs,
            device=assignment.device,
            cores_per_rank=process.cores() // (assignment.core_users or assignment.ranks_per_node),
            interface=interface_of(assignment.address),
            overrides=assignment.environment,
        )
        # A rank knows nothing of Ray, so this process hands it the address and the token.
        if assignment.drives_actors and assignment.node == 0:
            import ray

            head = ray.get_runtime_context().gcs_address
            environment |= access_variables(os.environ, head, assignment.drives_actors)

        # A session of its own keeps signals to Ray's processes away from the ranks.
        with assignment.run.node_log(assignment.node).open("ab") as log:
            self._torchrun = subprocess.Popen(
                [*command, *torchrun_arguments(assignment)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment | {VARIABLE: self._board.path, flight_recorder.VARIABLE: self._sockets.name},
                cwd=assignment.directory if assignment.directory.is_dir() else None,
                pass_fds=(write_end,),
                start_new_session=True,
            )
        # Only torchrun holds the write end now, so reading ends when torchrun does.
        os.close(write_end)

    def poll(self) -> NodeReport:
        """Returns the present state. A pending interrupt is sent to ranks that have become ready for it.

        Heartbeats and load are there only while torchrun runs; failed ranks only in the first report after its end.
        """
        assert self._torchrun is not None
        exit_code = self._torchrun.poll()
        if exit_code is None:
            if self._interrupt:
                self._send_interrupt()
            return NodeReport(None, pulses=self._pulses(), usage=self._meter.read())
        return NodeReport(exit_code, self._read_report() if exit_code else ())

    def interrupt(self) -> None:
        """Asks the ranks (SIGUSR1) to write a checkpoint and leave; `poll` asks ranks that are still starting."""
        self._interrupt = True
        self._send_interrupt()

    def dump_hang(self) -> None:
        """Writes what the ranks hang in: the stacks of their threads to their logs, and their last collectives to
        files.

        C++ frames need py-spy; without it they are left out. It takes up to about 25 s.

        Raises:
            OSError: a file cannot be written.
        """
        assert self._assignment is not None
        assert self._sockets is not None
        run, first, ranks = self._assignment.run, self._assignment.first_rank, self._ranks()
        for rank in ranks.values():
            # Without a handler the signal would end the rank.
            if process.catches(rank, STACKS_SIGNAL):
                process.send(rank, STACKS_SIGNAL)

        files = {local: run.collectives(first + local) for local in ranks}
        flight_recorder.dump_collectives(Path(self._sockets.name), files)

        py_spy = shutil.which("py-spy")
        if py_spy is None:
            return
        deadline = time.monotonic() + PY_SPY_S
        for local, rank in sorted(ranks.items()):
            seconds_left = deadline - time.monotonic()
            if seconds_left <= 0:
                return
            with run.rank_log(first + local).open("ab") as log:
                command = [py_spy, "dump", "--nonblocking", "--native", "--pid", str(rank.pid)]
                # A process that waits for a device cannot be read.
                with suppress(subprocess.TimeoutExpired):
                    subprocess.run(command, stdout=log, stderr=log, timeout=seconds_left, check=False)

    def stop(self, grace_s: float) -> list[int]:
        """Ends everything that `launch` and `check_gpus` started: SIGTERM, SIGKILL after `grace_s` seconds. Frees the
        ports of `listen` and `reserve_port`.

        It returns the ids of processes that remain; empty also before `launch`.
        """
        self._close_links()
        self.end_probes()
        while self._reserved:
            self._reserved.pop().close()
        if self._assignment is None:
            return []

        # Ranks are found by their mark: if torchrun was killed, they are nobody's children.
        mark = self._assignment.mark
        pids_left = process.end(lambda: process.marked(mark), grace_s)
        if self._torchrun is not None:
            self._torchrun.poll()  # reaps the zombie
        if self._sockets:
            self._sockets.cleanup()
        return pids_left

    def _send_interrupt(self) -> None:
        for rank in self._ranks().values():
            # Without a handler, USR1 would end a rank that is still importing.
            if rank.pid not in self._interrupted and process.catches(rank, signal.SIGUSR1):
                self._interrupted.add(rank.pid)
                process.send(rank, signal.SIGUSR1)

    def _pulses(self) -> tuple[Pulse, ...]:
        """Returns the last heartbeats of the ranks; the states of their processes are read only if one is silent."""
        assert self._assignment is not None
        assert self._board is not None
        first = self._assignment.first_rank
        pulses = self._board.read(first, {})
        if min(pulse.age_s for pulse in pulses) > QUIET_S:
            pulses = self._board.read(first, {local: process.state(rank) for local, rank in self._ranks().items()})
        return pulses

    def _ranks(self) -> dict[int, psutil.Process]:
        """Returns the living processes of the ranks, by local rank; empty after the end of torchrun. Only after
        `launch` (asserted)."""
        assert self._torchrun is not None
        ranks = {}
        try:
            for child in psutil.Process(self._torchrun.pid).children():
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended
                    local = child.environ().get("LOCAL_RANK")
                    if local is not None:
                        ranks[int(local)] = child
        except psutil.NoSuchProcess:
            return {}
        return ranks

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
        return tuple(RankExit(**failure) for failure in json.loads(content or "[]"))


def numa_binding(nodes: Path = NUMA_NODES) -> list[str]:
    """Returns torchrun's option that keeps each rank on the cores beside its GPU; empty where it would gain nothing or
    torchrun would fail: with a single NUMA node, without `numactl`, or if this process may use no core of some node.

    Args:
        nodes: where Linux lists NUMA nodes.
    """
    allowed = os.sched_getaffinity(0)
    cores_of_nodes = [cores_of((node / "cpulist").read_text()) for node in sorted(nodes.glob("node[0-9]*"))]
    if len(cores_of_nodes) < 2 or shutil.which("numactl") is None:
        return []
    # A job may have been given cores of some nodes alone, and nodes of memory have none.
    if not all(cores & allowed for cores in cores_of_nodes):
        return []
    return ["--numa-binding", "node"]


def cores_of(ranges: str) -> set[int]:
    """Returns the numbers that a list of Linux such as `0-3,8` names; none for an empty one."""
    cores: set[int] = set()
    for part in filter(None, ranges.strip().split(",")):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores


def torchrun_arguments(assignment: Assignment) -> list[str]:
    """Returns torchrun's command line for one node.

    On one node, the private rendezvous opens no port. On several, a static one numbers ranks in the order of the nodes
    and is 0.6 s faster than c10d's.
    """
    rendezvous = ["--rdzv-backend", BACKEND]
    if assignment.nodes > 1:
        endpoint = f"{assignment.master_address}:{assignment.master_port}"
        rendezvous = ["--rdzv-backend", NODES_BACKEND, "--rdzv-endpoint", endpoint]
        rendezvous += ["--rdzv-conf", f"rank={assignment.node}"]
    return [
        *("--nnodes", str(assignment.nodes)),
        *("--nproc-per-node", str(assignment.ranks_per_node), "--max-restarts", "0"),
        *("--shutdown-timeout", str(PEERS_LEAVE_S)),
        *(numa_binding() if assignment.device == "cuda" else ()),
        *rendezvous,
        *("-m", assignment.module, *assignment.arguments),
    ]
