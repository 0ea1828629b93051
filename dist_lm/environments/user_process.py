"""A user's environment in a process of its own, with limits: nothing that it does harms the caller or its neighbours.

Messages are lines of JSON over a socket; nothing is unpickled. A process executes one conversation at a time and is
used again after one that ended in order; else it is ended with everything that it has started.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import uuid
from pathlib import Path
from typing import Any

from dist_lm.chat import json_text
from dist_lm.chat.messages import ChatError, Json
from dist_lm.environments.protocol import (
    Action,
    EnvironmentDiedError,
    EnvironmentFailedError,
    Limits,
    Observation,
    Step,
    Task,
)
from dist_lm.environments.source import Environments
from dist_lm.environments.values import action_value, failure_of, observation_of, step_of, task_value
from dist_lm.errors import UserError
from dist_lm.storage import process as processes
from dist_lm.storage.json_process import start_json_process

MODULE = "dist_lm.environments.served"
MARK = "DIST_LM_ENVIRONMENT"  # variable of a process and all that it starts
LOADING_S = 120.0  # limit for importing the user's file
CLOSING_S = 5.0
_PER_BYTE = 8  # most bytes of a line for each byte of an observation: its JSON is escaped
_ANY_LINE = 1 << 16  # bytes of a line beside the observation


class EnvironmentProcess:
    """One process of the user's class; an `Environment`. Of its methods only `start` raises other errors than
    EnvironmentFailedError."""

    def __init__(self, name: str, limits: Limits) -> None:
        self._name, self._limits = name, limits
        self._mark = uuid.uuid4().hex
        self._number = 0  # the last request
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._received = bytearray()

    async def start(self) -> None:
        """Starts the process and waits until it has imported the class.

        Raises:
            UserError: there is no such class, or its file cannot be imported within `LOADING_S`; the process is ended.
            EnvironmentDiedError: the process ends before it has imported the class.
            OSError: no process can be started.
        """
        arguments = (self._name, str(self._limits.memory_bytes), str(self._limits.observation_bytes))
        # A process that leaves the group of this one still has the mark, by which `end` finds it.
        environment = {**os.environ, MARK: self._mark}
        self._process, self._connection = start_json_process(MODULE, *arguments, environment=environment)
        # The event loop takes sockets that do not block.
        self._connection.setblocking(False)

        # The first message says whether the class was imported.
        try:
            answer = await asyncio.wait_for(self._receive(), LOADING_S)
        except TimeoutError:
            await self.end()
            raise UserError(f"environment {self._name}: reading it takes longer than {LOADING_S:.0f} s") from None
        except EnvironmentDiedError:
            raise
        except EnvironmentFailedError as failure:
            raise _unstarted(self._name, failure) from None

        if answer.get("loaded") != self._name:
            await self.end()
            reason = " ".join(str(answer.get("refused", answer)).split())
            raise UserError(f"environment {self._name}: {reason}")

    @property
    def is_alive(self) -> bool:
        """Whether the process can begin a conversation: it lives, and has sent nothing that nobody asked for."""
        if self._process is None or self._connection is None or self._process.poll() is not None:
            return False
        # select.select would refuse descriptors above 1,023, which a rank of a large job has.
        try:
            self._connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return not self._received
        except ConnectionError:
            return False
        return False

    async def reset(self, task: Task) -> Observation:
        return observation_of(await self._ask("observation", task=task_value(task)))

    async def step(self, action: Action) -> Step:
        return step_of(await self._ask("step", action=action_value(action)))

    async def close(self) -> None:
        """Closes the environment of the conversation; the process lives on. A failure ends the process."""
        try:
            await asyncio.wait_for(self._ask("closed"), CLOSING_S)
        except (EnvironmentFailedError, TimeoutError):
            await self.end()

    async def _ask(self, kind: str, **content: Json) -> Any:
        """Sends a request and returns the part `kind` of its answer. The process is ended if it answers wrongly.

        Raises:
            EnvironmentDiedError: its process ended.
            EnvironmentFailedError: the environment failed, or its process sent something else.
        """
        if self._connection is None:
            raise EnvironmentFailedError("crashed", "the process has ended")
        # The number tells an answer from a late one to an earlier request.
        self._number += 1
        line = json.dumps({"number": self._number, **content}).encode() + b"\n"
        try:
            await asyncio.get_running_loop().sock_sendall(self._connection, line)
        except OSError:
            raise await self._ended() from None

        answer = await self._receive()
        if answer.get("number") == self._number and "failure" in answer:
            raise failure_of(answer["failure"])
        if answer.get("number") != self._number or kind not in answer:
            await self.end()
            raise EnvironmentFailedError("bad_message", f"no answer to the request: {json.dumps(answer)[:100]}")
        return answer[kind]

    async def _receive(self) -> dict[str, Json]:
        """Returns the next message.

        Raises:
            EnvironmentDiedError: the process ended.
            EnvironmentFailedError: it sent something else, and is ended.
        """
        assert self._connection is not None, "start comes first"
        # A line without an end must not fill the memory of this process.
        most_bytes = _PER_BYTE * self._limits.observation_bytes + _ANY_LINE
        while b"\n" not in self._received:
            if len(self._received) > most_bytes:
                await self.end()
                raise EnvironmentFailedError("too_long", f"a message of more than {most_bytes:,} bytes")
            try:
                piece = await asyncio.get_running_loop().sock_recv(self._connection, 1 << 16)
            except OSError:
                piece = b""
            if not piece:
                raise await self._ended()
            self._received += piece

        line, _, self._received = self._received.partition(b"\n")
        try:
            message = json_text.read(line.decode(), "message")
        except (ChatError, UnicodeDecodeError) as error:
            await self.end()
            raise EnvironmentFailedError("bad_message", str(error)) from None
        if not isinstance(message, dict):
            await self.end()
            raise EnvironmentFailedError("bad_message", f"a {type(message).__name__}")
        return message

    async def _ended(self) -> EnvironmentDiedError:
        """Returns the failure of a process that has closed its socket, and ends what is left of it."""
        # The socket closes a moment before the process has ended.
        code: int | None = None
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = await asyncio.to_thread(self._process.wait, 1.0)
        await self.end()
        return EnvironmentDiedError(f"its process ended (exit code {code})")

    async def end(self) -> None:
        """Kills the process and all that it has started; may be called twice."""
        process, self._process = self._process, None
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await asyncio.to_thread(process.wait)
        # A process may have left the group; it keeps the mark.
        await asyncio.to_thread(processes.end, lambda: processes.marked(self._mark, MARK), grace_s=0.0)


class UserEnvironments(Environments):
    """The processes of a user's class, as many as there are conversations at once.

    Args:
        name: FILE:CLASS or PACKAGE.MODULE:CLASS.
    """

    def __init__(self, name: str, limits: Limits) -> None:
        self._name, self._limits = name, limits
        self._idle: list[EnvironmentProcess] = []
        self._all: set[EnvironmentProcess] = set()

    async def open(self) -> None:
        """Starts one process, so that a mistake of the user shows before anything else.

        Raises:
            UserError: there is no such class, or it cannot be imported.
        """
        place = self._name.rpartition(":")[0]
        if place.endswith(".py") and not Path(place).is_file():
            raise UserError(f"environment {self._name}: there is no file {place}")
        try:
            self._idle.append(await self._started())
        except EnvironmentDiedError as death:
            raise _unstarted(self._name, death) from None

    async def take(self) -> EnvironmentProcess:
        """Returns a process for a conversation.

        Raises:
            EnvironmentDiedError: a new process ends at its start.
            EnvironmentFailedError: a new process does not start for another reason.
        """
        while self._idle:
            # A process may have ended, or have sent something, since it was given back.
            process = self._idle.pop()
            if process.is_alive:
                return process
            await self._end(process)
        try:
            return await self._started()
        except UserError as error:
            raise EnvironmentFailedError("crashed", str(error)) from None

    async def give_back(self, environment: Any, is_usable: bool) -> None:
        """Takes back the process of a conversation that has ended; one that is not usable is ended."""
        if is_usable:
            await environment.close()
        # `close` has ended a process that failed to close its environment.
        if is_usable and environment.is_alive:
            self._idle.append(environment)
        else:
            await self._end(environment)

    async def close(self) -> None:
        """Ends all processes."""
        await asyncio.gather(*(process.end() for process in self._all))
        self._all, self._idle = set(), []

    async def _started(self) -> EnvironmentProcess:
        """Returns a new process that has started, which is among `_all`.

        Raises:
            UserError, EnvironmentDiedError: as `EnvironmentProcess.start`; the process is not among `_all` then.
        """
        process = EnvironmentProcess(self._name, self._limits)
        self._all.add(process)
        try:
            await process.start()
        except (UserError, EnvironmentDiedError):
            self._all.discard(process)  # it has ended
            raise
        return process

    async def _end(self, process: EnvironmentProcess) -> None:
        self._all.discard(process)
        await process.end()


def _unstarted(name: str, failure: EnvironmentFailedError) -> UserError:
    return UserError(f"environment {name}: its process does not start ({failure.detail})")
