"""Limits the memory of all processes of a sandbox together by a cgroup, where this process may make one.

A group that cannot be removed, or whose process was killed, is removed when the next one is made.
"""

import itertools
import os
import time
from functools import cache
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_BASE_BYTES = 64 << 20  # for the server, its copies, and the kernel's own data of their namespaces
REMOVE_S = 0.5
_NAME = "dist_lm-{process}-{number}"
_number = itertools.count()
_busy: set[Path] = set()


class MemoryGroup:
    """A cgroup of version 1 or 2."""

    def __init__(self, path: Path, limit_file: str) -> None:
        self._path = path
        self._limit = path / limit_file
        self._limited = 0

    @classmethod
    def possible(cls) -> bool:
        """Returns whether this process may make such groups; it makes one and removes it."""
        group = None
        try:
            group = cls.make()
            group.limit(1 << 30)
        except OSError:
            return False
        finally:
            if group is not None:
                group.remove()
        return True

    @classmethod
    def make(cls) -> "MemoryGroup":
        """Makes a group below that of this process, without a limit so far; removes groups that were left before.

        Raises:
            OSError: this process may make none.
        """
        parent, limit_file = _parent()
        _remove_left_groups(parent)
        path = parent / _NAME.format(process=os.getpid(), number=next(_number))
        path.mkdir()
        return cls(path, limit_file)

    def entrance(self) -> int:
        """Returns an open descriptor: the process that writes "0" to it, while it has one thread, is moved into the
        group.

        Version 1 moves a thread at once. Moving a process waits until no core forks, which takes 10 ms; version 2
        cannot do otherwise.
        """
        threads = self._path / "tasks"
        return os.open(threads if threads.exists() else self._path / "cgroup.procs", os.O_WRONLY)

    def limit(self, program_bytes: int) -> None:
        """Sets the memory that a program may use, all its processes together, in bytes."""
        if program_bytes != self._limited:  # the kernel takes its time
            self._limit.write_text(str(program_bytes + _BASE_BYTES))
            self._limited = program_bytes

    def remove(self) -> None:
        """Removes the group, or gives up without an error after REMOVE_S seconds: killed processes hold it until they
        have ended. Then a later `make` removes it."""
        deadline = time.monotonic() + REMOVE_S
        while not _removed(self._path):
            if time.monotonic() > deadline:
                _busy.add(self._path)
                return
            time.sleep(0.001)


def _removed(group: Path) -> bool:
    """Removes a group and returns whether it has gone; a process may still hold it."""
    try:
        group.rmdir()
    except OSError:
        return not group.exists()
    return True


@cache
def _parent() -> tuple[Path, str]:
    """Returns the folder of this process's group with memory limits, and the name of the file with the limit in a
    group.

    Raises:
        OSError: there is none, or it hands memory limits to no groups below.
    """
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        # Version 1 has a tree for each controller, version 2 a single tree without a name.
        if "memory" in controllers.split(","):
            return _CGROUPS / "memory" / path.lstrip("/"), "memory.limit_in_bytes"
        if not controllers:
            group = _CGROUPS / path.lstrip("/")
            delegated = group / "cgroup.subtree_control"
            if delegated.is_file() and "memory" in delegated.read_text().split():
                return group, "memory.max"
    raise OSError("no memory controller")


def _remove_left_groups(parent: Path) -> None:
    """Removes groups of this process that were busy, and those of processes that have gone."""
    for group in parent.glob(_NAME.format(process="*", number="*")):
        process = group.name.split("-")[1]
        if (group in _busy or not os.path.exists(f"/proc/{process}")) and _removed(group):
            _busy.discard(group)
