"""One Ray node as a program in the foreground, for schedulers and terminals. It ends without leaving anything behind.

    python -m dist_lm.cluster.ray_node head --address IP:PORT [--stop-file PATH] [--cpus N] [--gpus N]
    python -m dist_lm.cluster.ray_node worker --head IP:PORT [--ip IP | --interface NAME] [--wait-s S] [--cpus ...]

RAY_AUTH_TOKEN_PATH names the token file (mode 0600). TERM and INT stop the node; so does, on a head, a file at
--stop-file, which the head removes once it knows whether Ray is well. If Ray dies on a worker, the worker joins again
as long as the head answers.

Exit codes: 0 stopped while Ray was well; 1 Ray died or the head is gone; 2 an error that the user can correct, printed
in one line.

A third form, `private IP`, is internal: the head of `cluster=local`.
"""

import argparse
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from dist_lm.cluster.ray_cluster import PATH, TOKEN, ClusterError, check_token_file
from dist_lm.cluster.ray_processes import RayProcesses, head_arguments, node_directory, say, sweep
from dist_lm.errors import UserError
from dist_lm.storage import process
from dist_lm.tracking import readable

POLL_S = 0.2
WAIT_S = 300.0  # for the head
CONNECT_S = 2.0
SAME_SIGNAL_S = 0.5  # a scheduler sends TERM to Ray's processes too, and Ray may react first
HEALTHY_S = 60.0  # a Ray that dies later than this has not failed to start
MAX_FAILURES = 5  # in a row, each within HEALTHY_S
HEAD_CHECK_S = 1.0
HEAD_GONE_S = 5.0  # connections refused for this long mean that the head is gone; Ray itself waits a minute
PRIVATE_GRACE_S = 0.3  # a private Ray is unused by the time it is told to end
REPLACED_BY_RAY = "127.0.0.1"


@dataclass(frozen=True)
class HeadAddress:
    """The address that a Ray head listens at."""

    host: str
    port: int

    @classmethod
    def parse(cls, option: str, text: str) -> "HeadAddress":
        """Parses `IP:PORT`.

        Raises:
            ClusterError: another form, or an address that Ray replaces; names the option.
        """
        host, _, port = text.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ClusterError(f"{option}={text}: expected IP:PORT")
        if host == REPLACED_BY_RAY:
            raise ClusterError(
                f"{option}={text}: Ray replaces {host} by another address of the machine; give the machine's address "
                "in its network, or another loopback address such as 127.0.1.1"
            )
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def error(self) -> OSError | None:
        """Returns why no connection is possible now; None if it is."""
        try:
            socket.create_connection((self.host, self.port), timeout=CONNECT_S).close()
        except OSError as error:
            return error
        return None

    def check_free(self) -> None:
        """Refuses an address that a head could not listen on; binds the port for a moment.

        Raises:
            ClusterError: the port is taken, or the address belongs to another machine.
        """
        with socket.socket() as server:
            # Ignore connections that are closing.
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                server.bind((self.host, self.port))
            except OSError as error:
                raise ClusterError(
                    f"--address={self}: cannot listen on port {self.port} ({error.strerror}); give an address of "
                    "this machine and a free port below 10000"
                ) from None


def own_address(head: HeadAddress, environ: Mapping[str, str] = os.environ) -> str:
    """Returns the address of this node in the network that leads to the head.

    If the head has a loopback address, all nodes are on one machine; then it is the address of SLURMD_NODENAME or of
    the host name.

    Raises:
        ClusterError: the name has no address, or there is no route to the head.
    """
    if head.host.startswith("127."):
        name = environ.get("SLURMD_NODENAME") or socket.gethostname()
        try:
            return socket.gethostbyname(name)
        except OSError as error:
            raise ClusterError(f"node {name}: no address for this name ({error.strerror}); give --ip") from None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        try:
            # Selects the route, sends nothing.
            route.connect((head.host, head.port))
        except OSError as error:
            raise ClusterError(f"--head={head}: no route to it ({error.strerror})") from None
        return route.getsockname()[0]


def address_of_interface(name: str) -> str:
    """Returns the IPv4 address of a network interface of this machine.

    Raises:
        ClusterError: there is no such interface, or it has no IPv4 address.
    """
    interfaces = psutil.net_if_addrs()
    addresses = [entry.address for entry in interfaces.get(name, []) if entry.family == socket.AF_INET]
    if not addresses:
        raise ClusterError(f"--interface={name}: no IPv4 address; this machine has {', '.join(sorted(interfaces))}")
    return addresses[0]


