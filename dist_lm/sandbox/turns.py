"""Runs a session: turns of code, one after another, that share the files of one /tmp, and in Python all variables.

A session is one run of the server in new namespaces. Its first process reads the code of a turn, starts or goes on with
the program, watches it as it watches a test, and answers. Between turns nothing of the program runs: processes that a
turn has started end with it, and the interpreter is stopped. A turn that passes a limit ends all its processes; the
files stay.

This module runs inside the sandbox. Only the standard library is imported, and little of it. What comes from the
program is hostile: it may say that a turn has ended, and it may write output, no more.
"""

from __future__ import annotations

import _signal  # pyright: ignore[reportMissingImports]
import marshal
import os
import struct

from dist_lm.sandbox import bash, confine, interpreter, languages
from dist_lm.sandbox.frames import read_exactly, socketpair, write_frame
from dist_lm.sandbox.watched import DONE, TIMEOUT, TROUBLE, UsedCpu, Watched, cpu_of_ended, stop_all_but

TYPE_CHECKING = False  # `typing` itself would take a third of a cold start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from dist_lm.sandbox.fenced import Fenced

SESSION = b"s"  # first byte of a request to the server that begins a session
TURN, END = b"t", b"e"  # first byte of what follows in a session
FACTS = struct.Struct("!Bi?dd")  # how the turn ended, exit code, whether variables were lost, CPU and wall seconds


class Turns:
    """The first process of a session.

    Args:
        channel: socket to the harness.
    """

    def __init__(self, channel: int, fenced: Fenced) -> None:
        self.channel = channel
        self.fenced = fenced
        self.request: dict[str, Any] = {}
        self.python: _Interpreter | None = None
        self.remaining_cpu_s = 0.0  # for all turns that follow

    def answer(self) -> None:
        """Reads the request, then answers turns until the harness ends the session; runs in the forked process.

        Raises:
            OSError: the other side has gone, or the kernel refuses a namespace.
        """
        _signal.signal(_signal.SIGINT, _signal.SIG_IGN)  # see `inside._Run.answer`
        self.fenced.begin()
        self.request = marshal.loads(self._frame())
        self.remaining_cpu_s = self.request["session_cpu_s"]
        if self.fenced.namespaces:
            confine.dumpable(False)
            confine.mount_tmp(self.request["limits"]["tmp_bytes"])
        else:
            confine.adopt_orphans()

        while os.read(self.channel, 1) == TURN:
            facts, output = self._turn(self._frame())
            write_frame(self.channel, FACTS.pack(*facts) + output)

    def _frame(self) -> bytes:
        return read_exactly(self.channel, int.from_bytes(read_exactly(self.channel, 4), "big"))

    def _turn(self, code: bytes) -> tuple[tuple, bytes]:
        """Runs the code of a turn and returns its facts and its output. The rest of the session's CPU seconds shrinks.

        Raises:
            OSError: the kernel refuses a process or a file.
        """
        if self.remaining_cpu_s <= 0:
            return (TIMEOUT, 0, False, 0.0, 0.0), b""

        cpu_s = min(self.remaining_cpu_s, self.request["limits"]["cpu_s"])
        if self.request["language"] == "python":
            facts, output = self._python_turn(code, cpu_s)
        else:
            facts, output = self._bash_turn(code, cpu_s)
        self.remaining_cpu_s -= facts[3]
        return facts, output

    def _bash_turn(self, code: bytes, cpu_s: float) -> tuple[tuple, bytes]:
        """Runs a script in a shell of its own, and waits for its end.

        Args:
            cpu_s: CPU seconds that the turn may take.

        Returns:
            As `_facts`: (outcome, exit code, False, CPU seconds, seconds), and the output.
        """
        pipes = [os.pipe() for _ in range(2)]
        child = self._start(lambda: bash.execute(code + b"\n"), [write for _, write in pipes], -1)

        limits = self.request["limits"]
        attempt = Watched(child, [read for read, _ in pipes], limits["output_bytes"], cpu_s, limits["wall_s"])
        try:
            attempt.watch(self.fenced.namespaces)
        finally:
            attempt.end(self.fenced.namespaces)
        return _facts(attempt, attempt.cpu_seconds, False)

    def _python_turn(self, code: bytes, cpu_s: float) -> tuple[tuple, bytes]:
        """Gives the code to the interpreter, which is started if there is none; ends it unless it came to the end."""
        if self.python is None:
            self.python = self._interpreter()
        python = self.python
        # The limit of `Watched` counts what the interpreter has used in earlier turns, too.
        used_before = python.used.seconds
        limits = self.request["limits"]
        attempt = Watched(
            python.child,
            python.pipes,
            limits["output_bytes"],
            used_before + cpu_s,
            limits["wall_s"],
            done=(python.channel, python.has_answered),
            used=python.used,
        )

        ends = True
        try:
            if python.resume(code):
                attempt.watch(self.fenced.namespaces)
                ends = attempt.ended != DONE or not python.pause(self.fenced.namespaces)
        finally:
            if ends:
                self.python = None
                attempt.end(self.fenced.namespaces)
                os.close(python.channel)
            else:
                attempt.leave(python.status or 0)

        # The program's processes have ended or are stopped, so the figure is final.
        python.used.look()
        return _facts(attempt, python.used.seconds - used_before, ends)

    def _interpreter(self) -> _Interpreter:
        pipes = [os.pipe() for _ in range(2)]
        channel, end = socketpair()
        used = UsedCpu(cpu_of_ended())
        child = self._start(interpreter.serve, [write for _, write in pipes], end)
        os.set_blocking(channel, False)
        return _Interpreter(child, channel, [read for read, _ in pipes], used)

    def _start(self, run: Callable[[], NoReturn], files: list[int], channel: int) -> int:
        """Starts a confined process that calls `run`, and returns its process id. Its output and errors share a pipe.

        Args:
            files: write ends for output and for trouble before the start; closed here, as `channel`.
        """
        output, trouble = files
        # The process limits itself, for all of its turns.
        limits = self.request["limits"] | {"cpu_s": self.remaining_cpu_s}
        child = os.fork()
        if child == 0:
            os.close(self.channel)
            of_program = (0, output, output, channel, trouble)
            languages.be_program(self.fenced, self.request["folder"], limits, of_program, run)
        for file in {output, trouble, channel} - {-1}:
            os.close(file)
        return child


