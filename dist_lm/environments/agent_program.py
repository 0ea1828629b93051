"""A program of a user as an environment: it speaks to the endpoint as to OpenAI's, and posts a reward at the end.

    program                         endpoint                 conversation
    POST /v1/chat/completions  ->   observation          ->  the model's turn is drawn
    answer                     <-   action               <-
    POST /v1/chat/completions  ->   what is new in it    ->  ...    (all of it, if it has rewritten its history)
    POST /v1/reward            ->   verdict

The control is inverted: `reset` starts the program and waits for its first request, `step` answers that and waits for
the next one. Each conversation is a process of its own, ended with all that it has started.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

from dist_lm.environments.agent_endpoint import Endpoint, Exchange
from dist_lm.environments.program_command import files_of, program_of
from dist_lm.environments.protocol import (
    Action,
    EnvironmentDiedError,
    EnvironmentFailedError,
    Limits,
    Observation,
    Step,
    Task,
    Verdict,
)
from dist_lm.environments.source import Environments
from dist_lm.environments.user_process import MARK
from dist_lm.errors import UserError
from dist_lm.storage import process as processes

START = Path(__file__).with_name("agent_start.py")
STARTS_A_CORE = 2  # programs that start at once
CLOSING_S = 5.0  # for a program to end after its reward
TAIL_S = 1.0  # for the last output of a program that has ended
TAIL_BYTES = 2000
_PER_BYTE = 8  # most bytes of a body for each byte of an observation: its JSON is escaped
_ANY_BODY = 1 << 16  # bytes of a body beside the observations


class ProgramEnvironment:
    """One conversation of a program; an `Environment`.

    Args:
        starts: a place among the programs that start, which is given back with the first request.
    """

    def __init__(self, argv: list[str], limits: Limits, endpoint: Endpoint, starts: asyncio.Semaphore) -> None:
        self._argv, self._limits, self._endpoint = argv, limits, endpoint
        self._starts: asyncio.Semaphore | None = starts
        self._exchange = Exchange(endpoint.note_rewriting)
        self._mark = uuid.uuid4().hex
        self._process: asyncio.subprocess.Process | None = None
        self._exit: asyncio.Task[int] | None = None
        self._reading: asyncio.Task[None] | None = None
        self._pipes: tuple[asyncio.WriteTransport, asyncio.ReadTransport] | tuple[()] = ()
        self._tail = b""  # the last output

    async def reset(self, task: Task) -> Observation:
        """Starts the program and returns the turns of its first request."""
        self._endpoint.add(self._exchange)
        await self._start(task)
        arrival = await self._next()
        self._has_started()
        assert isinstance(arrival, Observation), "no verdict is taken before an answer"
        return arrival

    async def step(self, action: Action) -> Step:
        """Answers the program's request and returns what it does next."""
        self._exchange.answer(action)
        arrival = await self._next()
        turn_reward = self._exchange.turn_reward
        if isinstance(arrival, Verdict):
            return Step(Observation(), done=True, verdict=arrival, turn_reward=turn_reward)
        return Step(arrival, done=False, turn_reward=turn_reward)

    async def close(self) -> None:
        """Ends the program, with all that it has started. A program that has posted its reward first has CLOSING_S
        seconds to end by itself."""
        self._has_started()
        self._endpoint.remove(self._exchange)
        self._exchange.close()
        process, self._process = self._process, None
        if process is None or self._exit is None:
            self._close_pipes()
            return
        if self._exchange.is_over:
            await asyncio.wait({self._exit}, timeout=CLOSING_S)

        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await self._exit
        # A process may have left the group; it keeps the mark.
        await asyncio.to_thread(processes.end, lambda: processes.marked(self._mark, MARK), grace_s=0.0)
        self._close_pipes()

    def _has_started(self) -> None:
        starts, self._starts = self._starts, None
        if starts is not None:
            starts.release()

    def _close_pipes(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        # A task that nobody has read ends with its reader, which is dead.
        for pipe in self._pipes:
            if not pipe.is_closing():
                pipe.close()

    async def _start(self, task: Task) -> None:
        # A proxy of the network does not reach this machine's loopback.
        no_proxy = ",".join(filter(None, (os.environ.get("NO_PROXY", ""), "127.0.0.1")))
        environment = os.environ | {
            MARK: self._mark,
            "OPENAI_BASE_URL": f"{self._endpoint.url}/v1",
            "OPENAI_API_KEY": self._exchange.key,
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
        }
        # Pipes of our own: asyncio would not see the end of a program whose children hold its pipes.
        loop = asyncio.get_running_loop()
        stdin, task_end = os.pipe()
        output_end, output = os.pipe()
        output_reader = asyncio.StreamReader()
        try:
            writing, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, os.fdopen(task_end, "wb"))
            reading, _ = await loop.connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(output_reader), os.fdopen(output_end, "rb")
            )
            self._pipes = (writing, reading)
            limits = (str(self._limits.memory_bytes), str(os.getpid()))
            self._process = process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(START), *limits, *self._argv),
                stdin=stdin,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
        finally:
            os.close(stdin)
            os.close(output)
        self._exit = asyncio.ensure_future(process.wait())
        self._reading = asyncio.ensure_future(self._read(output_reader))

        # The key of the reward is in no variable, which code that the program runs would inherit.
        reward = {"reward_url": f"{self._endpoint.url}/v1/reward", "reward_key": self._exchange.reward_key}
        line = json.dumps({"key": task.key, "digest": task.digest, "data": task.data, **reward})
        writing.write(line.encode() + b"\n")
        writing.close()  # once all is written

    async def _read(self, output: asyncio.StreamReader) -> None:
        """Reads the program's output, so that it does not wait, and keeps its end."""
        while piece := await output.read(1 << 16):
            self._tail = (self._tail + piece)[-TAIL_BYTES:]

    async def _next(self) -> Observation | Verdict:
        """Returns what the program does next.

        Raises:
            EnvironmentDiedError: it was killed by a signal.
            EnvironmentFailedError: it failed, or ended without a reward.
        """
        assert self._exit is not None, "reset comes first"
        arrival = asyncio.ensure_future(self._exchange.next())
        try:
            await asyncio.wait({arrival, self._exit}, return_when=asyncio.FIRST_COMPLETED)
            # A program may post its reward and end.
            if arrival.done() or self._exchange.has_arrival:
                return await arrival
        finally:
            arrival.cancel()
        raise await self._ended(self._exit.result())

    async def _ended(self, code: int) -> EnvironmentFailedError:
        """Returns the failure of a program that has ended without a reward."""
        if self._reading is not None:
            # What it has started may hold its output open.
            await asyncio.wait({self._reading}, timeout=TAIL_S)
        lines = self._tail.decode(errors="replace").strip().splitlines()
        last_line = lines[-1] if lines else "no output"
        if code < 0:
            return EnvironmentDiedError(f"the program was ended by signal {-code} ({last_line})")
        if code == 0:
            return EnvironmentFailedError("no_verdict", f"the program ended without a reward ({last_line})")
        reason = "memory" if last_line.startswith("MemoryError") else "crashed"
        return EnvironmentFailedError(reason, f"the program ended with code {code} ({last_line})")


