"""The program in a sandbox: a server that forks into new namespaces for every run, and what happens there.

Four processes: the server (waits for requests and knows nothing of them), for each run one that enters new namespaces,
in these the first one (`_Run`: reads the request, measures, ends what is left), and for each test the program itself.
The server never reads a request, so no memory of an earlier run is there to be read.

A frame is a length (4 bytes) and its content: a request is a marshalled dict, an answer is the packed `Attempt`s of
`dist_lm.sandbox.program`. Only the standard library is imported, and little of it, so that a cold start is quick.
"""

from __future__ import annotations

import errno
import gc
import marshal
import os
import resource
import select
import sys
import time

from dist_lm.sandbox import confine, languages

TYPE_CHECKING = False  # `typing` itself would take a third of a cold start
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, NoReturn

PRELOADED = (
    *("signal", "site", "re", "collections", "functools", "itertools", "math", "string", "json", "heapq", "bisect"),
    *("operator", "typing", "copy", "datetime", "statistics", "decimal", "fractions", "textwrap", "sqlite3"),
    *("dataclasses", "enum", "io", "threading", "dist_lm.sandbox.syntax"),
)
WRITABLE = ("/tmp", "/dev/null")
DONE, TIMEOUT, OUTPUT, TROUBLE, STARVED = range(5)  # how an attempt ended
TAIL_BYTES = 2_000
_CHUNK = 65_536
_SIGKILL = 9  # the module `signal` takes long to import
_SHORTEST_WAIT_S = 0.005


def main() -> None:
    """Serve on descriptor 0.

    Arguments: descriptor to join a memory group with (-1: none), identity to become (0: none), Landlock version to use,
    seccomp, namespaces.
    """
    group, identity, landlock, seccomp, namespaces = map(int, sys.argv[1:])
    if group >= 0:
        os.write(group, b"0")
        os.close(group)
    channel = os.dup(0)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    if identity:
        confine.mount_proc("")  # of bubblewrap's, root may cover parts, and then no run may mount its own
        confine.become(identity)
    readable = [path for path in ("/usr", "/bin", "/lib", "/lib64", "/etc", "/dev", "/proc") if os.path.exists(path)]
    readable += [sys.base_prefix, os.path.dirname(__file__)]
    program = confine.system_call_filter(os.uname().machine) if seccomp else None
    run = _Run(channel, bool(namespaces), landlock, readable, program)
    _write_frame(channel, b"ready")
    _preload(channel)
    gc.collect()
    gc.freeze()
    while _wait_for(channel) and _serve(channel, run):
        pass
    os._exit(0)  # at once: there is nothing to tidy up


def _preload(channel: int) -> None:
    """Import what programs use often, until the first request comes."""
    waiting = select.poll()
    waiting.register(channel, select.POLLIN)
    for name in PRELOADED:
        if waiting.poll(0):
            return
        __import__(name)


def _wait_for(channel: int) -> bool:
    """Whether a request comes; False once the other side has gone."""
    poller = select.poll()
    poller.register(channel, select.POLLIN)
    return not any(event & (select.POLLHUP | select.POLLERR) for _, event in poller.poll())


def _serve(channel: int, run: _Run) -> bool:
    """One run in a process below; ends it if the other side goes. Whether an answer was written."""
    child = os.fork()
    if child == 0:
        _leave(run.start)
    watched = os.pidfd_open(child)
    poller = select.poll()
    poller.register(watched, select.POLLIN)
    poller.register(channel, 0)
    gone = any(place == channel for place, _ in poller.poll())
    if gone:
        os.kill(child, _SIGKILL)
    os.close(watched)
    return os.waitpid(child, 0)[1] == 0 and not gone


def _leave(work: Callable[[], None]) -> NoReturn:
    """End this forked process after `work`, with code 1 if it raises."""
    code = 1
    try:
        work()
        code = 0
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode(errors="replace")[:500])
    finally:
        os._exit(code)


