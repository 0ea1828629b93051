"""The processes that judge, in namespaces of their own: no program can see them.

A server waits there, confined like a program; it reads no test. For each run it forks a judge, which gets the tests
once, in a file that no other process of the sandbox reads. For each test the judge then gets the socket to the program,
its own standard output and error, and a pipe for the verdict, which it closes in the end.

This module runs inside the sandbox. Only the standard library is imported, and little of it.
"""

from __future__ import annotations

import marshal
import os
import struct

from dist_lm.sandbox import confine, judge, languages
from dist_lm.sandbox.fenced import Fenced, leave_after
from dist_lm.sandbox.frames import has_more, read_exactly, receive_files, send_files, socketpair
from dist_lm.sandbox.watched import kill_all

TYPE_CHECKING = False  # `typing` itself would take a third of a cold start
if TYPE_CHECKING:
    from typing import Any, NoReturn

_CONTROL = 4  # descriptor of the socket to the other side, in these processes
_CLOCK = struct.Struct("d")  # CPU seconds of a process until it judges; the clocks themselves are open files
_TMP_BYTES = 32 << 20


class Judges:
    """The server of judges, as the server of the sandbox sees it: a judge for one run at a time.

    Raises:
        OSError: the kernel refuses a namespace.
    """

    def __init__(self, fenced: Fenced) -> None:
        self._channel, other = socketpair()
        self._process = fenced.fork()
        if self._process == 0:
            os.close(self._channel)
            leave_after(_serve, other, fenced)
        os.close(other)

    def begin(self) -> int:
        """Starts a judge and returns the socket to it.

        Raises:
            OSError: the server of judges has ended.
        """
        control, other = socketpair()
        send_files(self._channel, b"+", [other])
        os.close(other)
        return control

    def end(self) -> None:
        """Ends the judge, and all processes that it has started, before another one begins.

        Raises:
            OSError: the server of judges has ended.
        """
        os.write(self._channel, b"-")

    def close(self) -> None:
        """Ends the server of judges."""
        os.close(self._channel)
        os.waitpid(self._process, 0)


def _serve(channel: int, fenced: Fenced) -> None:
    """Forks judges until the other side has gone; runs in the first process of new namespaces.

    Raises:
        OSError: the kernel refuses a fence, or the other side has gone too early.
    """
    fenced.begin()
    os.dup2(channel, _CONTROL)
    if fenced.namespaces:
        confine.mount_tmp(_TMP_BYTES)
    else:
        confine.adopt_orphans()
    fenced.confine("/tmp", badness=500)  # the program goes first if memory is short, but the first processes last
    os.closerange(_CONTROL + 1, 1 << 20)

    while True:
        _, [control] = receive_files(_CONTROL, 1)
        if os.fork() == 0:
            confine.end_with_parent()
            leave_after(judge_run, control, fenced)
        os.close(control)

        read_exactly(_CONTROL, 1)
        kill_all(fenced.namespaces)
        _wait_for_children()
        if fenced.namespaces:
            _empty("/tmp")


def _wait_for_children() -> None:
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _empty(folder: str) -> None:
    """Removes what a test left in a folder."""
    if not os.listdir(folder):
        return
    for path, folders, files in os.walk(folder, topdown=False):
        for name in files:
            os.remove(f"{path}/{name}")
        for name in folders:
            remove = os.remove if os.path.islink(f"{path}/{name}") else os.rmdir
            remove(f"{path}/{name}")


def judge_run(control: int, fenced: Fenced) -> None:
    """Judges the tests of a run until the other side has gone.

    Args:
        control: socket to the first process of the run (`Judging`).

    Raises:
        OSError: the other side has gone too early.
    """
    os.dup2(control, _CONTROL)
    os.close(control)
    length, [file] = receive_files(_CONTROL, 4)
    request = marshal.loads(read_exactly(_CONTROL, int.from_bytes(length, "big")))
    tests = marshal.loads(os.pread(file, os.fstat(file).st_size, 0))
    os.close(file)

    fenced.limit(request["limits"])
    os.chdir(request["folder"])
    _announce()

    last = max(index for index, is_judged in enumerate(request["judged"]) if is_judged)
    is_announced = True
    while True:
        try:
            number, files = receive_files(_CONTROL, 4)
        except OSError:
            return
        index = int.from_bytes(number, "big")
        test = tests[index]

        # Other tests get a process of their own, except the last one: nothing comes after it.
        if index == last or judge.leaves_nothing(request["language"], test):
            if not is_announced:
                _announce()
                is_announced = True
            if index == last:
                _be_judge(request["language"], test, files)
            verdict = _take(files)
            judge.judge_python(test, languages.CHANNEL, verdict)
            os.dup2(0, languages.CHANNEL)  # closes the socket, and lets no other file get this number
            os.close(verdict)
        else:
            _judge_apart(request["language"], test, files, fenced.namespaces)
            is_announced = False


