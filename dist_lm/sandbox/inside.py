"""The server in a sandbox, which forks into new namespaces for every run.

The server waits for requests and knows nothing of them. For each run, the first process in new namespaces (`_Run`)
reads the request, measures, and ends what is left; for each test it forks the program. The judge of the run
(`dist_lm.sandbox.judging`) is in namespaces of its own, where no program can see it. The server never reads a request,
so no memory of an earlier run is there to be read.

A request is a byte, then a frame (of a session, many: `dist_lm.sandbox.turns`): a length (4 bytes) and its content, a
marshalled dict. With the length comes the descriptor of a file which only the judge reads. An answer is a frame of the
packed `Attempt`s of `dist_lm.sandbox.program`. Only the standard library is imported, and little of it, so that a cold
start is quick.
"""

from __future__ import annotations

import _signal  # pyright: ignore[reportMissingImports]
import gc
import marshal
import os
import select
import struct
import sys

from dist_lm.sandbox import confine, expansions, judge, languages
from dist_lm.sandbox.fenced import Fenced, leave_after
from dist_lm.sandbox.frames import JUDGED, read_exactly, receive_files, socketpair, write_frame
from dist_lm.sandbox.judging import Judges, Judging
from dist_lm.sandbox.turns import SESSION, Turns
from dist_lm.sandbox.watched import DONE, SIGKILL, TIMEOUT, TROUBLE, Watched

TYPE_CHECKING = False  # `typing` itself would take a third of a cold start
if TYPE_CHECKING:
    from typing import Any

# Modules that programs import most. Each module makes every fork slower. `threading` and `random` are not among them:
# they have work of their own after a fork, which takes as long as the fork itself.
PRELOADED = (
    *("site", "signal", "re", "collections", "functools", "itertools", "math", "string", "json", "heapq", "bisect"),
    *("operator", "typing", "datetime", "sqlite3"),
)
BUSY = 3  # exit code of a run whose judge has not come to the end of a test
TAIL_BYTES = 2_000


def main() -> None:
    """Serves requests on descriptor 0 until the other side has gone; ends the process with exit code 0.

    Arguments: descriptor to join a memory group with (-1: none), identity to become (0: none), Landlock version to use,
    seccomp, namespaces.

    Raises:
        OSError: the kernel refuses a fence.
    """
    group, identity, landlock, seccomp, namespaces = map(int, sys.argv[1:])
    if group >= 0:
        os.write(group, b"0")
        os.close(group)

    if identity:
        # bubblewrap as root covers parts of its /proc, and then the kernel lets no run mount one of its own.
        confine.mount_proc("")
    has_own_files = not namespaces or _own_files()  # without isolation, a fence around locks protects nobody
    if identity:
        confine.become(identity)
    elif namespaces:
        confine.drop_capabilities()
    if namespaces:
        confine.enter_user_namespace()

    # Programs and judges get other files as 0 to 5, so nothing of ours has these numbers.
    channel = os.dup2(0, 10)
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 3, 4, 5):
        os.dup2(null, descriptor)

    readable = _trees("/usr", "/bin", "/lib", "/lib64", "/etc", "/dev", sys.base_prefix)
    call_filters: tuple[bytes | None, bytes | None] = (None, None)
    if seccomp:
        machine = os.uname().machine
        of_program = confine.system_call_filter(machine, has_own_files)
        call_filters = of_program, confine.system_call_filter(machine, has_own_files, sends_files=True)
    fenced = Fenced(bool(namespaces), landlock, readable, call_filters)
    write_frame(channel, b"ready")
    unloaded = [*PRELOADED]
    judges = None
    is_first = True
    while _wait_for(channel, unloaded, is_first):
        is_first = False
        # The first byte says what begins: a session, or tests with or without a judge. The server reads no more.
        kind = os.read(channel, 1)
        fenced.prepare()
        control = -1
        if kind == JUDGED:
            judges, control = _judge_of_run(judges, fenced)
        status = _serve(channel, fenced, control, kind == SESSION)
        if status not in (0, BUSY):
            break

        # A judge that was forked before all modules were loaded would load them again for every test.
        if judges and (unloaded or status == BUSY):
            judges.close()
            judges = None
    os._exit(0)  # at once: there is nothing to tidy up


