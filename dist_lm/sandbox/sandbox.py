"""Runs programs that nobody trusts: `with Sandbox() as sandbox: verdict = sandbox.run(program)`.

A sandbox is a server (`dist_lm.sandbox.inside`) in namespaces of bubblewrap: no network, a read-only system of /usr
and the interpreter only, an empty environment. For every run it forks into further namespaces with their own /tmp, so
no run meets another one. The kernel's Landlock and seccomp are a second fence where it has them.
"""

import contextlib
import itertools
import logging
import marshal
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import IO, Self

from dist_lm.errors import ConfigError
from dist_lm.sandbox import confine
from dist_lm.sandbox.environment import PATH
from dist_lm.sandbox.frames import JUDGED
from dist_lm.sandbox.memory_group import MemoryGroup
from dist_lm.sandbox.program import (
    Limits,
    Program,
    Verdict,
    attempts_of,
    infrastructure_error,
    request_of,
    verdict_of,
)
from dist_lm.sandbox.turns import END, SESSION, TURN

log = logging.getLogger(__name__)

END_S = 2.0  # a server whose channel is closed ends at once
TRIALS = 3  # trials of the fences, if one does not end
_BUSY = "^$|TimeoutError|Resource temporarily unavailable|Cannot allocate memory|Too many open files"  # "": no core
START_S = 60.0  # a machine under load takes seconds
GRACE_S = 60.0  # time for the server to answer, beyond the limits of a program
_CONTROL = "import time\nwhile time.process_time() < 0.1:\n    pass"  # source of a program of known cost
_MOST_SHARE = 0.5  # share of a core that the control needs, whatever the limits of the program
# The server's; imported ones come first.
_MODULES = (
    *("system_calls", "confine", "fenced", "frames", "watched", "values", "calls", "sql", "shared_files"),
    *("environment", "expansions"),
    *("bash", "languages", "judge", "judging", "interpreter", "turns", "inside"),
)
_SERVER = """
import marshal, os, sys
def read(size):
    data = b""
    while len(data) < size:
        data += os.read(0, size - len(data)) or sys.exit()
    return data
for name, code in marshal.loads(read(int.from_bytes(read(4), "big"))):
    module = sys.modules[name] = type(sys)(name)
    module.__path__ = []
    package, _, last = name.rpartition(".")
    if package:
        setattr(sys.modules[package], last, module)
    exec(code, module.__dict__)
module.main()
"""
"""Program of the server: it reads its modules from the channel, so that no file of ours is in the sandbox."""
_MOST_ANSWER = 64 << 20
_FIRST_UNUSED = 2_000_000_000  # no distribution gives out such user ids
_USERS = 400  # users of a process; the kernel has 4 million process ids, and 4 billion user ids
_HOW = (
    "install bubblewrap (`apt-get install bubblewrap`) and allow user namespaces (sysctl "
    "kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0; in a container also its "
    "seccomp profile), or run untrusted code without isolation: sandbox=trust_me"
)


class SandboxError(ConfigError):
    """Raised where no sandbox can be made."""


@dataclass(frozen=True)
class Fences:
    """The fences that keep a program in, on this machine."""

    namespaces: bool  # False: sandbox=trust_me without bubblewrap
    own_user: bool  # programs run as a user id that nothing else uses
    landlock: int  # version of the interface; 0: this kernel has none
    seccomp: bool
    memory_group: bool  # a cgroup limits the memory of all processes of a run together

    def describe(self) -> str:
        """Returns one line for people that says which fences there are and which are missing."""
        if not self.namespaces:
            return "sandbox: NO ISOLATION (sandbox=trust_me): programs see your files and the network"
        parts = ["namespaces, own /tmp, no network, limits"]
        if self.own_user:
            parts.append("own user")
        parts.append(f"Landlock {self.landlock}" if self.landlock else "no Landlock in this kernel")
        parts.append("seccomp" if self.seccomp else "no seccomp here")
        parts.append("memory by cgroup" if self.memory_group else "memory by process")
        return f"sandbox: {', '.join(parts)}"