class ProgramEnvironments(Environments):
    """The programs of all conversations, and the endpoint that they speak to.

    Args:
        name: program:COMMAND.

    Raises:
        ConfigError: there is no command, or a quote is not closed.
    """

    def __init__(self, name: str, limits: Limits) -> None:
        self._name, self._limits = name, limits
        self._argv = program_of(name)
        self._endpoint: Endpoint | None = None
        # Imports take a second of a core, and all conversations begin together: they would exceed their seconds.
        self._starts = asyncio.Semaphore(STARTS_A_CORE * processes.cores())

    async def open(self) -> None:
        """Opens the endpoint.

        Raises:
            UserError: there is no such program.
        """
        files_of(self._name)
        if shutil.which(self._argv[0]) is None:
            raise UserError(f"environment {self._name}: there is no program {self._argv[0]}")
        # A request has all turns so far.
        turns = self._limits.turns + 1
        self._endpoint = Endpoint(turns * _PER_BYTE * self._limits.observation_bytes + _ANY_BODY)
        await self._endpoint.open()

    async def take(self) -> ProgramEnvironment:
        """Returns an environment once its program may start; this time is not the conversation's."""
        assert self._endpoint is not None, "open comes first"
        await self._starts.acquire()
        return ProgramEnvironment(self._argv, self._limits, self._endpoint, self._starts)

    async def give_back(self, environment: Any, is_usable: bool) -> None:
        await environment.close()

    async def close(self) -> None:
        """Closes the endpoint; the conversations have ended."""
        if self._endpoint is not None:
            await self._endpoint.close()
