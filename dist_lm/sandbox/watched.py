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
    Ticks = tuple[int, int]

DONE, TIMEOUT, OUTPUT, TROUBLE, STARVED = range(5)  # how an attempt ended
SIGKILL = 9  # the module `signal` takes long to import
_CHUNK = 65_536
_SHORTEST_WAIT_S = 0.005
_LOOKS = 0.1  # most of the time spent with looking at processes


class Watched:
    """A program from its start to its end, with what it wrote and used."""

    def __init__(self, child: int, pipes: list[int], output_bytes: int, cpu_s: float, wall_s: float) -> None:
        self.child = child
        self.pipes = pipes  # of stdout, stderr, and trouble before the start
        self.output_bytes = output_bytes
        self.cpu_s = cpu_s
        self.wall_s = wall_s
        self.read = [bytearray() for _ in pipes]
        self.ended = DONE
        self.exit_code = 0
        self.seconds = 0.0
        self._watched = os.pidfd_open(child)
        self._used = UsedCpu(cpu_of_ended())

    @property
    def cpu_seconds(self) -> float:
        """Of the program and all processes below it, once they have ended."""
        return max(self._used.seconds, self._used.of_ended())

    def watch(self) -> None:
        """Read what it writes until it ends or passes a limit."""
        poller = select.poll()
        for file in (*self.pipes, self._watched):
            poller.register(file, select.POLLIN)
        begin, look_s, wait = time.monotonic(), 0.0, min(self.cpu_s / _CORES, self.wall_s)
        while True:
            pause = min(wait, max(1 / _TICKS, look_s / _LOOKS))
            ready = poller.poll(max(pause, _SHORTEST_WAIT_S) * 1000)
            for file, _ in ready:
                if file in self.pipes and not self._take(file):
                    poller.unregister(file)
            self.seconds = time.monotonic() - begin
            if len(self.read[0]) + len(self.read[1]) > self.output_bytes:
                self.ended = OUTPUT
                return
            if any(file == self._watched for file, _ in ready):
                return
            self._used.look()
            look_s = time.monotonic() - begin - self.seconds
            wait = min(self.wall_s - self.seconds, (self.cpu_s - self._used.seconds) / _CORES)
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
            self.exit_code = os.waitstatus_to_exitcode(status)

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


class UsedCpu:
    """CPU seconds of the processes below this one, those that ended included.

    The kernel adds the time of a process that ended to that of the one that waited for it. Nobody gets the time of a
    child whose parent ignores SIGCHLD: from one look to the next such a child has gone, and nobody's time of ended
    children has grown. It counts as far as the last look saw it.
    """

    def __init__(self, before: float) -> None:
        self.seconds = 0.0
        self._before = before
        self._unclaimed = 0.0  # of ended processes, nobody's
        self._seen: dict[tuple[str, str], Ticks] = {}  # (pid, start) -> own, of its ended children
        self._ended = before

    def look(self) -> None:
        """Look at all processes that are there."""
        processes, whole = _processes_below()
        ended = cpu_of_ended()
        now = {(fields[0], fields[20]): _ticks_of(fields) for fields in processes}
        if whole:
            gone = sum(sum(ticks) for process, ticks in self._seen.items() if process not in now) / _TICKS
            grown = sum(ticks[1] - self._seen.get(process, (0, 0))[1] for process, ticks in now.items()) / _TICKS
            self._unclaimed += max(0.0, gone - grown - (ended - self._ended))
            self._seen, self._ended = now, ended
        else:  # who waited for those that went meanwhile is seen at the next look
            self._seen = now | self._seen
        self.seconds = sum(sum(ticks) for ticks in now.values()) / _TICKS + self.of_ended()

    def of_ended(self) -> float:
        """CPU seconds of those that ended."""
        return cpu_of_ended() - self._before + self._unclaimed


def _processes_below() -> tuple[list[list[str]], bool]:
    """The pid and the fields of /proc/PID/stat from the state on, of every process below this one; whether none ended
    meanwhile."""
    found, whole = {}, True
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                found[int(name)] = [name, *_stat(name)]
            except (FileNotFoundError, ProcessLookupError):
                whole = False
    below = []
    for fields in found.values():
        parent = int(fields[2])
        while parent in found and parent != os.getpid():
            parent = int(found[parent][2])
        if parent == os.getpid():
            below.append(fields)
    return below, whole


def _stat(pid: str) -> list[str]:
    """The fields after the name, which a process chooses itself: any bytes, blanks and parentheses among them."""
    file = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    try:
        return os.read(file, 4096).rpartition(b")")[2].decode().split()
    finally:
        os.close(file)


def _ticks_of(fields: list[str]) -> Ticks:
    """Those of a process, and of its children that ended."""
    return int(fields[12]) + int(fields[13]), int(fields[14]) + int(fields[15])


def cpu_of_ended() -> float:
    """Seconds of ended processes below this one that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _waited_for_a_core() -> float:
    """Seconds that a running process was ready to run but had no core: the longest of all."""
    seconds = 0.0
    for fields in _processes_below()[0]:
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
        for fields in _processes_below()[0]:
            try:
                os.kill(int(fields[0]), SIGKILL)
            except ProcessLookupError:
                continue
