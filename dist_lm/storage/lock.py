"""File locks: one writer per run. The operating system releases a lock when its process ends."""

import errno
import fcntl
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_lm.errors import ArtefactError

OWN_JOB_S = 120.0  # a network file system releases the locks of a lost node with a delay
_POLL_S = 0.2
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def locked(
    path: Path,
    *,
    what: str = "",
    job: str | None = None,
    wait_s: float = 0.0,
    on_wait: Callable[[str], None] = lambda owner: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Hold the lock file `path` for the block. The file names its owner; it is not removed.

    Args:
        what: name of the locked thing in messages; the folder of `path` by default.
        job: batch job of this process. An owner of the same job is an earlier start that is about to end, so it is
            waited for.
        wait_s: longest wait for any owner.
        on_wait: called once with the owner.
        stopped: asked while waiting; if it returns True the wait ends with the error below.

    Raises:
        ArtefactError: another process holds the lock (the message names host and process), or the file system has no
            locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        started = time.monotonic()
        waits = False
        while not _taken(descriptor, path):
            owner = owner_of(path) or "another process"
            patience = max(wait_s, OWN_JOB_S) if job and re.search(rf"\bjob {re.escape(job)}$", owner) else wait_s
            if time.monotonic() - started >= patience or stopped():
                raise ArtefactError(
                    f"{what or path.parent} is in use by {owner}: wait for it, stop it, or choose another run_id"
                )
            if not waits:
                on_wait(owner)
                waits = True
            time.sleep(_POLL_S)
        os.ftruncate(descriptor, 0)
        owner = f"process {os.getpid()} on {socket.gethostname()}" + (f" of job {job}" if job else "")
        os.pwrite(descriptor, f"{owner}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def owner_of(path: Path) -> str:
    """The last owner of a lock file; empty without one."""
    return path.read_text(errors="replace").strip() if path.exists() else ""


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock now."""
    if not path.exists():
        return False
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # read-only: it may belong to another user
    try:
        return not _taken(descriptor, path, fcntl.LOCK_SH)  # on NFS an exclusive lock needs a file open for writing
    finally:
        os.close(descriptor)


def _taken(descriptor: int, path: Path, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        raise ArtefactError(
            f"{path}: this file system has no file locks ({error.strerror}), which keep two launches "
            "apart: choose a work_dir on another file system, or mount this one with locks"
        ) from error
    return True
