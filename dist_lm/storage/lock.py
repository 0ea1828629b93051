"""Locks files, so that a run has one writer. The operating system releases a lock when its process ends."""

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
    """Holds the lock file `path` for the block; creates it if it is missing. The file names its owner and is not
    removed.

    Args:
        what: name of the locked thing in messages; the folder of `path` by default.
        job: id of the batch job of this process. An owner of the same job is an earlier start that is about to end, so
            it is waited for, for at least `OWN_JOB_S` seconds.
        wait_s: longest wait for any owner, in seconds; 0: one try.
        on_wait: called once with the text that names the owner, when the wait begins.
        stopped: called while waiting; if it returns True the wait ends with the error below.

    Raises:
        ArtefactError: another process, or an earlier call in this one, holds the lock (the message names host and
            process), or the file system has no locks.
        OSError: the file cannot be opened or written.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        started = time.monotonic()
        announced = False

        while not _try_lock(descriptor, path):
            owner = owner_of(path) or "another process"
            patience_s = wait_s

            # Another start of this job is about to end: the batch system has requeued the job.
            if job and re.search(rf"\bjob {re.escape(job)}$", owner):
                patience_s = max(wait_s, OWN_JOB_S)

            if time.monotonic() - started >= patience_s or stopped():
                raise ArtefactError(
                    f"{what or path.parent} is in use by {owner}: wait for it, stop it, or choose another run_id"
                )

            if not announced:
                on_wait(owner)
                announced = True
            time.sleep(_POLL_S)

        # The name is written into the locked file itself, in place: a new file would have a lock of its own.
        os.ftruncate(descriptor, 0)
        new_owner = f"process {os.getpid()} on {socket.gethostname()}"
        if job:
            new_owner += f" of job {job}"
        os.pwrite(descriptor, f"{new_owner}\n".encode(), 0)

        yield
    finally:
        os.close(descriptor)


def owner_of(path: Path) -> str:
    """Returns the last owner that a lock file names; an empty string without a lock file."""
    return path.read_text(errors="replace").strip() if path.exists() else ""


def is_locked(path: Path) -> bool:
    """Returns whether a process holds the lock now; False if there is no lock file. Does not wait.

    A free lock is held for a moment, so that another process may find it taken.

    Raises:
        ArtefactError: the file system has no locks.
        OSError: the file cannot be read.
    """
    if not path.exists():
        return False

    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # read-only: it may belong to another user
    try:
        return not _try_lock(descriptor, path, fcntl.LOCK_SH)  # on NFS an exclusive lock needs a file open for writing
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, path: Path, kind: int = fcntl.LOCK_EX) -> bool:
    """Takes the lock of an open file if it is free, without waiting, and returns whether it is held now.

    The lock is released when the file is closed.

    Args:
        path: the file, for the message.
        kind: LOCK_EX, or LOCK_SH, which several processes can hold.

    Raises:
        ArtefactError: the file system has no locks.
        OSError: any other failure.
    """
    # The call must return at once: a wait inside it could not be ended by `stopped` of `locked`.
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