class Stop:
    """Stop flag, set by TERM, INT and a stop file, and the processes of Ray that had died before.

    The signal handler itself checks Ray: a scheduler sends TERM to every process of a job step, so later all of Ray is
    dead. Without the check, a Ray that died just before TERM would count as well, although its driver may have left
    with exit code 0. On a busy node even the handler may run after Ray has ended by the same TERM; a stop file has no
    such race.
    """

    def __init__(self) -> None:
        self.requested = False
        self.watched: RayProcesses | None = None
        self.death: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)
        # Ray inherits this and would die of USR1, which a scheduler may send to every process of a job
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def request(self) -> None:
        """Stops the node; the first request checks Ray."""
        if not self.requested and self.watched:
            self.death = self.watched.death()
        self.requested = True

    def _note(self, number: int, frame: object) -> None:
        self.request()

    def pause(self, seconds: float) -> None:
        """Sleeps until the time has passed or a stop is requested."""
        deadline = time.monotonic() + seconds
        while not self.requested and time.monotonic() < deadline:
            time.sleep(POLL_S)


def run_head(address: HeadAddress, resources: Sequence[str], stop: Stop, stop_file: Path | None = None) -> int:
    """Runs the head until it is stopped or Ray dies; returns the exit code (0: stopped while Ray was well; 1: it died,
    which is printed).

    Args:
        resources: arguments of `ray start`.
        stop_file: stops the head once it exists, and is removed.

    Raises:
        ClusterError: the address cannot be listened on.
        RuntimeError: a process of the node survives SIGKILL.
    """
    address.check_free()
    with node_directory() as directory:
        ray = RayProcesses(directory, head_arguments(address.host, address.port, resources))
        stop.watched = ray
        death = None
        while not stop.requested and death is None:
            time.sleep(POLL_S)
            if stop_file and stop_file.exists():
                stop.request()
                stop_file.unlink(missing_ok=True)
            else:
                death = ray.death()
        return ray.report(stop.death if stop.requested else death)


