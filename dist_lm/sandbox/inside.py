"""The program in a sandbox: a server that forks into new namespaces for every run, and what happens there.

Three processes: the server (waits for requests and knows nothing of them), for each run the first one in new namespaces
(`_Run`: reads the request, measures, ends what is left), and for each test the program itself. The server never reads a
request, so no memory of an earlier run is there to be read.

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

from dist_lm.sandbox import confine, languages
from dist_lm.sandbox.watched import SIGKILL, TIMEOUT, TROUBLE, Watched

TYPE_CHECKING = False  # `typing` itself would take a third of a cold start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

# What programs import most. Each module makes every fork slower. `threading` and `random` are not among them: they have
# work of their own after a fork, which takes as long as the fork itself.
PRELOADED = (
    *("site", "signal", "re", "collections", "functools", "itertools", "math", "string", "json", "heapq", "bisect"),
    *("operator", "typing", "datetime", "sqlite3"),
)
WRITABLE = ("/tmp", "/dev/null")
TAIL_BYTES = 2_000


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
    readable = _trees("/usr", "/bin", "/lib", "/lib64", "/etc", "/dev", "/proc", sys.base_prefix)
    program = confine.system_call_filter(os.uname().machine) if seccomp else None
    run = _Run(channel, bool(namespaces), landlock, readable, program)
    _write_frame(channel, b"ready")
    left = [*PRELOADED]
    while _wait_for(channel, left) and _serve(channel, run):
        pass
    os._exit(0)  # at once: there is nothing to tidy up


def _trees(*paths: str) -> list[str]:
    """Those that are there, once each: links followed, none inside another."""
    found: list[str] = []
    for path in sorted({os.path.realpath(one) for one in paths if os.path.exists(one)}):
        if not found or not path.startswith(f"{found[-1]}/"):
            found.append(path)
    return found


def _wait_for(channel: int, left: list[str]) -> bool:
    """Whether a request comes; False once the other side has gone. Loads what programs use often meanwhile."""
    poller = select.poll()
    poller.register(channel, select.POLLIN)
    while left and not poller.poll(0):
        name = left.pop(0)
        __import__(name)
        if name == "site":
            languages.add_site_names()
        if not left:
            compile("0", "", "exec")  # makes the types of syntax trees
            gc.collect()
            gc.freeze()
    return not any(event & (select.POLLHUP | select.POLLERR) for _, event in poller.poll())


def _serve(channel: int, run: _Run) -> bool:
    """One run in a process below; ends it if the other side goes. Whether an answer was written."""
    child = run.fork()
    if child == 0:
        _leave(run.answer)
    watched = os.pidfd_open(child)
    poller = select.poll()
    poller.register(watched, select.POLLIN)
    poller.register(channel, 0)
    gone = any(place == channel for place, _ in poller.poll())
    if gone:
        os.kill(child, SIGKILL)
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
        self.identity = os.geteuid(), os.getegid()  # in new namespaces they have no names yet

    def fork(self) -> int:
        return confine.fork_into_namespaces() if self.namespaces else os.fork()

    def answer(self) -> None:
        confine.end_with_parent()
        if self.namespaces:
            confine.name_identities(*self.identity)
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
        given = test["stdin"].encode(errors="surrogatepass")
        stdin = confine.sealed(given) if given else os.open("/dev/null", os.O_RDONLY)
        pipes = [os.pipe() for _ in range(3)]
        child = os.fork()
        if child == 0:
            self._be_program(request, test, token, (stdin, *(write for _, write in pipes)))
        for _, write in pipes:
            os.close(write)
        os.close(stdin)
        attempt = Watched(child, [read for read, _ in pipes], request["limits"]["output_bytes"], cpu_s, wall_s)
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
            attempt.cpu_seconds,
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
            confine.write("/proc/self/oom_score_adj", "1000")
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
