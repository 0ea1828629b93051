"""The tools of a user's file, run in a separate process with limits on time and output."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from dist_lm.chat.messages import Call, Json, Tool
from dist_lm.errors import UserError, require
from dist_lm.storage.json_process import JsonProcess

LOADING_S = 60.0  # limit for loading the file and its imports


@dataclass(frozen=True)
class Limits:
    """Limits of one call."""

    seconds: float = 10.0  # longest time
    characters: int = 4000  # longest result, as JSON

    def __post_init__(self) -> None:
        require(self.seconds > 0, "--tool-seconds", self.seconds, "a positive number of seconds")
        require(self.characters > 0, "--tool-characters", self.characters, "a positive integer")


class Toolbox:
    """The functions of one file as tools. They run one at a time in one separate process, so state survives a call."""

    def __init__(self, file: Path, limits: Limits) -> None:
        """Loads `file`.

        Raises:
            UserError: the file is missing or cannot be loaded, or a function cannot be a tool; the message names it.
        """
        if not file.is_file():
            reason = "a folder" if file.is_dir() else "no such file"
            raise UserError(f"--tools={file}: {reason}; expected a Python file with functions")

        self._file = file
        self._limits = limits
        self._host: JsonProcess | None = None
        self.tools = self._start()

    def __enter__(self) -> "Toolbox":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process; the next call starts another one."""
        if self._host:
            self._host.end()
            self._host = None

    def run(self, call: Call, interrupted: Callable[[], bool] = lambda: False) -> Json:
        """Returns the result of a call that fits one of the tools; an error becomes the result `{"error": why}`.

        A call that takes longer than the limit, is interrupted or ends its process leaves no process. The next call
        starts another one and loads the file again, so the state of the functions is lost; if that fails, its result is
        the error. Nothing is raised.

        Args:
            interrupted: asked several times a second; True ends the call, which is an error.
        """
        try:
            if self._host is None:
                # An earlier call has ended the process or was stopped.
                self._start()
            assert self._host
            self._host.send({"name": call.name, "arguments": call.arguments}, self._limits.seconds)
            reply = self._host.receive(self._limits.seconds, interrupted)
        except TimeoutError as error:
            # A call that hangs cannot be stopped inside the process, so the process is ended.
            self.close()
            return {"error": f"{call.name} {error}"}
        except (EOFError, OSError):
            code = self._host.code() if self._host else None
            self.close()
            return {"error": f"{call.name} ended its own process (exit code {code})"}
        except UserError as error:
            return {"error": str(error)}

        if "result" in reply:
            return reply["result"]
        return {"error": reply["error"]}

    def _start(self) -> tuple[Tool, ...]:
        """Starts the process and returns the tools of the file; without a process after an error.

        Raises:
            UserError: the file cannot be loaded, at all or within LOADING_S seconds, or a function cannot be a tool.
        """
        # Loading runs the user's code for the first time: it may hang, raise, or end its process.
        self._host = JsonProcess("dist_lm.tools.use.host", str(self._file), str(self._limits.characters))
        try:
            reply = self._host.receive(LOADING_S)
        except TimeoutError:
            self.close()
            raise UserError(f"--tools={self._file}: reading it takes longer than {LOADING_S:.0f} s") from None
        except (EOFError, OSError):
            code = self._host.code()
            self.close()
            raise UserError(f"--tools={self._file}: it ends the process that reads it (exit code {code})") from None

        if "refused" in reply:
            self.close()
            raise UserError(f"--tools={self._file}: {' '.join(reply['refused'].split())}")

        return tuple(Tool(*tool) for tool in reply["tools"])
