"""Runs a Python module in a process of its own that answers requests: one JSON object a line, over a socket.

Runs functions of users, which may hang, fail or end their process. Nothing is unpickled. What the functions print goes
to standard error. The process ends when its parent ends, and the parent kills it after a time limit.
"""

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

LOOK_S = 0.05  # interval between calls of `interrupted`


def start_json_process(
    module: str, *arguments: str, environment: Mapping[str, str] | None = None, pass_fds: Sequence[int] = ()
) -> tuple["subprocess.Popen[bytes]", socket.socket]:
    """Starts `python -m module SOCKET arguments`; returns the process, which leads a group, and our end of the socket.

    Args:
        environment: variables of the new process; None: those of this process.
        pass_fds: file descriptors that the new process gets, under the same numbers.
    """
    # A socket of its own, because functions of a user may read and write the standard streams.
    connection, child_socket = socket.socketpair()
    with child_socket:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(child_socket.fileno()), *arguments],
            stdin=subprocess.DEVNULL,
            pass_fds=(child_socket.fileno(), *pass_fds),
            start_new_session=True,  # Ctrl-C reaches only the parent; killing the group ends its processes, too
            env=environment,
        )
    return process, connection


class JsonProcess:
    """The parent's side of the connection: the process and its socket."""

    def __init__(
        self,
        module: str,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        """Starts `python -m module SOCKET arguments`; the arguments are those of `start_json_process`."""
        self._process, self._connection = start_json_process(
            module, *arguments, environment=environment, pass_fds=pass_fds
        )
        self._received = b""

    @property
    def pid(self) -> int:
        """Returns the id of the process."""
        return self._process.pid

    def send(self, message: Mapping[str, Any], seconds: float) -> None:
        """Sends one message as a line of JSON; `seconds` is the time limit. The process is not ended on an error.

        Raises:
            TimeoutError: the process did not read the message within the time limit; a part of it may be sent.
            OSError: the process has ended.
            TypeError: JSON cannot express the message.
        """
        self._connection.settimeout(seconds)
        try:
            self._connection.sendall(_line(message))
        except TimeoutError:
            raise TimeoutError(f"did not read a request within {seconds:g} s and was ended") from None

    def receive(self, seconds: float, interrupted: Callable[[], bool] | None = None) -> dict[str, Any]:
        """Returns the next message. The process is not ended on an error: the caller calls `end`.

        Args:
            seconds: time limit.
            interrupted: called at least every `LOOK_S` seconds; true ends the wait. None: this thread sleeps
                until a message comes.

        Raises:
            TimeoutError (an OSError): the time limit has passed, or `interrupted` returned true; the message says
                which. What has arrived stays for the next call.
            EOFError, OSError: the process has ended, or something other than JSON was written to the socket.
        """
        deadline = time.monotonic() + seconds
        while b"\n" not in self._received:
            if interrupted and interrupted():
                raise TimeoutError("was stopped")

            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError(f"took longer than {seconds:g} s and was ended")
            # Short waits, so that `interrupted` is called often. The time limit of the socket serves any descriptor;
            # select.select takes those below 1,024 alone, and a rank of a large job has more connections.
            self._connection.settimeout(min(LOOK_S, remaining) if interrupted else remaining)
            try:
                received = self._connection.recv(1 << 16)
            except TimeoutError:
                continue
            if not received:
                raise EOFError
            self._received += received

        # More than one message may have arrived; the rest stays for the next call.
        line, _, self._received = self._received.partition(b"\n")
        try:
            return json.loads(line)
        except ValueError as error:
            raise OSError(f"expected a line of JSON, got {line[:80]!r}") from error

    def code(self) -> int | None:
        """Returns the exit code of the process; None if it does not end within a second."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(1.0)
        return None

    def end(self) -> None:
        """Kills the process and all processes that it has started."""
        # The functions of a user may have started processes, which share the group.
        self._connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextmanager
def serve_requests() -> Iterator[tuple["queue.Queue[dict[str, Any]]", Callable[[Mapping[str, Any]], None]]]:
    """Answers requests in the child process: yields the queue of requests, and the function that sends an answer.

    Inside and after the block, print goes to standard error. A thread fills the queue. The process ends (`os._exit`)
    with code 0 when its parent closes the socket, even while a function runs, and with code 1 after a line that is no
    JSON, whose traceback it prints. The socket is the file descriptor in `sys.argv[1]`.
    """
    # A print of the user's function must not reach the standard output of the launch.
    os.dup2(2, 1)

    requests: queue.Queue[dict[str, Any]] = queue.Queue()
    with socket.socket(fileno=int(sys.argv[1])) as connection:

        def listen() -> None:
            """Puts each request line into the queue, and ends the process behind the last one; does not return."""
            code = 1
            try:
                # A thread reads, so that the end of the parent is noticed while a function of the user runs.
                with contextlib.suppress(ConnectionError), connection.makefile("rb") as lines:
                    for line in lines:
                        if line.endswith(b"\n"):  # an incomplete line: the parent was killed while sending
                            requests.put(json.loads(line))
                code = 0
            except ValueError:
                traceback.print_exc()
            finally:
                os._exit(code)

        # A daemon, so that a process whose main thread is done need not wait for its parent.
        threading.Thread(target=listen, daemon=True).start()
        yield requests, lambda answer: connection.sendall(_line(answer))


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"
