"""One Ray node as a program in the foreground, for schedulers and terminals; nothing of it is left when it ends.

    python -m dist_lm.cluster.ray_node head --address IP:PORT [--cpus N] [--gpus N]
    python -m dist_lm.cluster.ray_node worker --head IP:PORT [--ip IP | --interface NAME] [--wait-s S] [--cpus ...]

RAY_AUTH_TOKEN_PATH names the file with the token (mode 0600). TERM and INT stop the node. A worker whose Ray dies
joins again as long as the head answers.

Exit codes: 0 stopped by TERM or INT, and Ray was well until then; 1 Ray died, or the head is gone; 2 something the
user can mend (one line says what).
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil

from dist_lm.cluster import node_directory
from dist_lm.cluster.node_address import HeadAddress, address_of_interface, own_address
from dist_lm.cluster.rank_environment import PATIENCE
from dist_lm.cluster.ray_environment import ENVIRONMENT, ClusterError
from dist_lm.cluster.ray_token import check_token_file
from dist_lm.errors import UserError
from dist_lm.storage import process

POLL_S = 0.2
WAIT_S = 300.0  # for the head
SAME_SIGNAL_S = 0.5  # a scheduler sends TERM to Ray's processes too, which may be faster than we
HEALTHY_S = 60.0  # Ray that has run so long has not failed at its start
MAX_FAILURES = 5  # in a row, each within HEALTHY_S
HEAD_CHECK_S = 1.0
HEAD_GONE_S = 5.0  # refused connections for so long: the head is not coming back, Ray alone would wait a minute
HEAD_PROCESSES = ("gcs_server", "raylet")
WORKER_PROCESSES = ("raylet",)
LOG_TAIL = 15  # lines


class Stop:
    """Whether TERM or INT has come, and what had died before it.

    Later is too late to look: a scheduler sends TERM to every process of a job step, Ray's included. Not looking at
    all would pass off as well a Ray that died a moment before, whose driver may have left with exit code 0.
    """

    def __init__(self) -> None:
        self.requested = False
        self.watched: RayProcesses | None = None
        self.death: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)
        # inherited by Ray, which USR1 would kill: a scheduler may send it to every process of a job
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def _note(self, number: int, frame: object) -> None:
        if not self.requested and self.watched:
            self.death = self.watched.death()
        self.requested = True

    def pause(self, seconds: float) -> None:
        """Sleep, but not past a stop."""
        deadline = time.monotonic() + seconds
        while not self.requested and time.monotonic() < deadline:
            time.sleep(POLL_S)


class RayProcesses:
    """`ray start --block` and the processes below it that must live."""

    def __init__(
        self, directory: Path, names: Sequence[str], arguments: Sequence[str], output: IO[bytes] | None = None
    ) -> None:
        """Start Ray with its files in `directory`.

        Args:
            names: of the processes that must live.
            arguments: of `ray start`.
            output: where it prints; None: where this process does.
        """
        self._names = names
        self._seen: dict[str, psutil.Process] = {}
        self._temporary = directory / "ray"
        files = directory / "tmp"  # what ranks leave behind when they are killed goes with the directory
        files.mkdir()
        self._start = subprocess.Popen(
            [
                *(sys.executable, "-m", "dist_lm.cluster.ray_start", str(os.getpid()), "--block"),
                *("--disable-usage-stats", "--include-log-monitor=false", f"--temp-dir={self._temporary}"),
                *arguments,
            ],
            env=PATIENCE | os.environ | ENVIRONMENT | {node_directory.MARK: directory.name, "TMPDIR": str(files)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    def death(self) -> str | None:
        """What died, for people; None while Ray is well."""
        code = self._start.poll()
        if code is not None:
            return f"`ray start` left with exit code {code}"
        if len(self._seen) < len(self._names):
            with suppress(psutil.NoSuchProcess):
                children = psutil.Process(self._start.pid).children()
                found = {child.name(): child for child in children if child.name() in self._names}
                self._seen = self._seen | found  # a new one: a signal may come while the old one is read
        return next((f"{name} died" for name, seen in self._seen.items() if not process.is_alive(seen)), None)

    def print_log(self) -> None:
        """The last lines of the logs, which go with the directory."""
        for name in ("gcs_server.out", "raylet.out", "raylet.err"):
            log = self._temporary / "session_latest" / "logs" / name
            if log.exists():
                with log.open(errors="replace") as lines:
                    say(f"the end of {name}:", *deque((line.rstrip() for line in lines), LOG_TAIL))


def run_head(address: HeadAddress, resources: Sequence[str], stop: Stop) -> int:
    """Be the head until it is stopped or dies. Returns the exit code."""
    address.check_free()
    with node_directory.node_directory() as directory:
        ray = RayProcesses(directory, HEAD_PROCESSES, head_arguments(address.host, address.port, resources))
        stop.watched = ray
        death = None
        while not stop.requested and death is None:
            time.sleep(POLL_S)
            death = ray.death()
        return report(stop.death if stop.requested else death, ray)


def head_arguments(host: str, port: int, resources: Sequence[str]) -> list[str]:
    """Those of `ray start` for a head."""
    return ["--head", f"--node-ip-address={host}", f"--port={port}", "--include-dashboard=false", *resources]


def run_worker(head: HeadAddress, ip: str, wait_s: float, resources: Sequence[str], stop: Stop) -> int:
    """Be a worker until it is stopped or the head is gone; join again when Ray dies. Returns the exit code."""
    failures, joined = 0, False
    while True:
        try:
            wait_for_head(head, wait_s, stop)
        except ClusterError as error:
            if not joined:
                raise
            raise SystemExit(f"error: {error}") from error  # it was right once: nothing to mend here
        joined = True
        if stop.requested:
            return 0
        started = time.monotonic()
        death = run_worker_once(head, ip, resources, stop)
        if death is None:
            return 0
        failures = 1 if time.monotonic() - started > HEALTHY_S else failures + 1
        if isinstance(head.error(), ConnectionRefusedError):
            raise SystemExit(f"error: --head={head}: the head is gone; this worker leaves")
        if failures == MAX_FAILURES:
            raise SystemExit(f"error: --head={head}: Ray died {failures} times in a row here; this worker leaves")
        stop.pause(min(2.0**failures, 30.0))


def run_worker_once(head: HeadAddress, ip: str, resources: Sequence[str], stop: Stop) -> str | None:
    """Join the head and stay. Returns what died; None: we were asked to stop."""
    with node_directory.node_directory() as directory:
        ray = RayProcesses(directory, WORKER_PROCESSES, [f"--address={head}", f"--node-ip-address={ip}", *resources])
        check_at = time.monotonic() + HEAD_CHECK_S
        refused_since: float | None = None
        while not stop.requested:
            if death := ray.death():
                stop.pause(SAME_SIGNAL_S)
                if stop.requested:
                    return None
                report(death, ray)
                return death
            now = time.monotonic()
            if now >= check_at:
                check_at = now + HEAD_CHECK_S
                refused = isinstance(head.error(), ConnectionRefusedError)
                refused_since = (refused_since or now) if refused else None
                if refused_since and now - refused_since > HEAD_GONE_S:
                    return "the head"
            time.sleep(POLL_S)
        return None


def wait_for_head(head: HeadAddress, wait_s: float, stop: Stop) -> None:
    """Wait until the head answers: `ray start` would hang without it.

    Raises:
        ClusterError: it does not within `wait_s`.
    """
    deadline = time.monotonic() + wait_s
    while not stop.requested and (error := head.error()):
        if time.monotonic() > deadline:
            raise ClusterError(
                f"--head={head}: no Ray head answers there (waited {wait_s:g} s: {error.strerror or error}); "
                "start it first, or give another --wait-s"
            )
        stop.pause(0.5)


def report(death: str | None, ray: RayProcesses) -> int:
    """Say what died and why; the exit code."""
    if death is None:
        return 0
    say(f"{death}; every process of this node ends")
    ray.print_log()
    return 1


def say(*lines: str) -> None:
    """Print lines to standard error, with the time."""
    print(time.strftime("%H:%M:%S ray_node:"), "\n  ".join(lines), file=sys.stderr, flush=True)


def check_token() -> None:
    """Refuse to start a Ray that lets everybody in.

    Raises:
        ClusterError: RAY_AUTH_TOKEN_PATH is not set, or its file is not fit.
    """
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not path:
        raise ClusterError("RAY_AUTH_TOKEN_PATH: not set; it names the file with the cluster's token (mode 0600)")
    os.environ.pop("RAY_AUTH_TOKEN", None)  # Ray would prefer it
    check_token_file("RAY_AUTH_TOKEN_PATH", path)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dist_lm.cluster.ray_node", description="One Ray node in the foreground."
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    head = kinds.add_parser("head", help="start a cluster")
    head.add_argument("--address", required=True, metavar="IP:PORT", help="to listen on")
    worker = kinds.add_parser("worker", help="join a cluster")
    worker.add_argument("--head", required=True, metavar="IP:PORT", help="where the head listens")
    own = worker.add_mutually_exclusive_group()
    own.add_argument("--ip", help="address of this node (default: that of the route to the head)")
    own.add_argument("--interface", metavar="NAME", help="network interface whose address it is")
    worker.add_argument("--wait-s", type=float, default=WAIT_S, help="longest wait for the head (default: %(default)g)")
    for kind in (head, worker):
        kind.add_argument("--cpus", type=int, help="CPUs to offer (default: those this process may use)")
        kind.add_argument("--gpus", type=int, help="GPUs to offer (default: those Ray finds)")
    return parser.parse_args()


def run(options: argparse.Namespace) -> int:
    """Run the node that the command line describes. Returns the exit code."""
    stop = Stop()
    check_token()
    for directory in node_directory.sweep():
        say(f"cleared away {directory}, left by a node that was killed")
    resources = [f"--num-cpus={options.cpus if options.cpus is not None else process.cores()}"]
    if options.gpus is not None:
        resources.append(f"--num-gpus={options.gpus}")
    if options.kind == "head":
        return run_head(HeadAddress.parse("--address", options.address), resources, stop)
    head = HeadAddress.parse("--head", options.head)
    ip = address_of_interface(options.interface) if options.interface else options.ip or own_address(head)
    return run_worker(head, ip, options.wait_s, resources, stop)


def main() -> None:
    """Entry point."""
    try:
        sys.exit(run(arguments()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
