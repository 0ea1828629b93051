"""One writer a run: the lock goes with the process that holds it, however that ends."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_lm.errors import ArtefactError


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` as a lock file for the time of the block; it names its owner and stays behind, unlocked.

    Raises:
        ArtefactError: another process holds it; the message names host and process.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            raise ArtefactError(
                f"{path.parent} is in use by {owner}: wait for it, stop it, or choose another run_id"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
