"""The processes of ranks 1 to tp - 1 of a model: start them, send them commands, watch them and end them.

They are children of this process, which is rank 0. Each has a socket that carries commands as JSON; its only reply is
that it is ready. All processes end with the first: a follower ends when its socket closes, and the kernel kills it when
this process dies. When a follower dies, its siblings are killed and this process gets a `RankLostError`.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO

import dist_lm
from dist_lm.storage.process import signal_name

READY_S = 180.0  # for all followers to start (they import torch and initialise CUDA)
END_S = 10.0  # for a follower to end by itself
NOTICE_S = 5.0  # from a failed collective until the watcher has noticed which rank died
OUTPUT_BYTES = 2000  # an error shows so much of a follower's last output
PROGRAM = "dist_lm.generation.sharded"


class RankLostError(RuntimeError):
    """Another process of the model has ended, so the model cannot be used any more; the message says why."""


@dataclass
class _Follower:
    rank: int
    process: subprocess.Popen[bytes]
    connection: Connection
    output: IO[bytes]  # standard output and error, in a file without a name that leaves nothing behind

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process.pid})"

    def last_output(self) -> str:
        file = self.output.fileno()
        begin = max(0, os.fstat(file).st_size - OUTPUT_BYTES)
        return os.pread(file, OUTPUT_BYTES, begin).decode(errors="replace").strip()


class Followers:
    """Ranks 1 to tp - 1. The kernel kills them when the thread that started them ends (`die_with_parent`)."""

    def __init__(self, tp: int, setup: dict[str, object], on_loss: Callable[[], None]) -> None:
        """Starts the processes and waits until they are ready.

        Args:
            setup: the first message to each follower.
            on_loss: called in a watching thread when a follower has died.

        Raises:
            RankLostError: a follower has died, or has not started in time.
        """
        self._on_loss = on_loss
        self._lock = threading.Lock()  # guards the next two: watchers write them, too
        self._ending = False
        self._failure = ""
        self._failed = threading.Event()

        self._followers: list[_Follower] = []
        try:
            for rank in range(1, tp):
                self._followers.append(_start(rank))
            for follower in self._followers:
                # Watch before the first message: a process may die while it imports torch.
                threading.Thread(target=self._watch, args=[follower], daemon=True).start()
            self.tell(setup)
            self._await_ready()
        except BaseException:
            self.end()
            raise

    def tell(self, command: object) -> None:
        """Sends a command, made of JSON values, to all followers; it does not wait for its execution.

        Raises:
            RankLostError: the command could not be sent, because a follower has died or the model was abandoned.
            OSError: a message could not be sent, though no follower died within NOTICE_S seconds.
        """
        # JSON and not pickle: a command cannot run code.
        message = json.dumps(command).encode()
        try:
            for follower in self._followers:
                follower.connection.send_bytes(message)
        except OSError as error:
            self.explain(error)
            raise

    def check(self) -> None:
        """Raises `RankLostError` if a follower has died or the model was abandoned."""
        if self._failure:
            raise RankLostError(self._failure)

    def explain(self, error: BaseException) -> None:
        """Raises `RankLostError` from `error` if a follower's death is known within NOTICE_S seconds; otherwise
        returns."""
        if self._failed.wait(NOTICE_S):
            raise RankLostError(self._failure) from error

    def abandon(self, reason: str) -> None:
        """Kills the followers, because they are not at the same step any more; from now on `check` raises `reason`.
        Does nothing after an earlier failure, or while followers are being ended."""
        with self._lock:
            if self._failure or self._ending:
                return
            self._failure = reason
        self._failed.set()
        self._kill()

    def end(self) -> None:
        """Ends the followers and waits for their exit: closes their sockets, and kills those that run END_S seconds
        later (all of them at once after a failure)."""
        with self._lock:
            self._ending = True
        if self._failure:
            self._kill()

        # A follower ends by itself when its socket closes.
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
        """Waits for the exit of a follower; unless the followers are being ended, it is recorded as the failure.

        Then all followers are killed, `check` raises the failure, and `on_loss` is called in this thread. After a first
        failure it does nothing.
        """
        code = follower.process.wait()
        with self._lock:
            if self._ending or self._failure:
                return
            end = f"ended with exit code {code}"
            if code < 0:
                end = f"was killed by {signal_name(-code)}"
            output = follower.last_output() or "no output"
            # The last line comes at the end: some callers show only the last line of an error.
            full_output = f"{output}\n" if "\n" in output else ""
            name = f"{follower} of {len(self._followers) + 1} ranks"
            self._failure = f"{full_output}{name} {end}: {output.splitlines()[-1]}"

        # Outside the lock: `on_loss` is code of the caller, which may call `abandon` or `end`.
        self._failed.set()
        self._kill()
        self._on_loss()

    def _await_ready(self) -> None:
        """Waits until every follower has said that it is ready, at most READY_S seconds together.

        Raises:
            RankLostError: a follower has died or did not start in time; then all are killed.
            EOFError, OSError: a socket closed, though no follower died within NOTICE_S seconds.
        """
        deadline = time.monotonic() + READY_S
        for follower in self._followers:
            try:
                if not follower.connection.poll(max(0.0, deadline - time.monotonic())):
                    self.abandon(f"{follower} did not start within {READY_S:.0f} s")
                    self.check()
                follower.connection.recv_bytes()
            except (EOFError, OSError) as error:
                self.explain(error)
                raise

    def _kill(self) -> None:
        for follower in self._followers:
            follower.process.kill()


def _start(rank: int) -> _Follower:
    """Starts the process of a follower in a session of its own, with a socket to this process; does not wait for it.

    It imports dist_lm from the same folder as this process and inherits the environment. Its output goes to a file
    without a name (`_Follower.output`). The kernel kills it when the calling thread ends.

    Raises:
        OSError: the kernel refuses a socket, a file or a process.
    """
    leader_socket, follower_socket = socket.socketpair()
    output = tempfile.TemporaryFile()  # noqa: SIM115  closed in `end`
    # The follower must import the same package as this process, wherever that was found.
    paths: Sequence[str] = (str(Path(dist_lm.__file__).parents[1]), os.environ.get("PYTHONPATH", ""))

    with follower_socket:
        process = subprocess.Popen(
            # -P: Python must not import files of the working directory.
            [sys.executable, "-P", "-m", PROGRAM, str(follower_socket.fileno()), str(rank), str(os.getpid())],
            pass_fds=(follower_socket.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)},
            start_new_session=True,  # Ctrl-C reaches rank 0 only
        )
    return _Follower(rank, process, Connection(leader_socket.detach()), output)