@cache
def fences(trust_me: bool = False) -> Fences:
    """Returns the fences that this machine can enforce, tried out once with a program that must find itself shut in.

    With `trust_me` and no sandbox there are none but seccomp and limits. The answer is kept for the process; a trial
    may take a minute on a busy machine.

    Raises:
        SandboxError: a program could not be shut in, and `trust_me` is False; or this machine is too busy to tell.
    """
    # Only root may become another user.
    own_user = os.geteuid() == 0 and _unused_user(0) != 0
    seccomp = confine.has_seccomp()
    available = Fences(True, own_user, confine.landlock_version(), seccomp, MemoryGroup.possible())

    reason = "bubblewrap is not installed" if shutil.which("bwrap") is None else _leak(available)
    if not reason:
        return available
    if not trust_me:
        raise SandboxError(f"no sandbox for untrusted code on this machine: {reason.strip()}; {_HOW}")
    return Fences(False, False, 0, seccomp, False)


def _leak(fences: Fences) -> str:
    """Returns why a sandbox with these fences cannot be relied on; empty if it can. It runs up to TRIALS trials, more
    than one only if a trial has no verdict.

    Raises:
        SandboxError: no trial ended, because it ran out of time or the machine ran out of resources. That does not say
            that there is no sandbox here, so nobody's isolation may depend on it.
    """
    verdict = _trial(fences)
    for _ in range(TRIALS - 1):
        if verdict.outcome not in ("timeout", "infrastructure"):
            break
        verdict = _trial(fences)

    if verdict.outcome == "passed":
        return ""
    reason = f"a harmless program ended with {verdict.outcome}: {verdict.output}"
    if verdict.outcome == "timeout" or re.search(_BUSY, verdict.output):
        raise SandboxError(f"this machine is too busy to try out a sandbox: {reason.strip()}; start again")
    return reason


def _trial(fences: Fences) -> Verdict:
    sandbox = Sandbox(_fences=fences)
    try:
        return sandbox.run(Program("python", _CANARY), Limits(cpu_s=10, wall_s=60))
    finally:
        sandbox.close()


_CANARY = """
import os
assert os.getuid() == 1000, f"user {os.getuid()}"
assert sorted(name for name in os.listdir("/proc") if name.isdigit())[0] == "1", "processes of others"
assert not os.listdir("/tmp"), "files of others"
assert not os.path.exists("/etc/passwd"), "the system's files"
for place in ("/", "/usr", "/dev"):
    assert os.statvfs(place).f_flag & os.ST_RDONLY, f"{place} is writable"
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
assert int(status["CapBnd"], 16) == int(status["CapEff"], 16) == 0 and int(status["NoNewPrivs"]) == 1, "capabilities"
names = [line.split(":")[0].strip() for line in open("/proc/self/net/dev") if ":" in line]
assert set(names) <= {"lo", "sit0", "tunl0", "ip6tnl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0"}, names
"""


