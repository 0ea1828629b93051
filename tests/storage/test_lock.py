"""One writer a run, by the operating system's own lock."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading

import pytest

from dist_lm.errors import ArtefactError
from dist_lm.storage.lock import is_locked, locked, owner_of
from tests.patience import patient

HOLD = (
    "import sys, pathlib; from dist_lm.storage.lock import locked\n"
    "with locked(pathlib.Path(sys.argv[1])): print(); input()"
)


def test_a_second_writer_is_refused_by_name_and_a_killed_one_lets_go(tmp_path):
    path = tmp_path / ".lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(ArtefactError, match=rf"in use by process {holder.pid} on "), locked(path):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait(timeout=patient(60))
    with locked(path):
        assert f"process {os.getpid()}" in path.read_text()


def test_an_earlier_start_of_the_same_job_is_waited_for(tmp_path):
    path = tmp_path / ".lock"
    program = (
        "import sys, pathlib; from dist_lm.storage.lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1]), job='7'): print(); input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    holder.stdout.readline()
    assert is_locked(path)
    with pytest.raises(ArtefactError, match="of job 7"), locked(path, job="70"):
        pass
    ending = threading.Timer(0.5, holder.stdin.close)
    ending.start()
    with locked(path, job="7"):
        assert owner_of(path).endswith("of job 7")
    holder.wait(timeout=patient(60))
    assert not is_locked(path)


def test_whether_a_lock_is_held_is_asked_where_an_exclusive_one_needs_a_writer(tmp_path, monkeypatch):
    """NFS makes a lock of flock one of fcntl, which refuses an exclusive one of a file that is open for reading."""
    path, flock = tmp_path / ".lock", fcntl.flock

    def of_nfs(descriptor: int, operation: int) -> None:
        if operation & fcntl.LOCK_EX and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", of_nfs)
    with locked(path):
        assert is_locked(path)
    assert not is_locked(path)


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", unsupported)
    with pytest.raises(ArtefactError, match=r"\.lock: this file system has no file locks"), locked(tmp_path / ".lock"):
        pass


def test_waiting_ends_when_it_is_stopped(tmp_path):
    path, asked = tmp_path / ".lock", []
    again = locked(path, wait_s=60, on_wait=asked.append, stopped=lambda: len(asked) > 0)
    with locked(path), pytest.raises(ArtefactError, match="in use by process"), again:
        pass
    assert len(asked) == 1
