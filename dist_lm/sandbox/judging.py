"""The process that judges, in namespaces of its own: no program can see it.

It is confined like a program. For each run it gets the tests once, in a file that no other process of the sandbox
reads. For each test it then gets the socket to the program, standard output and error of the judge, and a pipe for the
verdict, which it closes in the end. A test that leaves nothing behind is judged here; another one in a process forked
for it, of which nothing is left then.

This module runs inside the sandbox. Only the standard library is imported, and little of it.
"""

from __future__ import annotations

import _signal  # pyright: ignore[reportMissingImports]
import marshal
import os
import struct

from dist_lm.sandbox import confine, judge, languages
from dist_lm.sandbox.fenced import Fenced, leave_after
from dist_lm.sandbox.frames import has_more, read_exactly, receive_files, send_files, socketpair
from dist_lm.sandbox.watched import SIGKILL, kill_all

TYPE_CHECKING = False  # `typing` itself would take a third of a cold start
if TYPE_CHECKING:
    from typing import Any

_CONTROL, _CHANNEL = 4, 5  # descriptors of the sockets to the first process of the run, and to the server
_CLOCK = struct.Struct("d")  # CPU seconds of a process until it judges; the clocks themselves are open files
_TMP_BYTES = 32 << 20


class Judges:
    """The judging process, as the server of the sandbox sees it. It serves one run at a time.

    Raises:
        OSError: the kernel refuses a namespace.
    """

    def __init__(self, fenced: Fenced) -> None:
        self._channel, served_end = socketpair()
        self._process = fenced.fork()
        if self._process == 0:
            os.close(self._channel)
            leave_after(_serve, served_end, fenced)
        os.close(served_end)

    def begin(self) -> int:
        """Returns a socket for a run, which it serves until the other side has gone.

        Raises:
            OSError: it has ended.
        """
        control, served_end = socketpair()
        try:
            send_files(self._channel, b"+", [served_end])
        except OSError:
            os.close(control)
            raise
        finally:
            os.close(served_end)
        return control

    def close(self) -> None:
        """Ends it, and all that it has started."""
        os.close(self._channel)
        os.kill(self._process, SIGKILL)
        os.waitpid(self._process, 0)


def _serve(channel: int, fenced: Fenced) -> None:
    """Serves runs, one after the other; runs in the first process of new namespaces and never returns.

    It ends by OSError once the other side has gone, and is killed by `Judges.close`.

    Raises:
        OSError: the kernel refuses a fence, or the other side has gone.
    """
    # Files of a program that a test runs could interrupt this process, as the first one of a run (`inside`).
    _signal.signal(_signal.SIGINT, _signal.SIG_IGN)
    fenced.begin()
    os.dup2(channel, _CHANNEL)
    if fenced.namespaces:
        confine.mount_tmp(_TMP_BYTES)
    else:
        confine.adopt_orphans()
    fenced.confine(
        "/tmp", badness=500, is_judge=True
    )  # the program goes first if memory is short, but the first processes last
    os.closerange(_CHANNEL + 1, 1 << 20)
    if fenced.namespaces:
        confine.dumpable(False)  # a test may run files of a program, and this memory holds all tests

    clocks = _clocks()
    while True:
        _, [control] = receive_files(_CHANNEL, 1)
        os.dup2(control, _CONTROL)
        os.close(control)
        try:
            _judge_run(fenced, clocks)
        except OSError:  # the run has ended
            os.dup2(0, _CONTROL)


def _judge_run(fenced: Fenced, clocks: list[int]) -> None:
    """Judges the tests of a run until the other side (`Judging`) has gone, by which it ends.

    Sets the working directory and the limit of memory of this process to those of the run.

    Raises:
        OSError: the other side has gone.
    """
    length, [file] = receive_files(_CONTROL, 4)
    request = marshal.loads(read_exactly(_CONTROL, int.from_bytes(length, "big")))
    tests = marshal.loads(os.pread(file, os.fstat(file).st_size, 0))
    os.close(file)

    os.chdir(request["folder"])
    fenced.limit_memory(request["limits"]["memory_bytes"])
    _announce(clocks)
    is_announced = True
    while True:
        number, files = receive_files(_CONTROL, 4)
        test = tests[int.from_bytes(number, "big")]
        if judge.leaves_nothing(request["language"], test):
            if not is_announced:
                _announce(clocks)
            verdict = _take(files)
            judge.judge_python(test, languages.CHANNEL, verdict)
            for descriptor in (1, 2, languages.CHANNEL):  # closes the files, and lets no other one get these numbers
                os.dup2(0, descriptor)
            os.close(verdict)
            is_announced = True
        else:
            _judge_apart(request, test, files, fenced)
            is_announced = False


def _clocks() -> list[int]:
    """Opens what the kernel tells of this process: its CPU time, and how long it waited for a core."""
    paths = ("/proc/self/stat", "/proc/self/schedstat")  # the latter only if the kernel has it
    return [os.open(path, os.O_RDONLY) for path in paths if os.path.exists(path)]


