"""Watches one test of a program from its start to its end: its output, the CPU time of its processes, how it ended.

This module runs inside the sandbox, in the first process of a run. Only the standard library is imported, and little of
it.
"""

from __future__ import annotations

import os
import resource
import select
import time

TYPE_CHECKING = False  # `typing` itself would take a third of a cold start
if TYPE_CHECKING:
    from collections.abc import Callable

    from dist_lm.sandbox.judging import Judging

    Ticks = tuple[int, int]

DONE, TIMEOUT, OUTPUT, TROUBLE, STARVED = range(5)  # how an attempt ended
SIGKILL, SIGSTOP = 9, 19  # the module `signal` takes long to import
_MOST_KILLS = 1000  # looks at the processes that a turn has left
_CHUNK = 65_536
_SHORTEST_WAIT_S = 0.005
_LOOKS = 0.1  # largest share of the time that is spent looking at processes


class Watched:
    """A running program with its output so far and the CPU time that it used; with its judge, if it has one.

    Args:
        pipes: read ends for stdout, stderr, and trouble before the start; with a judge then for its stdout, its stderr
            and its verdict, whose end is the end of the judge's work.
        judge: what the kernel tells of the judge; None: there is none.
        done: socket on which the program says that it has come to the end, though it lives on, and the function that
            reads it and returns whether it has; None: its end is the end of the process.
        used: CPU time of the program, also before; `cpu_s` counts that, too. None: it has just started.
    """

    def __init__(
        self,
        child: int,
        pipes: list[int],
        output_bytes: int,
        cpu_s: float,
        wall_s: float,
        judge: Judging | None = None,
        done: tuple[int, Callable[[], bool]] | None = None,
        used: UsedCpu | None = None,
    ) -> None:
        self.child = child
        self.pipes = pipes
        self.judge = judge
        self.output_bytes = output_bytes
        self.cpu_s = cpu_s
        self.wall_s = wall_s

        self.read = [bytearray() for _ in pipes]
        # A program can empty its own pipe between our `poll` and our `read`, which must not wait then.
        for file in pipes:
            os.set_blocking(file, False)

        self.ended = DONE
        self.exit_code = 0
        self.seconds = 0.0
        self._pidfd = os.pidfd_open(child)
        self._done = done
        self._used = used or UsedCpu(cpu_of_ended())
        self._judge_before = judge.last_cpu_seconds if judge else 0.0

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of the program and all processes below it, once they have ended, and of the judge."""
        return max(self._used.seconds, self._used.of_ended()) + self._judge_seconds()

    def _judge_seconds(self) -> float:
        return self.judge.cpu_seconds() - self._judge_before if self.judge else 0.0

    def watch(self, namespaces: bool = False) -> None:
        """Reads the output until program and judge have ended or pass a limit; then `ended` and `seconds` are set.

        It does not end the program; only processes that a program left behind are killed while the judge still works.

        Args:
            namespaces: whether the run has a pid namespace of its own.
        """
        poller = select.poll()
        running = {self._pidfd, *self.pipes[5:]}
        for file in (*self.pipes, self._pidfd):
            poller.register(file, select.POLLIN)
        if self._done:
            poller.register(self._done[0], select.POLLIN)

        begin = time.monotonic()
        look_s = next_look = 0.0
        wait = min((self.cpu_s - self._used.seconds) / _CORES, self.wall_s)  # no limit can be passed before
        while True:
            # CPU time is counted in ticks, and looking at processes takes CPU time from the program.
            if self.seconds >= next_look:
                pause = min(wait, max(1 / _TICKS, look_s / _LOOKS))
                next_look = self.seconds + max(pause, _SHORTEST_WAIT_S)
            ready = poller.poll((next_look - self.seconds) * 1000)
            for file, _ in ready:
                if file in self.pipes and self._read_once(file) == b"":
                    poller.unregister(file)
                    running.discard(file)
            self.seconds = time.monotonic() - begin

            # An output that is too long decides, also of a program that has just ended.
            if sum(map(len, self.read)) > self.output_bytes:
                self.ended = OUTPUT
                return
            if any(file == self._pidfd for file, _ in ready):
                poller.unregister(self._pidfd)
                running.remove(self._pidfd)
                if running:  # the judge must not wait for what the program left behind
                    kill_all(namespaces)
            if not running or (self._done and any(file == self._done[0] for file, _ in ready) and self._done[1]()):
                return

            if self.seconds < next_look:
                continue
            self._used.look()
            look_s = time.monotonic() - begin - self.seconds
            wait = min(self.wall_s - self.seconds, (self.cpu_s - self._used.seconds - self._judge_seconds()) / _CORES)
            if wait <= 0:
                is_starved = self.seconds >= self.wall_s and self._waited_for_a_core() > self.wall_s / 2
                self.ended = STARVED if is_starved else TIMEOUT
                return
            self._reap()

    def _waited_for_a_core(self) -> float:
        """Returns the longest time that a process of the program, or the judge, was ready to run but had no core."""
        of_judge = self.judge.waited_seconds() if self.judge else 0.0
        return max(_waited_for_a_core(), of_judge)

    def _read_once(self, file: int) -> bytes | None:
        """Reads once from a pipe, adds the bytes to `read` and returns them; empty at its end, None if none are there
        now."""
        try:
            data = os.read(file, _CHUNK)
        except BlockingIOError:
            return None
        self.read[self.pipes.index(file)] += data
        return data

    def _reap(self) -> None:
        """Collects the exit codes of processes that have ended, orphans included; does not wait."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._note(pid, status)

    def _note(self, pid: int, status: int) -> None:
        if pid == self.child:
            self.exit_code = os.waitstatus_to_exitcode(status)

    def leave(self, status: int) -> None:
        """Reads the rest of the output of a program that has come to the end of a turn, and lets it live.

        Args:
            status: becomes `exit_code`.
        """
        self._read_rest()
        self.exit_code = status
        os.close(self._pidfd)

    def _read_rest(self) -> None:
        for number, file in enumerate(self.pipes):
            while len(self.read[number]) <= self.output_bytes and self._read_once(file):
                pass

    def end(self, namespaces: bool) -> None:
        """Kills every process of the attempt, waits for them, then reads the rest of the output and closes the pipes.
        Then `exit_code` is set.

        Args:
            namespaces: whether the run has a pid namespace of its own, in which all other processes are killed.
        """
        if self.ended == DONE:
            self._reap()

        # Again and again: a process may fork while others are killed.
        while True:
            kill_all(namespaces)
            try:
                self._note(*os.waitpid(-1, 0))
            except ChildProcessError:
                break

        self._read_rest()
        for file in self.pipes:
            os.close(file)
        os.close(self._pidfd)


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
        self._unclaimed = 0.0  # seconds of ended processes that no process was given
        self._last_ticks: dict[tuple[str, str], Ticks] = {}  # (pid, start) -> own ticks, those of its ended children
        self._last_ended = before

    def look(self) -> None:
        """Updates `seconds`, the CPU seconds of all processes below this one, those that ended included; reads
        /proc."""
        processes, is_complete = _processes_below()
        ended = cpu_of_ended()
        ticks_of = {(fields[0], fields[20]): _ticks_of(fields) for fields in processes}

        if is_complete:
            last = self._last_ticks
            gone = sum(sum(ticks) for process, ticks in last.items() if process not in ticks_of) / _TICKS
            grown = sum(ticks[1] - last.get(process, (0, 0))[1] for process, ticks in ticks_of.items()) / _TICKS
            self._unclaimed += max(0.0, gone - grown - (ended - self._last_ended))
            self._last_ticks = ticks_of
            self._last_ended = ended
        else:
            # A process ended during the look. The next look tells whether another one waited for it.
            self._last_ticks = ticks_of | self._last_ticks
        self.seconds = sum(sum(ticks) for ticks in ticks_of.values()) / _TICKS + self.of_ended()

    def of_ended(self) -> float:
        """Returns the CPU seconds of the processes that ended."""
        return cpu_of_ended() - self._before + self._unclaimed


