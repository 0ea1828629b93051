"""The server in a sandbox, which forks into new namespaces for every run.

The server waits for requests and knows nothing of them. For each run, the first process in new namespaces (`_Run`)
reads the request, measures, and ends what is left. For each test it forks a judge (`dist_lm.sandbox.judge`), and the
program into a further pid namespace, from where neither the judge nor the first process can be seen. The server never
reads a request, so no memory of an earlier run is there to be read.

A frame is a length (4 bytes) and its content: a request is a marshalled dict, an answer is the packed `Attempt`s of
`dist_lm.sandbox.program`. With the length of a request comes the descriptor of a file which only judges read. Only the
standard library is imported, and little of it, so that a cold start is quick.
"""

from __future__ import annotations

import _signal  # pyright: ignore[reportMissingImports]
import _socket  # `socket` itself takes long to import
import errno
import gc
import marshal
import os
import resource
import select
import sys

from dist_lm.sandbox import confine, judge, languages
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
    channel = os.dup2(0, 10)
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, *range(3, 5)):  # the latter only so that no other file gets their numbers
        os.dup2(null, descriptor)
    os.close(null)

    if identity:
        # bubblewrap as root covers parts of its /proc, and then the kernel lets no run mount one of its own.
        confine.mount_proc("")
    has_own_files = bool(namespaces) and _own_files()
    if identity:
        confine.become(identity)
    elif namespaces:
        confine.drop_capabilities()

    readable = _trees("/usr", "/bin", "/lib", "/lib64", "/etc", "/dev", "/proc", sys.base_prefix)
    call_filter = confine.system_call_filter(os.uname().machine, has_own_files) if seccomp else None
    run = _Run(channel, bool(namespaces), landlock, readable, call_filter)
    _write_frame(channel, b"ready")
    unloaded = [*PRELOADED]
    while _wait_for(channel, unloaded) and _serve(channel, run):
        pass
    os._exit(0)  # at once: there is nothing to tidy up


def _own_files() -> bool:
    """Gives this sandbox files and devices that no other one can lock or watch; returns whether it has the files."""
    try:
        confine.own_files(_trees("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32", sys.base_prefix))
    except OSError:
        return False
    try:
        confine.own_devices()
    except OSError:
        return True  # without root the devices of the host stay
    return True


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


