"""The processes that share a model with this one: started, told what to do, watched and ended.

They are children of this process on the same machine, one a rank from 1 on (rank 0 is this process, which leads). Each
has a socket of its own, over which commands come as JSON, and nothing goes back but that it is ready. Nobody outlives
anybody: a follower ends when its socket closes, and by the kernel's hand when this process dies; when a follower dies
the others are ended, and who leads is told by an error.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO

import dist_lm

READY_S = 180.0  # until all followers have started (they import torch, and CUDA where there is any)
END_S = 10.0  # for a follower that should end
NOTICE_S = 5.0  # from an error in a message between ranks until it is known which one has died
WORDS = 2000  # bytes of what a follower wrote last
PROGRAM = "dist_lm.generation.follower"


class RankLostError(RuntimeError):
    """A process that shares a model has ended, so the model is of no use any more; the message says which and why."""


@dataclass
class _Follower:
    rank: int
    process: subprocess.Popen[bytes]
    connection: Connection
    output: IO[bytes]  # of standard output and error; without a name, so that nothing is left of it

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process.pid})"

    def last_words(self) -> str:
        size = os.fstat(self.output.fileno()).st_size
        return os.pread(self.output.fileno(), WORDS, max(0, size - WORDS)).decode(errors="replace").strip()


class Followers:
    """Ranks 1 to tp - 1. The thread that starts them has to live as long as they are needed (see `lifeline.py`)."""

    def __init__(self, tp: int, setup: dict[str, object], on_loss: Callable[[], None]) -> None:
        """Start them.

        Args:
            setup: the first message to each.
            on_loss: called, in another thread, when one has died.

        Raises:
            RankLostError: one has died, or they have not started in time.
        """
        self._on_loss = on_loss
        self._ending = False
        self._failure = ""
        self._failed = threading.Event()
        self._lock = threading.Lock()
        self._followers: list[_Follower] = []
        try:
            for rank in range(1, tp):
                self._followers.append(_start(rank))
            for follower in self._followers:
                threading.Thread(target=self._watch, args=[follower], daemon=True).start()
            self.tell(setup)
            self._await_ready()
        except BaseException:
            self.end()
            raise

    def tell(self, command: object) -> None:
        """Send a command to all: anything of plain values.

        Raises:
            RankLostError: one has died.
        """
        message = json.dumps(command).encode()
        try:
            for follower in self._followers:
                follower.connection.send_bytes(message)
        except OSError as error:
            self.explain(error)
            raise

    def check(self) -> None:
        """
        Raises:
            RankLostError: a follower has died.
        """
        if self._failure:
            raise RankLostError(self._failure)

    def explain(self, error: BaseException) -> None:
        """
        Raises:
            RankLostError: `error` came of a follower's death.
        """
        if self._failed.wait(NOTICE_S):
            raise RankLostError(self._failure) from error

    def abandon(self, reason: str) -> None:
        """End them now, as they are not where this process is any more; `check` refuses from here on."""
        with self._lock:
            if self._failure or self._ending:
                return
            self._failure = reason
        self._failed.set()
        self._kill()

    def end(self) -> None:
        """End them, and wait until they are gone."""
        with self._lock:
            self._ending = True
        if self._failure:
            self._kill()
        for follower in self._followers:
            follower.connection.close()
        deadline = time.monotonic() + END_S
        for follower in self._followers:
            try:
                follower.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                follower.process.kill()
                follower.process.wait()
            follower.output.close()

    def _watch(self, follower: _Follower) -> None:
        code = follower.process.wait()
        with self._lock:
            if self._ending or self._failure:
                return
            ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            words = follower.last_words() or "it wrote nothing"
            # the last line says it all: some who show errors show no more
            before = f"{words}\n" if "\n" in words else ""
            name = f"{follower} of {len(self._followers) + 1}, which share the model,"
            self._failure = f"{before}{name} {ended}: {words.splitlines()[-1]}"
        self._failed.set()
        self._kill()
        self._on_loss()

    def _await_ready(self) -> None:
        missing: list[Connection] = [follower.connection for follower in self._followers]
        deadline = time.monotonic() + READY_S
        while missing:
            ready = wait(missing, max(0.0, deadline - time.monotonic()))
            if not ready:
                late = [str(one) for one in self._followers if one.connection in missing]
                self.abandon(f"{', '.join(late)} did not start within {READY_S:.0f} s")
                self.check()
            for connection in ready:
                assert isinstance(connection, Connection)
                try:
                    connection.recv_bytes()
                except (EOFError, OSError) as error:
                    self.explain(error)
                    raise
                missing.remove(connection)

    def _kill(self) -> None:
        for follower in self._followers:
            follower.process.kill()


def _start(rank: int) -> _Follower:
    ours, theirs = socket.socketpair()
    output = tempfile.TemporaryFile()  # noqa: SIM115  closed in `end`
    paths: Sequence[str] = (str(Path(dist_lm.__file__).parents[1]), os.environ.get("PYTHONPATH", ""))
    with theirs:
        process = subprocess.Popen(
            # -P: a file beside which this process was started is no module of ours
            [sys.executable, "-P", "-m", PROGRAM, str(theirs.fileno()), str(rank), str(os.getpid())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)},
            start_new_session=True,  # Ctrl-C is for who leads
        )
    return _Follower(rank, process, Connection(ours.detach()), output)