def _processes_below() -> tuple[list[list[str]], bool]:
    """Returns the processes below this one, and whether no process ended during the look.

    A process is its pid and the fields of /proc/PID/stat from the state on.
    """
    fields_of: dict[int, list[str]] = {}
    is_complete = True
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fields_of[int(name)] = [name, *_stat(name)]
            except (FileNotFoundError, ProcessLookupError):
                is_complete = False

    below = []
    for fields in fields_of.values():
        ancestor = int(fields[2])
        while ancestor in fields_of and ancestor != os.getpid():
            ancestor = int(fields_of[ancestor][2])
        if ancestor == os.getpid():
            below.append(fields)
    return below, is_complete


def _stat(pid: str) -> list[str]:
    """Returns the fields after the name, which a process chooses itself: any bytes, also blanks and parentheses."""
    file = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    try:
        return os.read(file, 4096).rpartition(b")")[2].decode().split()
    finally:
        os.close(file)


def _ticks_of(fields: list[str]) -> Ticks:
    """Returns the CPU ticks of a process, and those of its children that ended."""
    return int(fields[12]) + int(fields[13]), int(fields[14]) + int(fields[15])


def cpu_of_ended() -> float:
    """Returns the CPU seconds of ended processes below this one that were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _waited_for_a_core() -> float:
    """Returns the longest time that a process below this one was ready to run but had no core, in seconds; 0 if
    unknown."""
    seconds = 0.0
    for fields in _processes_below()[0]:
        try:
            with open(f"/proc/{fields[0]}/schedstat") as file:
                seconds = max(seconds, int(file.read().split()[1]) / 1e9)
        except (OSError, IndexError):
            continue  # ended meanwhile, or a kernel without these figures
    return seconds


def kill_all(namespaces: bool) -> None:
    """Kills every other process of the run; without namespaces, every process below this one. Does not wait for their
    end."""
    # In a pid namespace of its own, -1 means every other process of the run.
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


def stop_all_but(child: int, namespaces: bool) -> bool:
    """Stops the process `child` and kills every other one of the run; returns whether no other one is left.

    All are stopped first, so that none can fork while others are killed.
    """
    if namespaces:
        try:
            os.kill(-1, SIGSTOP)
        except ProcessLookupError:
            return False

    # Without namespaces a process may fork between the look and its end, so this goes on until the child is alone.
    for _ in range(_MOST_KILLS):
        pids = [int(fields[0]) for fields in _processes_below()[0] if fields[1] != "Z"]
        for pid in pids:
            try:
                os.kill(pid, SIGSTOP if pid == child else SIGKILL)
            except ProcessLookupError:
                continue
        if child not in pids:
            return False
        if pids == [child]:
            return True
        time.sleep(_SHORTEST_WAIT_S)
        _reap_orphans(child)
    return False


def _reap_orphans(child: int) -> None:
    """Collects the exit codes of processes that have ended, except `child`; does not wait."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        # WNOWAIT leaves the exit code of `child` to whoever watches it.
        if ended is None or ended.si_pid == child:
            return
        os.waitpid(ended.si_pid, 0)