def _announce() -> None:
    """Tells the first process of the run that this process judges from now on: hands it clocks of this process."""
    paths = ("/proc/self/stat", "/proc/self/schedstat")  # the latter only if the kernel has it
    clocks = [os.open(path, os.O_RDONLY) for path in paths if os.path.exists(path)]
    send_files(_CONTROL, _CLOCK.pack(sum(os.times()[:4])), clocks)
    for clock in clocks:
        os.close(clock)


def _judge_apart(language: str, test: dict[str, str], files: list[int], namespaces: bool) -> None:
    """Judges a test in a process forked for it, of which nothing is left then."""
    child = os.fork()
    if child == 0:
        _announce()
        _be_judge(language, test, files)
    for file in files:
        os.close(file)
    os.waitpid(child, 0)
    if namespaces:
        kill_all(namespaces)
        _empty("/tmp")


def _be_judge(language: str, test: dict[str, str], files: list[int]) -> NoReturn:
    try:
        os.close(_CONTROL)
        judge.JUDGES[language](test, languages.CHANNEL, _take(files))
    finally:
        os._exit(1)


def _take(files: list[int]) -> int:
    """Makes the files of a test those of this process; returns the descriptor of its verdict."""
    channel, stdout, stderr, verdict = files
    os.dup2(channel, languages.CHANNEL, inheritable=False)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    for file in (channel, stdout, stderr):
        os.close(file)
    return verdict


class Judging:
    """The judge of a run, as its first process sees it.

    Args:
        control: socket to the judge.
        request: the run's limits, folder, language, and which tests are judged.
        tests: file with the tests.

    Raises:
        OSError: the judge could not be confined.
    """

    def __init__(self, control: int, request: dict[str, Any], tests: int) -> None:
        self._control = control
        parts = ("limits", "folder", "language", "judged")
        content = marshal.dumps({name: request[name] for name in parts})
        send_files(control, len(content).to_bytes(4, "big"), [tests])
        os.write(control, content)
        self._clocks: list[int] = []
        self._ended_cpu_seconds = 0.0  # of processes that judged before the present one
        self._earlier_cpu_seconds = 0.0  # of the present one, before it judged
        self.last_cpu_seconds = 0.0

    def wait(self) -> None:
        """Waits until the judge is confined.

        Raises:
            OSError: it could not be.
        """
        self._take_clocks(*receive_files(self._control, _CLOCK.size))

    def _take_clocks(self, content: bytes, clocks: list[int]) -> None:
        for clock in self._clocks:
            os.close(clock)
        self._clocks = clocks
        self._ended_cpu_seconds = self.last_cpu_seconds
        [self._earlier_cpu_seconds] = _CLOCK.unpack(content)

    def judge(self, index: int, files: list[int]) -> None:
        """Hands a test to the judge: the socket to the program, stdout, stderr and the pipe for the verdict.

        A judge that an earlier test ended writes no verdict.
        """
        try:
            send_files(self._control, index.to_bytes(4, "big"), files)
        except OSError:
            return

    def cpu_seconds(self) -> float:
        """Returns the CPU seconds that the processes which judge have used in this run so far."""
        while has_more(self._control):
            try:
                self._take_clocks(*receive_files(self._control, _CLOCK.size))
            except OSError:  # the judge has ended
                break
        fields = self._read(0).rpartition(b")")[2].split()  # none once the process has ended
        if fields:
            seconds = sum(map(int, fields[11:15])) / _TICKS - self._earlier_cpu_seconds
            self.last_cpu_seconds = max(self.last_cpu_seconds, self._ended_cpu_seconds + seconds)
        return self.last_cpu_seconds

    def waited_seconds(self) -> float:
        """Returns how long the judge was ready to run but had no core; 0 if unknown."""
        fields = self._read(1).split()
        return int(fields[1]) / 1e9 if len(fields) > 1 else 0.0

    def _read(self, clock: int) -> bytes:
        try:
            return os.pread(self._clocks[clock], 4096, 0)
        except (OSError, IndexError):
            return b""


_TICKS = os.sysconf("SC_CLK_TCK")