class _Interpreter:
    """A process of `interpreter.serve`, stopped between turns.

    Args:
        channel: socket to it; does not block.
        pipes: read ends of its output, and of trouble before its start.
        used: its CPU time.
    """

    def __init__(self, child: int, channel: int, pipes: list[int], used: UsedCpu) -> None:
        self.child = child
        self.channel = channel
        self.pipes = pipes
        self.used = used
        self.number = 0  # the turn's
        self.status: int | None = None  # exit status of the turn; None: it has not come to its end
        self.received = b""

    def resume(self, code: bytes) -> bool:
        """Gives it the code of a turn; returns False if it takes none."""
        self.number += 1
        self.status = None
        try:
            # The channel does not block: an interpreter that reads nothing takes a part of the frame at most.
            frame = len(code).to_bytes(4, "big") + code
            is_sent = os.write(self.channel, frame) == len(frame)
        except OSError:
            return False
        os.kill(self.child, _signal.SIGCONT)
        return is_sent

    def has_answered(self) -> bool:
        """Reads what it has sent, without waiting; returns whether the turn has come to its end, or the channel is
        closed.

        At the end of the turn `status` is set. What the code of an earlier turn has written ends no other one.
        """
        try:
            data = os.read(self.channel, 4096)
        except BlockingIOError:
            return False
        except OSError:
            return True
        self.received += data
        size = interpreter.ANSWER.size
        while len(self.received) >= size:
            number, status = interpreter.ANSWER.unpack(self.received[:size])
            self.received = self.received[size:]
            if number == self.number:
                self.status = status
        return not data or self.status is not None

    def pause(self, namespaces: bool) -> bool:
        """Stops it behind a turn that has come to its end, and ends all other processes of the session. Returns False
        if it has ended, or not all processes could be ended."""
        return self.status is not None and stop_all_but(self.child, namespaces)


def _facts(attempt: Watched, cpu_s: float, is_lost: bool) -> tuple[tuple, bytes]:
    """Returns what the answer says of a turn; trouble before the start is the outcome TROUBLE, with its reason as the
    output."""
    output, trouble = attempt.read
    ended = TROUBLE if trouble else attempt.ended
    facts = (ended, attempt.exit_code, is_lost, cpu_s, attempt.seconds)
    return facts, bytes(trouble or output[: attempt.output_bytes])