def run_private(host: str) -> int:
    """Runs a head that only the process which started it can use, until standard input is closed.

    It removes what killed nodes have left, chooses a free port and a token (RAY_AUTH_TOKEN_PATH of this process), and
    prints `{"address", "token_path"}` as one line of JSON; if Ray dies, a second line, `{"death", "log"}`: what died,
    and the file with the end of Ray's logs or why there is none. Standard input also closes if the starting process is
    killed. Signals are ignored, so that a launch can write a checkpoint first. Returns exit code 1 if Ray died, else 0.

    Raises:
        RuntimeError: a process of a node survives SIGKILL.
        OSError: no port is free.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        # Not SIG_IGN, which Ray would inherit: TERM would not end it.
        signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    sweep()

    closed = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), closed.set()), name="stdin", daemon=True).start()
    with node_directory(PRIVATE_GRACE_S) as directory, process.reserve_port() as reserved:
        # Only this user can read the token, and with it reach the port.
        token = directory / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        os.environ[PATH] = str(token)

        port = reserved.getsockname()[1]
        arguments = head_arguments(host, port, [f"--num-cpus={process.cores()}"])
        with (directory / "ray_start.log").open("wb") as output:
            ray = RayProcesses(directory, arguments, output)
        print(json.dumps({"address": f"{host}:{port}", "token_path": str(token)}), flush=True)

        while not closed.is_set() and ray.death() is None:
            time.sleep(POLL_S)
        if death := ray.death():
            try:
                log = str(ray.keep_logs())
            except OSError as error:
                # A full disk may be what Ray died of.
                log = f"not kept: {error.strerror or error}"

            # The launch has the words for people; it may have been killed together with Ray.
            with suppress(BrokenPipeError):
                print(json.dumps({"death": death, "log": log}), flush=True)
        # Keep the logs until the launch, whose calls to Ray fail, has left.
        closed.wait()
    return 1 if death else 0


def run_worker(head: HeadAddress, ip: str, wait_s: float, resources: Sequence[str], stop: Stop) -> int:
    """Runs a worker until it is stopped, joining again if Ray dies; returns exit code 0.

    Args:
        wait_s: longest wait for the head.

    Raises:
        ClusterError: the head did not answer the first time.
        SystemExit: with a message (code 1): the head is gone, or Ray died too often.
        RuntimeError: a process of the node survives SIGKILL.
    """
    failures = 0
    has_joined = False
    while True:
        try:
            wait_for_head(head, wait_s, stop)
        except ClusterError as error:
            if not has_joined:
                raise
            # Exit code 1: the address was right, the head is gone.
            raise SystemExit(f"error: {error}") from error
        has_joined = True
        if stop.requested:
            return 0

        started = time.monotonic()
        death = run_worker_once(head, ip, resources, stop)
        if death is None:
            return 0

        # A Ray that was well for a while has not failed to start.
        was_healthy = time.monotonic() - started > HEALTHY_S
        failures = 1 if was_healthy else failures + 1
        # A refused connection is an answer of the head's machine: nothing listens there any more.
        if isinstance(head.error(), ConnectionRefusedError):
            raise SystemExit(f"error: --head={head}: the head is gone; this worker leaves")
        if failures == MAX_FAILURES:
            raise SystemExit(f"error: --head={head}: Ray died {failures} times in a row here; this worker leaves")
        stop.pause(min(2.0**failures, 30.0))


def run_worker_once(head: HeadAddress, ip: str, resources: Sequence[str], stop: Stop) -> str | None:
    """Joins the head and stays; returns what died (the head included), or None after a stop. A death of Ray is printed.
    Its processes have ended then.

    Raises:
        RuntimeError: one of them survives SIGKILL.
    """
    with node_directory() as directory:
        ray = RayProcesses(directory, [f"--address={head}", f"--node-ip-address={ip}", *resources])
        check_at = time.monotonic() + HEAD_CHECK_S
        refused_since: float | None = None
        while not stop.requested:
            if death := ray.death():
                # Ray may have died of the same TERM that is about to stop this node.
                stop.pause(SAME_SIGNAL_S)
                if stop.requested:
                    return None
                ray.report(death)
                return death

            now = time.monotonic()
            if now >= check_at:
                check_at = now + HEAD_CHECK_S
                if not isinstance(head.error(), ConnectionRefusedError):
                    refused_since = None
                elif refused_since is None:
                    refused_since = now
                elif now - refused_since > HEAD_GONE_S:
                    return "the head"
            time.sleep(POLL_S)
        return None


def wait_for_head(head: HeadAddress, wait_s: float, stop: Stop) -> None:
    """Waits until the head answers, since without a head `ray start` would hang; returns early after a stop.

    Raises:
        ClusterError: the head does not answer within `wait_s`.
    """
    deadline = time.monotonic() + wait_s
    while not stop.requested and (error := head.error()):
        if time.monotonic() > deadline:
            raise ClusterError(
                f"--head={head}: no Ray head answers there (waited {wait_s:g} s: {error.strerror or error}); "
                "start it first, or give another --wait-s"
            )
        stop.pause(0.5)


def check_token() -> None:
    """Refuses to start a Ray without a token; removes RAY_AUTH_TOKEN, which Ray would prefer, from the environment.

    Raises:
        ClusterError: RAY_AUTH_TOKEN_PATH is not set, or its file is refused.
    """
    path = os.environ.get(PATH)
    if not path:
        raise ClusterError(f"{PATH}: not set; it must name the file with the cluster's token (mode 0600)")
    # Ray would prefer it to the file.
    os.environ.pop(TOKEN, None)
    check_token_file(PATH, path)


def arguments() -> argparse.Namespace:
    """Returns the parsed command line; exits with code 2 if it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m dist_lm.cluster.ray_node", description="One Ray node in the foreground."
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="head|worker")
    head = kinds.add_parser("head", help="start a cluster")
    head.add_argument("--address", required=True, metavar="IP:PORT", help="address to listen on")
    head.add_argument("--stop-file", type=Path, metavar="PATH", help="stop once this file exists, and remove it")

    worker = kinds.add_parser("worker", help="join a cluster")
    worker.add_argument("--head", required=True, metavar="IP:PORT", help="where the head listens")
    node_address = worker.add_mutually_exclusive_group()
    node_address.add_argument("--ip", help="address of this node (default: that of the route to the head)")
    node_address.add_argument("--interface", metavar="NAME", help="network interface whose address this node uses")
    worker.add_argument("--wait-s", type=float, default=WAIT_S, help="longest wait for the head (default: %(default)g)")

    for kind in (head, worker):
        kind.add_argument("--cpus", type=int, help="CPUs to offer (default: those this process may use)")
        kind.add_argument("--gpus", type=int, help="GPUs to offer (default: those Ray finds)")
    kinds.add_parser("private").add_argument("ip")
    return parser.parse_args()


def run(options: argparse.Namespace) -> int:
    """Runs the node that the command line describes; returns the exit code. Leftovers of killed nodes are removed
    first.

    It sets signal handlers and removes RAY_AUTH_TOKEN from the environment.

    Raises:
        ClusterError: an option, the token or the address cannot be used, or the head did not answer a worker.
        SystemExit: see `run_worker`.
        RuntimeError: a process of a node survives SIGKILL.
        OSError: no port is free.
    """
    if options.kind == "private":
        return run_private(options.ip)

    stop = Stop()
    check_token()
    for directory in sweep():
        say(f"removed {directory}, left by a node that was killed")

    resources = [f"--num-cpus={options.cpus if options.cpus is not None else process.cores()}"]
    if options.gpus is not None:
        resources.append(f"--num-gpus={options.gpus}")
    if options.kind == "head":
        return run_head(HeadAddress.parse("--address", options.address), resources, stop, options.stop_file)
    head = HeadAddress.parse("--head", options.head)
    if options.interface:
        ip = address_of_interface(options.interface)
    else:
        ip = options.ip or own_address(head)
    return run_worker(head, ip, options.wait_s, resources, stop)


def main() -> None:
    """Entry point.

    Raises:
        RuntimeError: a process of a node survives SIGKILL.
        SystemExit: see `run_worker`.
    """
    try:
        sys.exit(run(arguments()))
    except UserError as error:
        readable.say(f"error: {error}", sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
