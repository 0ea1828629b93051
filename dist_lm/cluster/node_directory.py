"""The private directory of a Ray node: locked while its owner lives, and swept after an owner that was killed.

The name of the directory is also the mark that the node's processes carry in their environment, so whoever finds
the directory finds them too.
"""

import fcntl
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from dist_lm.storage import process

MARK = "DIST_LM_NODE"  # environment variable
PREFIX = "dln-"
RAY_TITLE = "ray::"  # of a worker process
LONGEST_TEMP = 24  # characters: Ray keeps sockets below it, whose paths the kernel limits to 107
GRACE_S = 2.5  # a scheduler may kill everything 5 s after it has asked


def short_temporary() -> Path:
    """$TMPDIR, or /tmp where that is too long for Ray's sockets."""
    base = tempfile.gettempdir()
    return Path(base if len(base) <= LONGEST_TEMP else "/tmp")  # noqa: S108 - what is made in it is ours alone


@contextmanager
def node_directory(grace_s: float = GRACE_S) -> Iterator[Path]:
    """A directory of ours alone (mode 0700), for the time of the block; then it and its processes are gone.

    Args:
        grace_s: between asking processes to end and killing them.
    """
    directory, lock = _create(short_temporary())
    try:
        yield directory
    finally:
        _remove(directory, grace_s)
        os.close(lock)


def sweep() -> list[Path]:
    """Clear away what killed nodes of this user left on this machine: processes and directories; those removed."""
    removed = []
    for directory in sorted(short_temporary().glob(f"{PREFIX}*")):
        lock = _lock(directory) if _is_ours(directory) else None
        if lock is not None:
            _remove(directory)
            os.close(lock)
            removed.append(directory)
    return removed


def end_processes(directory: Path, grace_s: float = GRACE_S) -> list[int]:
    """End every process of the node that `directory` belongs to; the ids of those that SIGKILL does not end."""
    return process.end(lambda: _processes(directory), grace_s)


def _processes(directory: Path) -> list[psutil.Process]:
    """Those that carry the mark; when there are none left, those whose title Ray wrote over it.

    A driver on this machine has files of Ray open too, and is not ours to end.
    """
    marked = process.marked(directory.name, MARK)  # the open files of every process are looked at only when needed
    return marked or [user for user in process.users_of(directory) if process.title(user).startswith(RAY_TITLE)]


def _create(base: Path) -> tuple[Path, int]:
    """A new directory and the descriptor that holds its lock."""
    while True:
        directory = base / f"{PREFIX}{secrets.token_hex(4)}"
        directory.mkdir(mode=0o700)
        lock = _lock(directory)
        if lock is not None:  # else another node swept it in the moment before it was locked
            return directory, lock


def _lock(directory: Path) -> int | None:
    """A descriptor that holds the lock of a directory, or None: it is taken, or the directory is gone."""
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


def _remove(directory: Path, grace_s: float = GRACE_S) -> None:
    left = end_processes(directory, grace_s)
    shutil.rmtree(directory, ignore_errors=bool(left))
    if left:
        raise RuntimeError(f"processes of a Ray node that SIGKILL does not end: {left}")