def _own_files() -> bool:
    """Gives this sandbox files and devices that no other one can lock or watch; returns whether it has the files.
    Without root the devices stay those of the host, which does not change the result.
    """
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


def _wait_for(channel: int, unloaded: list[str], is_first: bool) -> bool:
    """Waits for a request and returns whether one came, without reading it; False once the other side has gone.

    Meanwhile it imports modules of `unloaded` and removes them from the list. It imports at least one, except before
    the first run, which may be the only one. After the last module it freezes the objects of this process
    (`gc.freeze`).
    """
    poller = select.poll()
    poller.register(channel, select.POLLIN)
    is_late = not is_first
    while unloaded and (is_late or not poller.poll(0)):
        is_late = False
        name = unloaded.pop(0)
        __import__(name)
        if name == "site":
            languages.add_site_names()

        # A garbage collection after a fork would touch, and so copy, all objects of the server.
        if not unloaded:
            compile("0", "", "exec")  # makes the types of syntax trees
            expansions.prepare()
            gc.collect()
            gc.freeze()
    return not any(event & (select.POLLHUP | select.POLLERR) for _, event in poller.poll())


def _judge_of_run(judges: Judges | None, fenced: Fenced) -> tuple[Judges, int]:
    """Returns the judging process and its socket for a run; makes a new one if there is none, or it has ended.

    Raises:
        OSError: the kernel refuses a process, or the new one has ended.
    """
    if judges:
        try:
            return judges, judges.begin()
        except OSError:
            judges.close()
    judges = Judges(fenced)
    return judges, judges.begin()


def _serve(channel: int, fenced: Fenced, control: int, is_session: bool) -> int:
    """Makes one run, or one session, in processes below, waits for it, and returns its exit code; kills them if the
    other side goes.

    0 and BUSY: there is an answer; with BUSY, the judge has not come to the end of a test. Any other code: the run
    failed.

    Args:
        channel: socket to the harness.
        control: socket to the judge of the run, which is closed; -1: none.

    Raises:
        OSError: the kernel refuses a process.
    """
    child = fenced.fork()
    if child == 0:
        if is_session:
            leave_after(Turns(channel, fenced).answer)
        leave_after(_Run(channel, control, fenced).answer)
    if control >= 0:
        os.close(control)  # its end is the end of the run

    pidfd = os.pidfd_open(child)
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    poller.register(channel, 0)
    is_abandoned = any(file == channel for file, _ in poller.poll())
    if is_abandoned:
        os.kill(child, SIGKILL)
    os.close(pidfd)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return 1 if is_abandoned else status


