"""Ray's processes on one machine and the private directory they use.

The owner locks the directory while it runs; `sweep` removes directories and processes of owners that were killed. The
name of the directory is also a mark in the environment of the processes, so the directory leads to them.

`python -m dist_lm.cluster.ray_processes PARENT ARGUMENTS...` is `ray start` that dies with the process PARENT.
"""

import fcntl
import os
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil

from dist_lm.cluster.ray_cluster import RAY_ENVIRONMENT, keep_loopback
from dist_lm.cluster.torchrun import OPENMP_SPIN
from dist_lm.storage import process
from dist_lm.tracking import readable

MARK = "DIST_LM_NODE"  # environment variable
PREFIX = "dln-"
RAY_TITLE = "ray::"  # how the command line of a Ray worker process begins
LONGEST_TEMP = 24  # characters; Ray creates sockets below it, and the kernel limits their paths to 107
HEAD_PROCESSES = ("gcs_server", "raylet")
WORKER_PROCESSES = ("raylet",)
LOG_TAIL = 15  # lines
GRACE_S = 2.5  # a scheduler may send SIGKILL to everything 5 s after SIGTERM


class RayProcesses:
    """`ray start --block` and its child processes that must live."""

    def __init__(self, directory: Path, arguments: Sequence[str], output: IO[bytes] | None = None) -> None:
        """Starts Ray with its files in `directory`.

        Args:
            arguments: arguments of `ray start`; for a head they begin with --head.
            output: file for its output; None: it shares the output of this process.
        """
        self._names = HEAD_PROCESSES if "--head" in arguments else WORKER_PROCESSES
        self._watched: dict[str, psutil.Process] = {}
        self._temporary = directory / "ray"
        # Temporary files of killed ranks are removed with the directory.
        files = directory / "tmp"
        files.mkdir()

        self._start = subprocess.Popen(
            [
                *(sys.executable, "-m", "dist_lm.cluster.ray_processes", str(os.getpid()), "--block"),
                *("--disable-usage-stats", "--include-log-monitor=false", f"--temp-dir={self._temporary}"),
                *arguments,
            ],
            env=OPENMP_SPIN | os.environ | RAY_ENVIRONMENT | {MARK: directory.name, "TMPDIR": str(files)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    def death(self) -> str | None:
        """Returns in words that a process died; None while Ray is well."""
        # Its children are watched too: `ray start` may notice the end of one of them later.
        code = self._start.poll()
        if code is not None:
            return f"`ray start` left with exit code {code}"
        if len(self._watched) < len(self._names):
            with suppress(psutil.NoSuchProcess):
                children = psutil.Process(self._start.pid).children()
                started = {child.name(): child for child in children if child.name() in self._names}
                # A new dict: the signal handler may read the old one meanwhile.
                self._watched = self._watched | started
        return next((f"{name} died" for name, child in self._watched.items() if not process.is_alive(child)), None)

    def report(self, death: str | None) -> int:
        """Prints what died and the end of Ray's logs, which are removed with the directory; returns the exit code.

        It is 0, without a print, for None, else 1.
        """
        if death is None:
            return 0
        say(f"{death}; ending every process of this node")
        for name, lines in self.ends_of_logs():
            say(f"the end of {name}:", *lines)
        return 1

    def keep_logs(self) -> Path:
        """Writes the end of Ray's logs to a new file in $TMPDIR that only this user can read and that stays; returns
        its path.

        Raises:
            OSError: the file cannot be written.
        """
        descriptor, path = tempfile.mkstemp(".log", "dist_lm-ray-")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            for name, lines in self.ends_of_logs():
                file.write("\n".join([f"the end of {name}:", *lines, ""]))
        return Path(path)

    def ends_of_logs(self) -> Iterator[tuple[str, list[str]]]:
        """Yields name and last lines of each log of Ray that there is."""
        for name in ("gcs_server.out", "raylet.out", "raylet.err"):
            log = self._temporary / "session_latest" / "logs" / name
            if log.exists():
                with log.open(errors="replace") as lines:
                    yield name, list(deque((line.rstrip() for line in lines), LOG_TAIL))


def head_arguments(host: str, port: int, resources: Sequence[str]) -> list[str]:
    """Returns the arguments of `ray start` for a head."""
    return [
        "--head",
        f"--node-ip-address={host}",
        f"--port={port}",
        "--include-dashboard=false",
        "--no-monitor",
        *resources,
    ]


@contextmanager
def node_directory(grace_s: float = GRACE_S) -> Iterator[Path]:
    """A new directory (mode 0700) for the block; leaving the block ends its processes and removes it.

    Args:
        grace_s: between SIGTERM and SIGKILL.

    Raises:
        RuntimeError: a process survives SIGKILL; its files may stay.
    """
    directory, lock = _create(_short_temporary())
    try:
        yield directory
    finally:
        _remove(directory, grace_s)
        os.close(lock)


def sweep() -> list[Path]:
    """Removes directories and processes that killed nodes of this user left on this machine; returns the directories.

    Raises:
        RuntimeError: a process survives SIGKILL.
    """
    removed = []
    for directory in sorted(_short_temporary().glob(f"{PREFIX}*")):
        lock = _lock(directory) if _is_ours(directory) else None
        if lock is not None:
            _remove(directory, GRACE_S)
            os.close(lock)
            removed.append(directory)
    return removed


def _short_temporary() -> Path:
    """$TMPDIR, or /tmp if that is too long for Ray's sockets."""
    base = tempfile.gettempdir()
    return Path(base if len(base) <= LONGEST_TEMP else "/tmp")  # noqa: S108 - the directories made in it are private


def _processes(directory: Path) -> list[psutil.Process]:
    """Returns the node's processes that carry the mark; if there are none, Ray workers that have overwritten it.

    A driver on this machine has Ray's files open too and must not be ended.
    """
    # Checking the open files of every process is slow: only if needed.
    marked = process.marked(directory.name, MARK)
    return marked or [user for user in process.users_of(directory) if process.title(user).startswith(RAY_TITLE)]


def _create(base: Path) -> tuple[Path, int]:
    """Returns a new directory (mode 0700) below `base`, and the descriptor that holds its lock."""
    # Another node may sweep the directory before it is locked: then a new one is made.
    while True:
        directory = base / f"{PREFIX}{secrets.token_hex(4)}"
        directory.mkdir(mode=0o700)
        lock = _lock(directory)
        # None: another node swept it before it was locked.
        if lock is not None:
            return directory, lock


def _lock(directory: Path) -> int | None:
    """Returns a descriptor that holds the lock of a directory; None at once if it is locked or gone."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    if not directory.exists():
        os.close(descriptor)
        return None
    return descriptor


def _is_ours(directory: Path) -> bool:
    try:
        status = directory.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()


def _remove(directory: Path, grace_s: float) -> None:
    pids_left = process.end(lambda: _processes(directory), grace_s)
    shutil.rmtree(directory, ignore_errors=bool(pids_left))
    if pids_left:
        raise RuntimeError(f"processes of the Ray node {directory} that SIGKILL does not end: {pids_left}")


def say(*lines: str) -> None:
    """Prints lines with the time to standard error."""
    readable.say(time.strftime("%H:%M:%S ray_node: ") + "\n  ".join(lines), sys.stderr)


def main() -> None:
    """Runs `ray start`, which does not return while the node lives.

    Raises:
        OSError: the kernel refuses to end this process with its parent.
    """
    process.die_with_parent(int(sys.argv[1]))

    from ray.scripts.scripts import main as ray

    keep_loopback()
    sys.argv[:] = ["ray", "start", *sys.argv[2:]]
    ray()


if __name__ == "__main__":
    main()
