"""Calls a function of ours on content that came from outside, in a process with limits of time and memory.

Files of other people's models are programs and claims: a chat template may loop for ever, a header may promise 10**11
layers, and a parser written in C may end its process. So they are read by `dist_lm.sandbox.limited_program`, which has
no files but the system's, no network, and answers requests until this process ends.

The process is started at the first call and kept for the next ones, so that a call costs a tenth of a millisecond. It
needs no bubblewrap: the limits are those that any process can set itself.
"""

import atexit
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from dist_lm.errors import UserError, one_line
from dist_lm.sandbox.environment import ENVIRONMENT
from dist_lm.sandbox.limited_program import ANSWER_BYTES, MEMORY_BYTES, frames_of, values_of

CPU_S = 8.0  # CPU time of a call; the largest tokenizers take 2
ANSWER_S = 120.0  # time by the clock, for a machine that is busy; the process ends itself after CPU_S
START_S = 60.0
TRIES = 2  # for a call that ends its process: other causes, such as a lack of memory, do not end it twice
ONE_THREAD = {  # threads of libraries would each take address space, which is limited
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_ARENA_MAX": "1",
}


class LimitError(UserError):
    """Raised if a function exceeds a limit or fails on its content; the message is the end of a sentence about it."""


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what `function` returns for `arguments`, computed in the process with limits. For any thread.

    Waits for other threads. A failure leaves no trace: the next call gets a new process if this one ended it.

    Args:
        function: of a module of dist_lm, by which the process finds it; what it imports must not need torch.
        arguments: JSON values and bytes, as the result is: a value, or a tuple of them, which comes as a list.

    Raises:
        LimitError: the function needs more than `CPU_S` or `MEMORY_BYTES`, ends its process, or raises an exception
            that is no UserError: content that no code of ours has foreseen.
        UserError: that which the function raises, of the same class.
        UserError: this machine starts no such process.
    """
    return _caller_of(os.getpid()).call(f"{function.__module__}:{function.__qualname__}", arguments)


class _Caller:
    """The process and our side of its socket."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None

    def call(self, function: str, arguments: tuple[Any, ...]) -> Any:
        """Does what the function `call` says; `function` is MODULE:NAME. Calls of several threads wait for one another,
        and a call whose process ends is tried again, TRIES times in all.

        Raises:
            LimitError: JSON cannot express the arguments, or the call takes too much time, CPU time or memory.
            UserError: the process cannot be started; or as the function raises it.
        """
        try:
            request = frames_of([function, CPU_S, *arguments])
        except (TypeError, ValueError, RecursionError) as error:
            raise LimitError(f"fails (JSON cannot express its arguments: {error})") from error

        with self._lock:
            for _ in range(TRIES):
                if self._process is None:
                    self._start()

                try:
                    kind, ends, *values = self._ask(request)
                except TimeoutError:
                    self.end()
                    raise LimitError(f"takes more than {ANSWER_S:g} s") from None
                except (EOFError, OSError, ValueError):
                    code = self._code()
                    self.end()
                    # The timer of CPU time ends the process by this signal.
                    if code == -signal.SIGPROF:
                        raise LimitError(f"takes more than {CPU_S:g} s of CPU time") from None
                    continue
                except BaseException:
                    self.end()  # after Ctrl-C the next call would get the answer of this one
                    raise

                if ends:
                    self.end()
                return _outcome(kind, values)

        raise LimitError(f"takes more than {MEMORY_BYTES >> 20} MiB of memory, or ends the process ({code})")

    def _start(self) -> None:
        """Starts the process and waits until it has confined itself.

        Raises:
            UserError: it does not start, or the kernel refuses a limit; the message has the end of its error.
        """
        environment = ENVIRONMENT | ONE_THREAD
        # Packages are found where this process finds them; the folder of a script or of the user is not among these.
        paths = [str(Path(__file__).parents[2]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        paths += [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        paths = [path for path in dict.fromkeys(paths) if os.path.isabs(path)]
        environment |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
        self._connection, child_socket = socket.socketpair()
        with child_socket:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dist_lm.sandbox.limited_program", str(child_socket.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(child_socket.fileno(),),
                start_new_session=True,  # Ctrl-C is for the parent, which ends this process
                env=environment,
            )

        try:
            self._receive(time.monotonic() + START_S)
        except (EOFError, OSError) as error:
            self._process.kill()
            _, message = self._process.communicate()
            self.end()
            last_line = message.decode(errors="replace").strip().rpartition("\n")[2]
            raise UserError(f"no process with limits starts: {last_line or error or 'it ended'}") from error

        assert self._process.stderr is not None  # the process has given it up
        self._process.stderr.close()

    def _ask(self, request: bytes) -> list[Any]:
        """Sends a request and returns the values of the answer.

        Raises:
            TimeoutError: there is no answer within `ANSWER_S`.
            EOFError, OSError: the process has ended, or sent something else than an answer.
        """
        assert self._connection is not None
        self._connection.settimeout(ANSWER_S)
        self._connection.sendall(request)
        return self._receive(time.monotonic() + ANSWER_S)

    def _receive(self, deadline: float) -> list[Any]:
        """Returns the values of the next answer. Raises as `_ask`."""

        def read(length: int) -> bytes:
            data = bytearray()
            while len(data) < length:
                assert self._connection is not None
                # With a timeout of 0 the socket would not wait at all.
                self._connection.settimeout(max(0.001, deadline - time.monotonic()))
                piece = self._connection.recv(min(length - len(data), 1 << 20))
                if not piece:
                    raise EOFError
                data += piece
            return bytes(data)

        try:
            return values_of(read, ANSWER_BYTES)
        except (ValueError, TypeError, RecursionError) as error:
            raise OSError(f"expected an answer, got {error!r}") from error

    def _code(self) -> int | None:
        """Returns the exit code of the process; None if it does not end within a second."""
        assert self._process is not None
        try:
            return self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> None:
        """Ends the process, if there is one."""
        if self._connection:
            self._connection.close()
        if self._process:
            self._process.kill()
            self._process.wait()
        self._process = self._connection = None


def _outcome(kind: str, values: list[Any]) -> Any:
    """Returns the result in an answer, or raises its error.

    Args:
        kind: `result`; or the name of a class of errors, `UserError` or one below it; or `failed`.
        values: the result, or the message.
    """
    if kind == "result":
        return values[0] if len(values) == 1 else values
    message = one_line(str(values[0]))
    if kind == "failed":
        raise LimitError(f"fails ({message})")
    raise _user_errors().get(kind, UserError)(message)


def _user_errors() -> dict[str, type[UserError]]:
    """Returns all classes of errors of users that are imported here, by name."""
    classes: dict[str, type[UserError]] = {}
    waiting: list[type[UserError]] = [UserError]
    while waiting:
        error_class = waiting.pop()
        classes[error_class.__name__] = error_class
        waiting += error_class.__subclasses__()
    return classes


@lru_cache
def _caller_of(process: int) -> _Caller:
    """Returns the caller of this process: a forked one must not read the answers of its parent's."""
    caller = _Caller()
    atexit.register(caller.end)
    return caller


def process_id() -> int | None:
    """Returns the id of the running process with limits; None: there is none. For tests and figures."""
    process = _caller_of(os.getpid())._process
    return process.pid if process else None
