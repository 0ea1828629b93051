"""The server in a sandbox, which forks into new namespaces for every run.

There are three processes. The server waits for requests and knows nothing of them. For each run, the first process in
new namespaces (`_Run`) reads the request, measures, and ends what is left. For each test there is the program itself.
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

from dist_lm.sandbox import confine, languages
from dist_lm.sandbox.watched import SIGKILL, TIMEOUT, TROUBLE, Watched

TYPE_CHECKING = False  # `typing` itself would take a third of a cold start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

# Modules that programs import most. Each module makes every fork slower. `threading` and `random` are not among them:
# they have work of their own after a fork, which takes as long as the fork itself.
PRELOADED = (
    *("site", "signal", "re", "collections", "functools", "itertools", "math", "string", "json", "heapq", "bisect"),
    *("operator", "typing", "datetime", "sqlite3"),
)
WRITABLE = ("/tmp", "/dev/null")
TAIL_BYTES = 2_000


def main() -> None:
    """Serves requests on descriptor 0 until the other side has gone; ends the process with exit code 0.

    Arguments: descriptor to join a memory group with (-1: none), identity to become (0: none), Landlock version to use,
    seccomp, namespaces.
    """
    group, identity, landlock, seccomp, namespaces = map(int, sys.argv[1:])
    if group >= 0:
        os.write(group, b"0")
        os.close(group)

    # Programs inherit descriptors 0 and 1, so the channel moves to another one.
    channel = os.dup(0)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)

    if identity:
        # bubblewrap as root covers parts of its /proc, and then the kernel lets no run mount one of its own.
        confine.mount_proc("")
        confine.become(identity)

    readable = _trees("/usr", "/bin", "/lib", "/lib64", "/etc", "/dev", "/proc", sys.base_prefix)
    call_filter = confine.system_call_filter(os.uname().machine) if seccomp else None
    run = _Run(channel, bool(namespaces), landlock, readable, call_filter)
    _write_frame(channel, b"ready")
    unloaded = [*PRELOADED]
    while _wait_for(channel, unloaded) and _serve(channel, run):
        pass
    os._exit(0)  # at once: there is nothing to tidy up


def _trees(*paths: str) -> list[str]:
    """Returns the paths that exist, links followed, without those inside another one."""
    roots: list[str] = []
    for path in sorted({os.path.realpath(path) for path in paths if os.path.exists(path)}):
        if not roots or not path.startswith(f"{roots[-1]}/"):
            roots.append(path)
    return roots


def _wait_for(channel: int, unloaded: list[str]) -> bool:
    """Waits for a request and returns whether one came; False once the other side has gone.

    Meanwhile it imports the modules `unloaded`, and removes them from the list.
    """
    poller = select.poll()
    poller.register(channel, select.POLLIN)
    while unloaded and not poller.poll(0):
        name = unloaded.pop(0)
        __import__(name)
        if name == "site":
            languages.add_site_names()

        # A garbage collection after a fork would touch, and so copy, all objects of the server.
        if not unloaded:
            compile("0", "", "exec")  # makes the types of syntax trees
            gc.collect()
            gc.freeze()
    return not any(event & (select.POLLHUP | select.POLLERR) for _, event in poller.poll())


def _serve(channel: int, run: _Run) -> bool:
    """Makes one run in a process below and returns whether it wrote an answer; kills it if the other side goes."""
    child = run.fork()
    if child == 0:
        _leave_after(run.answer)

    pidfd = os.pidfd_open(child)
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    poller.register(channel, 0)
    is_abandoned = any(file == channel for file, _ in poller.poll())
    if is_abandoned:
        os.kill(child, SIGKILL)
    os.close(pidfd)
    return os.waitpid(child, 0)[1] == 0 and not is_abandoned


def _leave_after(work: Callable[[], None]) -> NoReturn:
    """Ends this forked process after `work`, with code 1 and a line on standard error if it raises."""
    code = 1
    try:
        work()
        code = 0
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode(errors="replace")[:500])
    finally:
        os._exit(code)


class _Run:
    """Makes all attempts of one program, from the first process of new namespaces."""

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
        """Forks into new namespaces, if there are any. Returns the child's pid; 0 in the child."""
        if self.namespaces:
            return confine.fork_into_namespaces()
        return os.fork()

    def answer(self) -> None:
        """Reads a request, makes its attempts and writes the answer; runs in the forked process.

        All tests share the CPU and wall seconds of the request: after a timeout the rest are not started.

        Raises:
            OSError: the other side has gone, or the kernel refuses a namespace.
        """
        confine.end_with_parent()
        if self.namespaces:
            confine.name_identities(*self.identity)
        request = marshal.loads(_read_frame(self.channel))
        if self.namespaces:
            confine.mount_proc()
            confine.dumpable(False)
        else:
            confine.adopt_orphans()

        limits = request["limits"]
        remaining_cpu_s, remaining_wall_s = limits["cpu_s"], limits["wall_s"]
        attempts = []
        for test in request["tests"]:
            if self.namespaces:
                confine.mount_tmp(limits["tmp_bytes"])
            if remaining_cpu_s <= 0 or remaining_wall_s <= 0:
                attempts.append((TIMEOUT, 0, False, 0.0, 0.0, b"", b""))
                continue

            attempt = self._attempt(request, test, remaining_cpu_s, remaining_wall_s)
            attempts.append(attempt)
            remaining_cpu_s -= attempt[3]
            remaining_wall_s -= attempt[4]
            if attempt[0] == TIMEOUT:
                remaining_cpu_s = 0.0
            if self.namespaces:
                confine.unmount_tmp()
        _write_frame(self.channel, b"".join(_packed(*attempt) for attempt in attempts))

    def _attempt(self, request: dict[str, Any], test: dict[str, str], cpu_s: float, wall_s: float) -> tuple:
        """Runs one test.

        Returns (how it ended, exit code, token seen, CPU seconds, wall seconds, stdout, tail of stderr).
        """
        token = os.urandom(16).hex().encode()
        stdin_content = test["stdin"].encode(errors="surrogatepass")
        stdin = confine.sealed(stdin_content) if stdin_content else os.open("/dev/null", os.O_RDONLY)
        pipes = [os.pipe() for _ in range(3)]
        child = os.fork()
        if child == 0:
            self._be_program(request, test, token, (stdin, *(write_end for _, write_end in pipes)))
        for _, write_end in pipes:
            os.close(write_end)
        os.close(stdin)

        read_ends = [read_end for read_end, _ in pipes]
        attempt = Watched(child, read_ends, request["limits"]["output_bytes"], cpu_s, wall_s)
        try:
            attempt.watch()
        finally:
            attempt.end(self.namespaces)

        stdout, stderr, trouble = attempt.read
        return (
            TROUBLE if trouble else attempt.ended,
            attempt.exit_code,
            token in stdout,
            attempt.cpu_seconds,
            attempt.seconds,
            bytes(stdout).replace(token, b""),
            bytes((trouble or stderr)[-TAIL_BYTES:]),
        )

    def _be_program(
        self, request: dict[str, Any], test: dict[str, str], token: bytes, files: tuple[int, ...]
    ) -> NoReturn:
        """Confines this process, then becomes the program and ends with it. An earlier failure is written to the third
        pipe.

        Args:
            files: standard input, standard output, standard error, and the pipe for failures.
        """
        try:
            os.setsid()
            for descriptor, file in enumerate(files):
                os.dup2(file, descriptor)
            os.closerange(4, 1 << 20)
            os.set_inheritable(3, False)
            confine.dumpable(True)  # else not even the program itself may open its /dev/stdin
            confine.write("/proc/self/oom_score_adj", "1000")
            os.chdir(request["folder"])

            # Landlock and seccomp need no_new_privs, which drop_capabilities sets.
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
    """Returns the limits of one program, resource -> most, from those of the request."""
    resource_limits = {
        resource.RLIMIT_CPU: int(limits["cpu_s"]) + 2,  # whole seconds, in case the watching process is stopped
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NOFILE: limits["files"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_SIGPENDING: 256,
    }
    if namespaces:  # else it would count all processes of this user
        resource_limits[resource.RLIMIT_NPROC] = limits["processes"] + 2  # and the two processes above the program
    return resource_limits


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