def _announce(clocks: list[int]) -> None:
    """Tells the first process of the run that this process judges from now on: hands it the clocks of this process."""
    send_files(_CONTROL, _CLOCK.pack(sum(os.times()[:4])), clocks)


def _judge_apart(request: dict[str, Any], test: dict[str, str], files: list[int], fenced: Fenced) -> None:
    """Judges a test in a process forked for it, of which nothing is left then: every process that it started is killed,
    and /tmp emptied. Waits for its end and closes `files`.

    Args:
        files: socket to the program, standard output, standard error, pipe of the verdict.

    Raises:
        OSError: the kernel refuses a process, or what the test left cannot be removed.
    """
    child = os.fork()
    if child == 0:
        try:
            confine.end_with_parent()
            _signal.signal(_signal.SIGINT, _signal.default_int_handler)
            _announce(_clocks())  # before the limits: files on their way are limited by the number of open ones
            fenced.limit(request["limits"])
            # The sockets to the first process of the run and to the server are not for tests.
            os.closerange(_CONTROL, files[0])
            judge.JUDGES[request["language"]](test, languages.CHANNEL, _take(files))
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode(errors="replace")[:500])
        finally:
            os._exit(1)
    for file in files:
        os.close(file)
    os.waitpid(child, 0)

    kill_all(fenced.namespaces)
    _wait_for_children()
    if fenced.namespaces:
        try:
            _empty("/tmp")
        except OSError as error:  # another judge takes the place of this one
            raise RuntimeError(f"a test left files that cannot be removed: {error}") from error


def _wait_for_children() -> None:
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _empty(folder: str) -> None:
    """Removes what a test left in a folder, links not followed, and the folder's own rights and attributes.

    Raises:
        OSError: something cannot be removed.
    """
    os.chmod(folder, 0o777)  # noqa: S103 as `confine.mount_tmp` made it
    for name in os.listxattr(folder):
        os.removexattr(folder, name)
    if not os.listdir(folder):
        return

    # A folder without rights keeps its files, and a program can send one.
    for path, folders, _ in os.walk(folder):
        for name in folders:
            if not os.path.islink(f"{path}/{name}"):
                os.chmod(f"{path}/{name}", 0o700)
    for path, folders, files in os.walk(folder, topdown=False):
        for name in files:
            os.remove(f"{path}/{name}")
        for name in folders:
            remove = os.remove if os.path.islink(f"{path}/{name}") else os.rmdir
            remove(f"{path}/{name}")


def _take(files: list[int]) -> int:
    """Makes the files of a test those of this process (CHANNEL, standard output and error), and closes the rest;
    returns the descriptor of its verdict, which stays open."""
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
        self._ended_cpu_seconds = 0.0  # CPU time of processes that judged before the present one
        self._earlier_cpu_seconds = 0.0  # CPU time of the present process, before it judged
        self._earlier_waited_seconds = 0.0  # time that the present process waited, before the test
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
        # The process that judged before has ended, and what it used stays counted.
        self._ended_cpu_seconds = self.last_cpu_seconds
        [self._earlier_cpu_seconds] = _CLOCK.unpack(content)
        self._earlier_waited_seconds = self._waited_seconds()

    def judge(self, index: int, files: list[int]) -> None:
        """Hands a test to the judge: the socket to the program, stdout, stderr and the pipe for the verdict.

        A judge that an earlier test ended writes no verdict.
        """
        self._earlier_waited_seconds = self._waited_seconds()
        try:
            send_files(self._control, index.to_bytes(4, "big"), files)
        except OSError:
            return

    def cpu_seconds(self) -> float:
        """Returns the CPU seconds that the processes which judge have used in this run so far; it never falls.

        Takes over the clocks of a process that judges since the last call. What a process used before it judged this
        run does not count.
        """
        while has_more(self._control):
            try:
                self._take_clocks(*receive_files(self._control, _CLOCK.size))
            except OSError:  # the judge has ended
                break
        fields = self._read(0).rpartition(b")")[2].split()  # none once the process has ended
        if fields:
            # User and system time, its own and that of its ended children: fields 14 to 17 in proc(5).
            seconds = sum(map(int, fields[11:15])) / _TICKS - self._earlier_cpu_seconds
            self.last_cpu_seconds = max(self.last_cpu_seconds, self._ended_cpu_seconds + seconds)
        return self.last_cpu_seconds

    def waited_seconds(self) -> float:
        """Returns how long the judge was ready to run but had no core, in this test; 0 if unknown."""
        return self._waited_seconds() - self._earlier_waited_seconds

    def _waited_seconds(self) -> float:
        """Returns how long the process that judges was ready to run but had no core, from its start on: in earlier runs
        too."""
        fields = self._read(1).split()
        return int(fields[1]) / 1e9 if len(fields) > 1 else 0.0

    def _read(self, clock: int) -> bytes:
        try:
            return os.pread(self._clocks[clock], 4096, 0)
        except (OSError, IndexError):
            return b""


_TICKS = os.sysconf("SC_CLK_TCK")
