"""The fences around the processes of a run: those of `dist_lm.sandbox.confine`, as this sandbox has them.

This module runs inside the sandbox. Only the standard library is imported, and little of it.
"""

from __future__ import annotations

import os
import resource

from dist_lm.sandbox import confine

TYPE_CHECKING = False  # `typing` itself would take a third of a cold start
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, NoReturn

_WRITABLE = ("/dev/null",)
_MOST_RUNS = 500  # runs that share rules: each leaves rules for a /tmp and a /proc that are no more
_ANY = {"cpu_s": 0, "memory_bytes": 0, "file_bytes": 0, "files": 0, "processes": 0}


def leave_after(work: Callable[..., None], *arguments: Any) -> NoReturn:
    """Calls `work` in this forked process and ends it, with code 0, or with code 1 and a line on standard error if
    `work` raises."""
    code = 1
    try:
        work(*arguments)
        code = 0
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode(errors="replace")[:500])
    finally:
        os._exit(code)


class Fenced:
    """Confines the first process of new namespaces, and the processes below it.

    Args:
        namespaces: whether every run gets new namespaces; else only limits and system calls are fenced.
        landlock: version of Landlock; 0: none.
        readable: trees that processes may read.
        system_calls: filters of system calls for programs and for judges; None: none.
    """

    def __init__(
        self, namespaces: bool, landlock: int, readable: Sequence[str], system_calls: tuple[bytes | None, bytes | None]
    ) -> None:
        self.namespaces = namespaces
        self._landlock = landlock
        self._readable = readable
        self._system_calls, self._system_calls_of_judges = system_calls
        self._rules: confine.FileRules | None = None
        self._num_runs = 0
        self._hard = {name: resource.getrlimit(name)[1] for name in _resource_limits(_ANY, namespaces)}

    def fork(self) -> int:
        """Forks into new namespaces, if there are any. Returns the child's pid; 0 in the child.

        Raises:
            OSError: the kernel refuses the fork.
        """
        if self.namespaces:
            return confine.fork_into_namespaces(is_filtered=self._system_calls is not None)
        return os.fork()

    def begin(self) -> None:
        """Prepares this process, the child of `fork`: the kernel kills it when its parent ends. With namespaces it also
        mounts a /proc of its own.

        Raises:
            OSError: the kernel refuses.
        """
        confine.end_with_parent()
        if self.namespaces:
            confine.mount_proc()

    def prepare(self) -> None:
        """Does what this process and those below it need for `confine`, once for many runs; to be called before each
        run.

        At the first run this process and those below it lose the right to gain capabilities. Landlock's rules are made
        anew after _MOST_RUNS runs.

        Raises:
            OSError: the kernel refuses.
        """
        if self._num_runs == 0:
            confine.gain_no_capabilities()  # Landlock and seccomp need it
        self._num_runs += 1
        if self._landlock and (self._rules is None or self._num_runs % _MOST_RUNS == 0):
            if self._rules:
                self._rules.close()
            self._rules = confine.FileRules(self._landlock, self._readable)
            self._rules.add(writable=_WRITABLE)

    def limit(self, limits: dict[str, Any]) -> None:
        """Limits this process, which is confined already, for good."""
        confine.limit(_resource_limits(limits, self.namespaces), self._hard)

    def limit_memory(self, most: int) -> None:
        """Limits the memory of this process in bytes, until it does so again."""
        hard = self._hard[resource.RLIMIT_AS]
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))

    def confine(
        self, folder: str, limits: dict[str, Any] | None = None, badness: int = 1000, is_judge: bool = False
    ) -> None:
        """Confines this process for good, and those that it starts: working directory, limits, capabilities, files,
        system calls. `prepare` must come before.

        Args:
            limits: those of the request (`program.Limits`); None: none, so far.
            folder: working directory, the only tree that may be written.
            badness: the process with the highest number ends first when memory is short.
            is_judge: whether this process judges: it sends files to the first process of a run, and its tests may run
                files of a program.

        Raises:
            OSError: the kernel refuses.
        """
        # First, because the rules below leave nothing else writable but the folder and /dev/null.
        confine.write("/proc/self/oom_score_adj", str(badness))
        os.chdir(folder)
        if is_judge and self.namespaces:
            confine.close_proc()
        if limits:
            self.limit(limits)
        confine.drop_capabilities()
        if self._rules:
            self._rules.add(("/proc",), (folder,))  # those that are mounted here now
            self._rules.restrict()
        call_filter = self._system_calls_of_judges if is_judge else self._system_calls
        if call_filter:
            confine.filter_system_calls(call_filter)


def _resource_limits(limits: dict[str, Any], namespaces: bool) -> dict[int, int]:
    """Returns the limits of one process, resource -> most, from those of the request."""
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
        resource_limits[resource.RLIMIT_NPROC] = (
            limits["processes"] + 5
        )  # and two servers, judge, first process, program
    return resource_limits