class _Run:
    """All attempts of one program, from the first process of new namespaces."""

    def __init__(
        self, channel: int, namespaces: bool, landlock: int, readable: list[str], system_calls: bytes | None
    ) -> None:
        self.channel = channel
        self.namespaces = namespaces
        self.landlock = landlock
        self.readable = readable
        self.system_calls = system_calls

    def start(self) -> None:
        confine.end_with_parent()
        if self.namespaces:
            confine.enter_namespaces()
        child = os.fork()
        if child == 0:
            _leave(self._answer)
        if os.waitpid(child, 0)[1]:
            raise ChildProcessError("no answer")

    def _answer(self) -> None:
        confine.end_with_parent()
        request = marshal.loads(_read_frame(self.channel))
        if self.namespaces:
            confine.mount_proc()
            confine.dumpable(False)
        else:
            confine.adopt_orphans()
        limits, answer = request["limits"], []
        cpu_left, wall_left = limits["cpu_s"], limits["wall_s"]
        for test in request["tests"]:
            if self.namespaces:
                confine.mount_tmp(limits["tmp_bytes"])
            if cpu_left <= 0 or wall_left <= 0:
                answer.append((TIMEOUT, 0, False, 0.0, 0.0, b"", b""))
                continue
            attempt = self._attempt(request, test, cpu_left, wall_left)
            cpu_left, wall_left = cpu_left - attempt[3], wall_left - attempt[4]
            if attempt[0] == TIMEOUT:
                cpu_left = 0.0
            answer.append(attempt)
            if self.namespaces:
                confine.unmount_tmp()
        _write_frame(self.channel, b"".join(_packed(*one) for one in answer))

    def _attempt(self, request: dict[str, Any], test: dict[str, str], cpu_s: float, wall_s: float) -> tuple:
        """One test: (how it ended, exit code, token seen, CPU seconds, wall seconds, stdout, tail of stderr)."""
        token = os.urandom(16).hex().encode()
        stdin = _sealed(test["stdin"].encode(errors="surrogatepass"))
        pipes = [os.pipe() for _ in range(3)]
        before = _cpu_of_ended()
        child = os.fork()
        if child == 0:
            self._be_program(request, test, token, (stdin, *(write for _, write in pipes)))
        for _, write in pipes:
            os.close(write)
        os.close(stdin)
        attempt = _Attempt(child, [read for read, _ in pipes], request["limits"]["output_bytes"], cpu_s, wall_s, before)
        try:
            attempt.watch()
        finally:
            attempt.end(self.namespaces)
        ended, stdout = attempt.ended, bytes(attempt.read[0])
        seen = token in stdout
        if attempt.read[2]:
            ended, attempt.read[1] = TROUBLE, attempt.read[2]
        return (
            ended,
            attempt.exit_code,
            seen,
            _cpu_of_ended() - before,
            attempt.seconds,
            stdout.replace(token, b""),
            bytes(attempt.read[1][-TAIL_BYTES:]),
        )

    def _be_program(
        self, request: dict[str, Any], test: dict[str, str], token: bytes, files: tuple[int, ...]
    ) -> NoReturn:
        """Confine this process, then become the program. What fails before goes to the third pipe."""
        try:
            os.setsid()
            for place, file in enumerate(files):
                os.dup2(file, place)
            os.closerange(4, 1 << 20)
            os.set_inheritable(3, False)
            confine.dumpable(True)  # else not even the program itself may open its /dev/stdin
            with open("/proc/self/oom_score_adj", "w") as score:
                score.write("1000")
            os.chdir(request["folder"])
            confine.limit(_resource_limits(request["limits"], self.namespaces))
            confine.drop_capabilities()
            if self.landlock:
                confine.restrict_files(self.landlock, self.readable, (*WRITABLE, request["folder"]))
            if self.system_calls:
                confine.filter_system_calls(self.system_calls)
        except BaseException as error:
            os.write(3, f"{type(error).__name__}: {error}".encode())
            os._exit(1)
        os.close(3)
        gc.unfreeze()
        try:
            languages.RUN[request["language"]](test["before"], request["source"], test["code"], token)
        finally:
            os._exit(1)


class _Attempt:
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
        return self.cpu_s - running - (_cpu_of_ended() - self.cpu_before)

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


def _cpu_of_ended() -> float:
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
            os.kill(-1, _SIGKILL)
        except ProcessLookupError:
            return
    else:
        for fields in _processes_below():
            try:
                os.kill(int(fields[0]), _SIGKILL)
            except ProcessLookupError:
                continue


def _resource_limits(limits: dict[str, Any], namespaces: bool) -> dict[int, int]:
    chosen = {
        resource.RLIMIT_CPU: int(limits["cpu_s"]) + 2,  # whole seconds: should the watching process be stopped
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NOFILE: limits["files"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_SIGPENDING: 256,
    }
    if namespaces:  # else it would count all processes of this user
        chosen[resource.RLIMIT_NPROC] = limits["processes"] + 2  # and the two processes above the program
    return chosen


def _sealed(data: bytes) -> int:
    """A file in memory that nobody can change."""
    import fcntl

    file = os.memfd_create("stdin", os.MFD_ALLOW_SEALING)
    os.write(file, data)
    os.lseek(file, 0, os.SEEK_SET)
    fcntl.fcntl(file, 1033, 0xF)  # F_ADD_SEALS: seal, shrink, grow, write
    return file


# --- frames ---


def _packed(ended: int, code: int, seen: bool, cpu: float, wall: float, stdout: bytes, tail: bytes) -> bytes:
    import struct

    return struct.pack("!Bi?ddII", ended, code, seen, cpu, wall, len(stdout), len(tail)) + stdout + tail


def _read_frame(channel: int) -> bytes:
    return _read_exactly(channel, int.from_bytes(_read_exactly(channel, 4), "big"))


def _read_exactly(channel: int, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        piece = os.read(channel, min(length - len(data), 1 << 20))
        if not piece:
            raise OSError(errno.EPIPE, "the other side has gone")
        data += piece
    return bytes(data)


def _write_frame(channel: int, content: bytes) -> None:
    data = len(content).to_bytes(4, "big") + content
    while data:
        data = data[os.write(channel, data) :]
