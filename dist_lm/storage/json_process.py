"""A Python module in a process of its own that answers requests: one JSON object a line, over a socket.

For functions of users, which may hang, fail or end their process. Nothing is unpickled. What they print goes to
standard error. The process ends when its parent ends, and the parent kills it after a time limit.
"""

import contextlib
import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

LOOK_S = 0.05  # interval between calls of `interrupted`


class JsonProcess:
    """The parent's side: the process and its socket."""

    def __init__(self, module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        """Start `python -m module SOCKET arguments`.

        Args:
            environment: None: that of this process.
        """
        self._connection, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno()), *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C reaches only the parent; `end` kills the whole group
                env=environment,
            )
        self._received = b""

    @property
    def pid(self) -> int:
        """Id of the process."""
        return self._process.pid

    def send(self, value: Mapping[str, Any], seconds: float) -> None:
        """Send one message.

        Raises:
            TimeoutError: the process did not read it within the time limit.
            OSError: the process has ended.
        """
        self._connection.settimeout(seconds)
        try:
            self._connection.sendall(_line(value))
        except TimeoutError:
            raise TimeoutError(f"did not read a request within {seconds:g} s and was ended") from None

    def receive(self, seconds: float, interrupted: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """The next message.

        Args:
            interrupted: called at least every `LOOK_S` seconds.

        Raises:
            TimeoutError: the time limit has passed, or `interrupted` returned true; the message says which.
            EOFError, OSError: the process has ended, or something else than JSON was written to the socket.
        """
        deadline = time.monotonic() + seconds
        while b"\n" not in self._received:
            if interrupted():
                raise TimeoutError("was stopped")
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"took longer than {seconds:g} s and was ended")
            if select.select([self._connection], [], [], min(LOOK_S, left))[0]:
                part = self._connection.recv(1 << 16)
                if not part:
                    raise EOFError
                self._received += part
        line, _, self._received = self._received.partition(b"\n")
        try:
            return json.loads(line)
        except ValueError as error:
            raise OSError(f"expected a line of JSON, got {line[:80]!r}") from error

    def code(self) -> int | None:
        """The exit code of the process; None if it does not end within a second."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(1.0)
        return None

    def end(self) -> None:
        """Kill the process and everything that it has started."""
        self._connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextmanager
def asked() -> Iterator[tuple["queue.Queue[dict[str, Any]]", Callable[[Mapping[str, Any]], None]]]:
    """The process's side: the queue of requests, and the function that sends an answer.

    Print goes to standard error. The process ends when its parent closes the socket, even while a function runs, and
    after a line that is no JSON, which it shows.
    """
    os.dup2(2, 1)
    requests: queue.Queue[dict[str, Any]] = queue.Queue()
    with socket.socket(fileno=int(sys.argv[1])) as connection:

        def listen() -> None:
            code = 1
            try:
                with contextlib.suppress(ConnectionError), connection.makefile("rb") as lines:
                    for line in lines:
                        if line.endswith(b"\n"):  # else the parent was killed while it sent it
                            requests.put(json.loads(line))
                code = 0
            except ValueError:
                traceback.print_exc()
            finally:
                os._exit(code)

        threading.Thread(target=listen, daemon=True).start()
        yield requests, lambda value: connection.sendall(_line(value))


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"