def _wait_for_orphans() -> None:
    """Waits for processes whose parent has ended, as the first process of a pid namespace does; never returns."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    os.closerange(0, 1 << 20)
    while True:
        signal.sigwait([signal.SIGCHLD])
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            continue


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
        self.for_judges = -1  # descriptor of a file with the tests
        self.processes = -1  # descriptor of the run's own pid namespace
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
        # The kernel lets a program signal the first process of its namespace where that has a handler: Python's for
        # SIGINT is the only one.
        _signal.signal(_signal.SIGINT, _signal.SIG_IGN)
        if self.namespaces:
            confine.name_identities(*self.identity)
        length, self.for_judges = _receive_file(self.channel, 4)
        request = marshal.loads(_read_exactly(self.channel, int.from_bytes(length, "big")))
        if self.namespaces:
            confine.mount_proc()
            confine.dumpable(False)
            self.processes = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        else:
            confine.adopt_orphans()

        limits = request["limits"]
        remaining_cpu_s, remaining_wall_s = limits["cpu_s"], limits["wall_s"]
        attempts = []
        for index in range(len(request["tests"])):
            if self.namespaces:
                confine.mount_tmp(limits["tmp_bytes"])
            if remaining_cpu_s <= 0 or remaining_wall_s <= 0:
                attempts.append((TIMEOUT, 0, False, 0.0, 0.0, b"", b""))
                continue

            attempt = self._attempt(request, index, remaining_cpu_s, remaining_wall_s)
            attempts.append(attempt)
            remaining_cpu_s -= attempt[3]
            remaining_wall_s -= attempt[4]
            if attempt[0] == TIMEOUT:
                remaining_cpu_s = 0.0
            if self.namespaces:
                confine.unmount_tmp()
        _write_frame(self.channel, b"".join(_packed(*attempt) for attempt in attempts))

    def _attempt(self, request: dict[str, Any], index: int, cpu_s: float, wall_s: float) -> tuple:
        """Runs the test with this index.

        Returns (how it ended, exit code, whether its code passed, CPU seconds, wall seconds, stdout, tail of stderr).
        """
        test, is_judged = request["tests"][index], request["judged"][index]
        token = os.urandom(16).hex().encode()
        stdin_content = test["stdin"].encode(errors="surrogatepass")
        stdin = confine.sealed(stdin_content) if stdin_content else os.open("/dev/null", os.O_RDONLY)
        pipes = [os.pipe() for _ in range(6 if is_judged else 3)]
        *outputs, trouble = (write_end for _, write_end in pipes[:3])

        judge_process = init = 0
        program_end = trouble  # nothing else, if there is no judge
        sockets: list[int] = []
        if is_judged:
            sockets = [*_socketpair()]
            judge_end, program_end = sockets
            judge_outputs = [write_end for _, write_end in pipes[3:]]
            null = os.open("/dev/null", os.O_RDONLY)
            judge_process = os.fork()
            if judge_process == 0:
                self._be_judge(request, index, (null, *judge_outputs[:2], judge_end, judge_outputs[2]))
            os.close(null)
            if self.namespaces:
                init = self._fork_init()

        child = os.fork()
        if child == 0:
            self._be_program(request, test, token, is_judged, (stdin, *outputs, program_end, trouble))
        if init:
            confine.fork_into_processes(self.processes)
        for file in (*(write_end for _, write_end in pipes), *sockets, stdin):
            os.close(file)

        read_ends = [read_end for read_end, _ in pipes]
        output_bytes = request["limits"]["output_bytes"]
        attempt = Watched(child, read_ends, output_bytes, cpu_s, wall_s, judge_process, init)
        try:
            attempt.watch()
        finally:
            attempt.end(self.namespaces)
        return self._facts(attempt, token)

    def _facts(self, attempt: Watched, token: bytes) -> tuple:
        """Returns what the answer says of an attempt that has ended."""
        stdout, stderr, trouble, *of_judge = attempt.read
        exit_code = attempt.exit_code
        has_passed = token in stdout
        if of_judge:
            judge_stdout, judge_stderr, verdict = of_judge
            stdout, stderr = stdout + judge_stdout, stderr[-TAIL_BYTES:] + judge_stderr
            has_passed = verdict == judge.PASSED and attempt.judge_exit_code == 0
            if not has_passed:
                trouble = trouble or verdict
                exit_code = exit_code or attempt.judge_exit_code
        return (
            TROUBLE if trouble else attempt.ended,
            exit_code,
            has_passed,
            attempt.cpu_seconds,
            attempt.seconds,
            bytes(stdout).replace(token, b""),
            bytes((trouble or stderr)[-TAIL_BYTES:]),
        )

    def _fork_init(self) -> int:
        """Forks the first process of a pid namespace, into which children are forked until `fork_into_processes`.

        It waits for processes whose parent has ended, and with it all others of the namespace end. From there neither
        the judge nor this process can be seen.
        """
        confine.fork_into_new_processes()
        init = os.fork()
        if init == 0:
            _leave_after(_wait_for_orphans)
        return init

    def _be_program(
        self, request: dict[str, Any], test: dict[str, str], token: bytes, is_judged: bool, files: tuple[int, ...]
    ) -> NoReturn:
        """Confines this process, then becomes the program and ends with it. An earlier failure is written to the last
        file.

        Args:
            files: standard input, standard output, standard error, socket to the judge, and the pipe for failures.
        """
        try:
            self._confine(request, files, confine.mount_proc if is_judged else None)
        except BaseException as error:
            os.write(files[-1], f"{type(error).__name__}: {error}".encode())
            os._exit(1)

        os.close(4)
        if not is_judged:
            os.close(languages.CHANNEL)
        _signal.signal(_signal.SIGINT, _signal.default_int_handler)
        gc.unfreeze()
        try:
            code = "" if is_judged else test["code"]
            languages.RUN[request["language"]](test["before"], request["source"], code, token, is_judged)
        finally:
            os._exit(1)

    def _be_judge(self, request: dict[str, Any], index: int, files: tuple[int, ...]) -> NoReturn:
        """Confines this process, then judges the program by the test with this index, and ends.

        Args:
            files: standard input, standard output, standard error, socket to the program, and the pipe for the verdict,
                to which an earlier failure is written, too.
        """
        try:
            # No process that a program is forked from has read this.
            content = os.pread(self.for_judges, os.fstat(self.for_judges).st_size, 0)
            test = marshal.loads(content)[index]
            self._confine(request, files, lambda: confine.mount_tmp(request["limits"]["tmp_bytes"]))
        except BaseException as error:
            os.write(files[-1], f"{type(error).__name__}: {error}".encode())
            os._exit(1)

        gc.unfreeze()
        try:
            judge.JUDGES[request["language"]](test, languages.CHANNEL, 4)
        finally:
            os._exit(1)

    def _confine(self, request: dict[str, Any], files: tuple[int, ...], mount: Callable[[], None] | None) -> None:
        """Confines this process for good; its descriptors are then `files`, from 0 on.

        Args:
            mount: what to mount in mounts of its own, if there are namespaces; None: nothing.

        Raises:
            OSError: the kernel refuses.
        """
        os.setsid()
        for descriptor, file in enumerate(files):
            os.dup2(file, descriptor, inheritable=descriptor < 3)
        os.closerange(len(files), 1 << 20)
        confine.dumpable(True)  # else not even the program itself may open its /dev/stdin
        if mount and self.namespaces:
            confine.own_mounts()
            mount()
        confine.write("/proc/self/oom_score_adj", "1000")
        os.chdir(request["folder"])

        # Landlock and seccomp need no_new_privs, which drop_capabilities sets.
        confine.limit(_resource_limits(request["limits"], self.namespaces))
        confine.drop_capabilities()
        if self.landlock:
            confine.restrict_files(self.landlock, self.readable, (*WRITABLE, request["folder"]))
        if self.system_calls:
            confine.filter_system_calls(self.system_calls)


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
        resource_limits[resource.RLIMIT_NPROC] = limits["processes"] + 4  # and the first processes, and the judge
    return resource_limits


# --- frames ---


def _socketpair() -> tuple[int, int]:
    """Returns the descriptors of two sockets that are connected."""
    one, other = _socket.socketpair()
    return one.detach(), other.detach()


def _packed(ended: int, code: int, seen: bool, cpu: float, wall: float, stdout: bytes, tail: bytes) -> bytes:
    import struct

    return struct.pack("!Bi?ddII", ended, code, seen, cpu, wall, len(stdout), len(tail)) + stdout + tail


def _receive_file(channel: int, length: int) -> tuple[bytes, int]:
    """Returns bytes of the channel, and the descriptor of the file that comes with them.

    Raises:
        OSError: the other side has gone, or sent no file.
    """
    end = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, channel)
    content, [(_, _, numbers)], _, _ = end.recvmsg(length, _socket.CMSG_LEN(4), _socket.MSG_WAITALL)
    end.detach()
    return content, int.from_bytes(numbers, sys.byteorder)


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
