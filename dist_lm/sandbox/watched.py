"""One test of a program from its start to its end: what it wrote, what it and its processes used, how it ended.

Runs inside the sandbox, in the first process of a run. Only the standard library is imported, and little of it.
"""

from __future__ import annotations

import os
import resource
import select
import time

TYPE_CHECKING = False  # `typing` itself would take a third of a cold start
if TYPE_CHECKING:
    from collections.abc import Iterator

DONE, TIMEOUT, OUTPUT, TROUBLE, STARVED = range(5)  # how an attempt ended
SIGKILL = 9  # the module `signal` takes long to import
_CHUNK = 65_536
_SHORTEST_WAIT_S = 0.005


class Watched:
    """A program from its start to its end, with what it wrote and used."""

    def __init__(
        self, child: int, pipes: list[int], output_bytes: int, cpu_s: float, wall_s: float, cpu_before: float
    ) -> None:
        self.child = child
        self.pipes = pipes  # of stdout, stderr, and trouble before the start
        self.output_bytes = output_bytes
        self.cpu_s = cpu_s
        self.wall_s = wall_s
        self.cpu_before = cpu_before
        self.read = [bytearray() for _ in pipes]
        self.ended = DONE
        self.exit_code = 0
        self.seconds = 0.0
        self._watched = os.pidfd_open(child)
        self._reaped = False

    def watch(self) -> None:
        """Read what it writes until it ends or passes a limit."""
        poller = select.poll()
        for file in (*self.pipes, self._watched):
            poller.register(file, select.POLLIN)
        begin, wait = time.monotonic(), min(self.cpu_s / _CORES, self.wall_s)
        while True:
            ready = poller.poll(max(wait, _SHORTEST_WAIT_S) * 1000)
            for file, _ in ready:
                if file in self.pipes and not self._take(file):
                    poller.unregister(file)
            self.seconds = time.monotonic() - begin
            if len(self.read[0]) + len(self.read[1]) > self.output_bytes:
                self.ended = OUTPUT
                return
            if any(file == self._watched for file, _ in ready):
                return
            wait = min(self.wall_s - self.seconds, self._cpu_left() / _CORES)
            if wait <= 0:
                starved = self.seconds >= self.wall_s and _waited_for_a_core() > self.wall_s / 2
                self.ended = STARVED if starved else TIMEOUT
                return
            self._reap()

    def _take(self, file: int) -> bool:
        """Read once from a pipe; False at its end."""
        data = os.read(file, _CHUNK)
        self.read[self.pipes.index(file)] += data
        return bool(data)

    def _cpu_left(self) -> float:
        running = sum(_cpu_of(line) for line in _processes_below())
        return self.cpu_s - running - (cpu_of_ended() - self.cpu_before)

    def _reap(self) -> None:
        """Take the exit codes of processes that ended, orphans included."""
        while True:
            try:
                process, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if process == 0:
                return
            self._note(process, status)

    def _note(self, process: int, status: int) -> None:
        if process == self.child:
            self.exit_code, self._reaped = os.waitstatus_to_exitcode(status), True

    def end(self, namespaces: bool) -> None:
        """End every process of the attempt, then read what is left in the pipes."""
        if self.ended == DONE:
            self._reap()
        while True:
            _kill_all(namespaces)
            try:
                self._note(*os.waitpid(-1, 0))
            except ChildProcessError:
                break
        for file in self.pipes:
            os.set_blocking(file, False)
            while len(self.read[self.pipes.index(file)]) <= self.output_bytes and self._left(file):
                pass
            os.close(file)
        os.close(self._watched)

    def _left(self, file: int) -> bool:
        try:
            return self._take(file)
        except BlockingIOError:
            return False


_CORES = len(os.sched_getaffinity(0))
_TICKS = os.sysconf("SC_CLK_TCK")


def _processes_below() -> Iterator[list[str]]:
    """The fields of /proc/PID/stat from the state on, of every process below this one."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    found[int(name)] = [name, *file.read().rpartition(")")[2].split()]
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended meanwhile
    for fields in found.values():
        parent = int(fields[2])
        while parent in found and parent != os.getpid():
            parent = int(found[parent][2])
        if parent == os.getpid():
            yield fields


def _cpu_of(fields: list[str]) -> float:
    """Seconds of a process and its reaped children."""
    return sum(int(ticks) for ticks in fields[12:16]) / _TICKS


def cpu_of_ended() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _waited_for_a_core() -> float:
    """Seconds that a running process was ready to run but had no core: the longest of all."""
    seconds = 0.0
    for fields in _processes_below():
        try:
            with open(f"/proc/{fields[0]}/schedstat") as file:
                seconds = max(seconds, int(file.read().split()[1]) / 1e9)
        except (OSError, IndexError):
            continue  # ended meanwhile, or a kernel without these figures
    return seconds


def _kill_all(namespaces: bool) -> None:
    if namespaces:
        try:
            os.kill(-1, SIGKILL)
        except ProcessLookupError:
            return
    else:
        for fields in _processes_below():
            try:
                os.kill(int(fields[0]), SIGKILL)
            except ProcessLookupError:
                continue