class _Run:
    """Makes all attempts of one program, from the first process of new namespaces.

    Args:
        channel: socket to the harness.
        control: socket to the judge of the run; -1: no test has a judge.
    """

    def __init__(self, channel: int, control: int, fenced: Fenced) -> None:
        self.channel = channel
        self.control = control
        self.fenced = fenced
        self.judging: Judging | None = None
        self.is_judge_busy = False

    def answer(self) -> None:
        """Reads a request, makes its attempts and writes the answer; runs in the forked process.

        All tests share the CPU and wall seconds of the request: after a timeout the rest are not started, and count as
        timeouts. Ends the process with BUSY if the judge has not come to the end of the last test.

        Raises:
            OSError: the other side has gone, or the kernel refuses a namespace.
        """
        # The kernel lets a program signal the first process of its namespace where that has a handler: Python's for
        # SIGINT is the only one.
        _signal.signal(_signal.SIGINT, _signal.SIG_IGN)
        self.fenced.begin()
        length, files = receive_files(self.channel, 4)
        request = marshal.loads(read_exactly(self.channel, int.from_bytes(length, "big")))
        if files:
            self.judging = Judging(self.control, request, files[0])
            os.close(files[0])
        if self.fenced.namespaces:
            confine.dumpable(False)
        else:
            confine.adopt_orphans()

        limits = request["limits"]
        if self.judging:
            self.judging.wait()
        remaining_cpu_s, remaining_wall_s = limits["cpu_s"], limits["wall_s"]
        attempts = []
        for index in range(len(request["tests"])):
            if remaining_cpu_s <= 0 or remaining_wall_s <= 0:
                attempts.append((TIMEOUT, 0, False, 0.0, 0.0, b"", b""))
                continue

            if self.fenced.namespaces:
                confine.mount_tmp(limits["tmp_bytes"])
            attempt = self._attempt(request, index, remaining_cpu_s, remaining_wall_s)
            attempts.append(attempt)
            remaining_cpu_s -= attempt[3]
            remaining_wall_s -= attempt[4]
            if attempt[0] == TIMEOUT:
                remaining_cpu_s = 0.0
            if self.fenced.namespaces and index + 1 < len(request["tests"]):  # the last one goes with its namespace
                confine.unmount_tmp()
        write_frame(self.channel, b"".join(_packed(*attempt) for attempt in attempts))
        if self.is_judge_busy:
            os._exit(BUSY)

    def _attempt(self, request: dict[str, Any], index: int, cpu_s: float, wall_s: float) -> tuple:
        """Runs the test with this index.

        Returns (how it ended, exit code, whether its code passed, CPU seconds, wall seconds, stdout, tail of stderr).
        All its processes have ended then.

        Args:
            cpu_s, wall_s: seconds that are left to it.

        Raises:
            OSError: the kernel refuses a process or a file.
        """
        test = request["tests"][index]
        judging = self.judging if request["judged"][index] else None
        stdin_content = test["stdin"].encode(errors="surrogatepass")
        stdin = confine.sealed(stdin_content) if stdin_content else 0  # /dev/null
        pipes = [os.pipe() for _ in range(6 if judging else 3)]
        (stdout, stderr, trouble), of_judge = [w for _, w in pipes[:3]], [w for _, w in pipes[3:]]

        judge_end, program_end = socketpair() if judging else (-1, -1)
        if judging:
            judging.judge(index, [judge_end, *of_judge])
        child = os.fork()
        if child == 0:
            languages.be_program(
                self.fenced,
                request["folder"],
                request["limits"],
                (stdin, stdout, stderr, program_end, trouble),
                lambda: languages.RUN[request["language"]](test, request["source"], program_end >= 0),
            )
        for file in {stdin, stdout, stderr, trouble, *of_judge, judge_end, program_end} - {-1, 0}:
            os.close(file)

        read_ends = [read_end for read_end, _ in pipes]
        attempt = Watched(child, read_ends, request["limits"]["output_bytes"], cpu_s, wall_s, judging)
        try:
            attempt.watch(self.fenced.namespaces)
        finally:
            attempt.end(self.fenced.namespaces)
        if judging:
            self.is_judge_busy = attempt.ended != DONE
        return _facts(attempt)


def _facts(attempt: Watched) -> tuple:
    """Returns what the answer says of an attempt that has ended, see `_Run._attempt`.

    Output of the judge stands behind that of the program; trouble before the start is the outcome TROUBLE, with its
    reason in place of stderr.
    """
    stdout, stderr, trouble, *of_judge = attempt.read
    has_passed = False
    if of_judge:
        judge_stdout, judge_stderr, verdict = of_judge
        stdout, stderr = stdout + judge_stdout, stderr[-TAIL_BYTES:] + judge_stderr
        has_passed = verdict == judge.PASSED
    return (
        TROUBLE if trouble else attempt.ended,
        attempt.exit_code,
        has_passed,
        attempt.cpu_seconds,
        attempt.seconds,
        bytes(stdout),
        bytes((trouble or stderr)[-TAIL_BYTES:]),
    )


def _packed(ended: int, code: int, seen: bool, cpu: float, wall: float, stdout: bytes, tail: bytes) -> bytes:
    return struct.pack("!Bi?ddII", ended, code, seen, cpu, wall, len(stdout), len(tail)) + stdout + tail