class Sandbox:
    """A sandbox that runs one program at a time. Not for several threads at once: see `dist_lm.sandbox.pool`.

    A server that fails is replaced at the next run. All processes end with the `with` block, and with this process.

    Args:
        trust_me: run programs without isolation where the machine allows none (limits still hold).
        alone: held while a program without a verdict runs a second time; no other program should run meanwhile.
    """

    def __init__(
        self,
        trust_me: bool = False,
        *,
        alone: Callable[[], AbstractContextManager[object]] = nullcontext,
        _fences: Fences | None = None,
    ) -> None:
        self._trust_me = trust_me
        self._alone = alone
        self._fences = _fences
        self._server: _Server | None = None

    def __enter__(self) -> Self:
        """Raises SandboxError if no sandbox can be made here."""
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, program: Program, limits: Limits | None = None) -> Verdict:
        """Runs all tests of a program, waits for them and returns the verdict. Starts the sandbox if there is none.

        Never raises for what the program does. A program whose sandbox fails, or that had no core, runs once more,
        before and after a control program of known cost. The outcome is `infrastructure` only if the control fails
        too, so that no program can choose it.

        Raises:
            SandboxError: no sandbox can be made here.
        """
        limits = limits or Limits()
        verdict = self._run_once(program, limits)
        if verdict.judged:
            return verdict
        with self._alone():
            return self._run_again(program, limits, verdict)

    def _run_once(self, program: Program, limits: Limits) -> Verdict:
        """Runs a program and returns the verdict. If the sandbox fails, the outcome is `infrastructure` and the next
        run starts another one.

        Raises:
            SandboxError: no sandbox can be made here.
        """
        try:
            return verdict_of(program, attempts_of(self._start().ask(program, limits)))
        except SandboxError:
            raise
        except (OSError, ValueError) as error:
            self.close()
            return infrastructure_error(program, f"{type(error).__name__}: {error}")

    def _run_again(self, program: Program, limits: Limits, first: Verdict) -> Verdict:
        """Returns the verdict of a second run, or `first` if the machine gives a control program no core either.

        The control runs before and after the program: beside it, the program's own processes would starve it. A program
        that has no verdict although the control has one both times fails, as a timeout or as `failed`, with a warning
        in the log.

        Raises:
            SandboxError: no sandbox can be made here.
        """
        if not self._control_passes(limits):
            return first
        second = self._run_once(program, limits)
        if second.judged or not self._control_passes(limits):
            return second

        log.warning("a program has no verdict twice, where a control has one; it counts as failed: %s", second.output)
        return replace(second, outcome="timeout" if second.seconds >= limits.wall_s else "failed")

    def _control_passes(self, limits: Limits) -> bool:
        """Runs a program of known cost in this sandbox and returns whether the machine has cores for programs with
        these limits.

        With a smaller share of a core than CPU by wall seconds, no program can use its CPU seconds.

        Raises:
            SandboxError: no sandbox can be made here.
        """
        control = self._run_once(Program("python", _CONTROL), Limits(cpu_s=1.0, wall_s=10.0))
        needed_share = min(_MOST_SHARE, limits.cpu_s / limits.wall_s)
        return control.outcome == "passed" and control.cpu_seconds >= needed_share * control.seconds

    def begin_session(self, language: str, limits: Limits, cpu_s: float) -> None:
        """Begins a session, in which `ask_turn` runs code; until `end_session` the sandbox runs nothing else.

        Args:
            limits: of each turn.
            cpu_s: CPU seconds of all turns.

        Raises:
            SandboxError: no sandbox can be made here.
            OSError: the sandbox failed; close it.
        """
        self.end_session()
        self._start().begin_session(language, limits, cpu_s)

    def ask_turn(self, code: bytes, wall_s: float) -> bytes:
        """Runs code in the session and returns the answer of `dist_lm.sandbox.turns`.

        Raises:
            OSError: the sandbox failed; close it.
        """
        assert self._server, "begin_session comes first"
        return self._server.ask_turn(code, wall_s)

    def end_session(self) -> None:
        """Ends the session with all its processes and files; a sandbox that cannot is closed."""
        try:
            if self._server:
                self._server.end_session()
        except OSError:
            self.close()

    def control_passes(self, limits: Limits) -> bool:
        """Returns whether this machine has cores for programs with these limits; see `_control_passes`."""
        return self._control_passes(limits)

    def close(self) -> None:
        """Ends the sandbox and the program that runs in it."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def _start(self) -> "_Server":
        if self._server is None:
            self._fences = self._fences or fences(self._trust_me)
            self._server = _Server(self._fences)
        return self._server


class _Server:
    """The process in the sandbox, and the channel to it."""

    def __init__(self, fences: Fences) -> None:
        # `at_close` is for resources of the server's life, `at_start` for those that only its start needs.
        with contextlib.ExitStack() as at_close, contextlib.ExitStack() as at_start:
            self._errors: IO[bytes] = at_close.enter_context(tempfile.TemporaryFile())
            self._folder = None
            if not fences.namespaces:
                self._folder = at_close.enter_context(tempfile.TemporaryDirectory(prefix="dist_lm-program-"))

            self._group = MemoryGroup.make() if fences.memory_group else None
            entrance = -1
            if self._group:
                at_close.callback(self._group.remove)
                entrance = self._group.entrance()
                at_start.callback(os.close, entrance)

            self._channel, server_end = socket.socketpair()
            at_close.enter_context(self._channel)
            at_start.enter_context(server_end)
            self._process = subprocess.Popen(
                _command(fences, entrance),
                stdin=server_end.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                env=_environment(),
                cwd="/",
                start_new_session=True,
                pass_fds=[entrance] if self._group else [],
            )
            # From here on `close` ends them; an error above has ended them all.
            self._at_close = at_close.pop_all()

        code = _server_code()
        self._channel.settimeout(GRACE_S)
        with contextlib.suppress(OSError):  # the server has ended: the first request finds out why
            self._channel.sendall(len(code).to_bytes(4, "big") + code)
        self._ready = False
        self._is_in_session = False

    def ask(self, program: Program, limits: Limits) -> bytes:
        """Sends a program, waits and returns the answer, which `attempts_of` reads.

        Waits for START_S seconds for a server that has just started, then for the wall seconds of `limits` and GRACE_S.
        Files that the program left in a shared folder are removed.

        Raises:
            OSError: the server ended, or did not answer in time (TimeoutError).
        """
        if self._group:
            self._group.limit(limits.memory_bytes + limits.tmp_bytes)

        request, for_judge = request_of(program, limits, self._folder or "/tmp")
        self._channel.settimeout(GRACE_S)
        length = len(request).to_bytes(4, "big")
        if for_judge:
            self._channel.sendall(JUDGED)
            # Tests travel in a file of their own, which the judge alone reads.
            file = confine.sealed(for_judge)
            try:
                socket.send_fds(self._channel, [length], [file])
            finally:
                os.close(file)
            self._channel.sendall(request)
        else:
            self._channel.sendall(b"-" + length + request)
        self._wait_until_ready()
        answer = self._receive(limits.wall_s + GRACE_S)

        self._clear_folder()
        return answer

    def begin_session(self, language: str, limits: Limits, cpu_s: float) -> None:
        """Sends the request for a session. Raises as `ask`."""
        if self._group:
            self._group.limit(limits.memory_bytes + limits.tmp_bytes)
        request = {"language": language, "limits": vars(limits), "session_cpu_s": cpu_s}
        content = marshal.dumps({**request, "folder": self._folder or "/tmp"})
        self._channel.settimeout(GRACE_S)
        self._channel.sendall(SESSION + len(content).to_bytes(4, "big") + content)
        self._is_in_session = True
        self._wait_until_ready()

    def ask_turn(self, code: bytes, wall_s: float) -> bytes:
        """Sends the code of a turn and returns the answer. Raises as `ask`."""
        self._channel.settimeout(GRACE_S)
        self._channel.sendall(TURN + len(code).to_bytes(4, "big") + code)
        return self._receive(wall_s + GRACE_S)

    def end_session(self) -> None:
        """Ends the session, if there is one; raises OSError if the server has ended."""
        if not self._is_in_session:
            return
        self._is_in_session = False
        self._channel.settimeout(GRACE_S)
        self._channel.sendall(END)
        self._clear_folder()

    def _wait_until_ready(self) -> None:
        if not self._ready and self._receive(START_S) != b"ready":
            raise OSError("no sandbox answers")
        self._ready = True

    def _clear_folder(self) -> None:
        """Removes what programs left: without namespaces, all runs of a server share a folder."""
        if self._folder:
            for path in Path(self._folder).iterdir():
                # A link goes, and what it leads to stays: that is no file of the program.
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def _receive(self, timeout_s: float) -> bytes:
        self._channel.settimeout(timeout_s)
        length = int.from_bytes(self._exactly(4), "big")
        if length > _MOST_ANSWER:
            raise OSError(f"an answer of {length} bytes")
        return self._exactly(length)

    def _exactly(self, length: int) -> bytes:
        """Returns `length` bytes of the channel.

        Raises:
            OSError: the server ended, with its last words, or the timeout has passed.
        """
        data = bytearray()
        while len(data) < length:
            piece = self._channel.recv(min(length - len(data), 1 << 20))
            if not piece:
                raise OSError(f"the sandbox ended. {self._last_words()}")
            data += piece
        return bytes(data)

    def _last_words(self) -> str:
        self._errors.seek(0)
        return self._errors.read(2_000).decode(errors="replace").strip()

    def close(self) -> None:
        """Ends the server and all processes below it."""
        self._channel.close()  # then the server ends by itself, with the program that runs
        is_over = self._process.poll() is not None  # then its number may be another process's
        if not is_over and not _ends_within(self._process.pid, END_S):
            self._process.kill()
        self._process.wait()
        self._at_close.close()


def _ends_within(pid: int, seconds: float) -> bool:
    """Waits up to `seconds` for a child and returns whether it has ended, without reading its exit code.

    `Popen.wait` with a limit polls at growing intervals.
    """
    descriptor = os.pidfd_open(pid)
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    try:
        return bool(poller.poll(seconds * 1000))
    finally:
        os.close(descriptor)


def _environment() -> dict[str, str]:
    """Returns all variables of a server's environment: the verdict must not depend on the caller's."""
    fixed = {"PATH": PATH, "HOME": "/tmp", "TMPDIR": "/tmp"}
    return {**fixed, "LC_ALL": "C.UTF-8", "TZ": "UTC", "PYTHONHASHSEED": "0"}


def _command(fences: Fences, entrance: int) -> list[str]:
    """Returns the command line of the server, in bubblewrap if there are namespaces.

    Args:
        entrance: descriptor to join the memory group with; -1: none.
    """
    identity = _unused_user(next(_number)) if fences.own_user else 0
    arguments = (entrance, identity, fences.landlock, int(fences.seccomp), int(fences.namespaces))
    interpreter = [_interpreter(), "-s", "-S", "-P", "-B", "-c", _SERVER, *map(str, arguments)]
    if not fences.namespaces:
        return interpreter

    bwrap = shutil.which("bwrap")
    assert bwrap is not None
    return [bwrap, *_bubblewrap_options(fences), "--", *interpreter]


@cache
def _server_code() -> bytes:
    """Returns the modules of the server, compiled once: where Python stores no bytecode, every start would compile."""
    folder = Path(__file__).resolve().parent
    sources = {"dist_lm": b"", "dist_lm.sandbox": b""}
    sources |= {f"dist_lm.sandbox.{name}": (folder / f"{name}.py").read_bytes() for name in _MODULES}
    # These names let `languages` leave our frames out of the tracebacks of programs.
    code = [(name, compile(text, f"<{name}>", "exec", dont_inherit=True)) for name, text in sources.items()]
    return marshal.dumps(code)


def _interpreter() -> str:
    # A virtual environment lies outside the folders that the sandbox shows.
    return getattr(sys, "_base_executable", None) or sys.executable


def _bubblewrap_options(fences: Fences) -> list[str]:
    """Returns bubblewrap's options: a read-only system with the interpreter, no network, an empty /tmp, a small /dev.

    Args:
        fences: `own_user` keeps the capabilities by which the server becomes another user, else a user namespace is
            made.
    """
    options = ["--die-with-parent", "--unshare-pid", "--unshare-ipc", "--unshare-net", "--unshare-uts"]
    options += ["--hostname", "sandbox"]
    options += ["--unshare-cgroup-try", "--cap-drop", "ALL"]
    if fences.own_user:
        names = ["CAP_SETUID", "CAP_SETGID", "CAP_SYS_ADMIN"]  # given up before the first program
        if _may_make_devices():
            names.append("CAP_MKNOD")
        for name in names:
            options += ["--cap-add", name]
        options += ["--perms", "0755", "--dir", "/proc"]
    else:
        options += ["--unshare-user", "--proc", "/proc", "--cap-add", "CAP_SYS_ADMIN"]  # for `confine.own_files`

    # The system's programs and libraries, and the interpreter, are all that can be read.
    for path in ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32"):
        if os.path.islink(path):
            options += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            options += ["--ro-bind", path, path]
    options += _folders(Path("/etc/alternatives"))  # Debian's awk is a link into it
    for path in ("/etc/alternatives", "/etc/ld.so.cache"):
        options += ["--ro-bind-try", path, path]
    prefix = Path(sys.base_prefix).resolve()
    if not prefix.is_relative_to("/usr"):
        options += [*_folders(prefix), "--ro-bind", str(prefix), str(prefix)]

    options += ["--perms", "0755", "--dir", "/dev", "--perms", "0755", "--dir", "/etc"]
    for name in confine.DEVICES:
        options += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    for name, target in confine.DEVICE_LINKS.items():
        options += ["--symlink", target, f"/dev/{name}"]
    return [*options, "--perms", "0755", "--dir", "/tmp", "--remount-ro", "/", "--chdir", "/"]


def _may_make_devices() -> bool:
    """Returns whether this process has CAP_MKNOD, which bubblewrap can hand on then."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return bool(int(status["CapEff"], 16) >> 27 & 1)


def _folders(path: Path) -> list[str]:
    """Returns options that make the folders above `path`, open to every user; bubblewrap's own are for root only."""
    parents = [str(parent) for parent in reversed(path.parents) if str(parent) != "/"]
    return [option for parent in parents for option in ("--perms", "0755", "--dir", parent)]


_number = itertools.count()


def _unused_user(number: int) -> int:
    """Returns a user id that no account and no process uses; 0 if this namespace has none. It differs between processes
    and between the numbers of sandboxes, except in a small namespace, where it is the highest one.

    The kernel counts pipes, and files on their way in sockets, by user.
    """
    ranges = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    highest = max(first + count - 1 for first, _, count in ranges)
    if highest > 2 * _FIRST_UNUSED:
        return _FIRST_UNUSED + os.getpid() * _USERS + number % _USERS
    return highest
