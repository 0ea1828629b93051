"""The tools of a user's file, run in a separate process with limits on time and output."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from dist_lm.chat.messages import Call, Json, Tool
from dist_lm.errors import UserError, require

LOADING_S = 60.0  # limit for loading the file and its imports
LOOK_S = 0.05  # interval between checks for an interrupt


@dataclass(frozen=True)
class Limits:
    """Limits of a call."""

    seconds: float = 10.0
    characters: int = 4000  # longest JSON of a result

    def __post_init__(self) -> None:
        require(self.seconds > 0, "--tool-seconds", self.seconds, "a positive number of seconds")
        require(self.characters > 0, "--tool-characters", self.characters, "a positive integer")


class Toolbox:
    """The functions of one file. They run one at a time in a separate process, which keeps its state between calls."""

    def __init__(self, file: Path, limits: Limits) -> None:
        """Load `file`.

        Raises:
            UserError: the file is missing or cannot be loaded, or a function cannot be a tool; the message names it.
        """
        if not file.is_file():
            found = "a folder" if file.is_dir() else "no such file"
            raise UserError(f"--tools={file}: {found}; expected a Python file with functions")
        self._file, self._limits = file, limits
        self._host: _Host | None = None
        self.tools = self._begin()

    def __enter__(self) -> "Toolbox":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._host:
            self._host.end()
            self._host = None

    def run(self, call: Call, interrupted: Callable[[], bool] = lambda: False) -> Json:
        """The result of a call that fits one of the tools. An error becomes the result `{"error": why}`."""
        try:
            if self._host is None:
                self._begin()
            assert self._host
            self._host.send({"name": call.name, "arguments": call.arguments})
            found = self._host.receive(self._limits.seconds, interrupted)
        except TimeoutError as error:
            self.close()
            return {"error": f"{call.name} {error}"}
        except (EOFError, OSError):
            code = self._host.code() if self._host else None
            self.close()
            return {"error": f"{call.name} ended its own process (exit code {code})"}
        except UserError as error:
            return {"error": str(error)}
        return found["result"] if "result" in found else {"error": found["error"]}

    def _begin(self) -> tuple[Tool, ...]:
        self._host = _Host(self._file, self._limits.characters)
        try:
            said = self._host.receive(LOADING_S)
        except TimeoutError:
            self.close()
            raise UserError(f"--tools={self._file}: reading it takes longer than {LOADING_S:.0f} s") from None
        except (EOFError, OSError):
            code = self._host.code()
            self.close()
            raise UserError(f"--tools={self._file}: it ends the process that reads it (exit code {code})") from None
        if "refused" in said:
            self.close()
            raise UserError(f"--tools={self._file}: {' '.join(said['refused'].split())}")
        return tuple(Tool(*one) for one in said["tools"])


class _Host:
    """The process and its socket."""

    def __init__(self, file: Path, characters: int) -> None:
        self._connection, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dist_lm.tools.use.host", str(file), str(theirs.fileno()), str(characters)],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C reaches only this process; `end` kills the whole group
            )
        self._received = b""

    def send(self, value: dict[str, Any]) -> None:
        self._connection.sendall(json.dumps(value).encode() + b"\n")

    def receive(self, seconds: float, interrupted: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """The next message.

        Raises:
            TimeoutError: the time limit has passed, or `interrupted` returned true; the message says which.
            EOFError: the process has ended.
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
        return json.loads(line)

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
