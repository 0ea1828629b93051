"""Memory groups: what a start that fails, and a busy group, leave behind."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from dist_lm.sandbox import memory_group
from dist_lm.sandbox import sandbox as module
from dist_lm.sandbox.memory_group import MemoryGroup
from dist_lm.sandbox.program import Program
from dist_lm.sandbox.sandbox import Sandbox, fences

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")


def test_a_start_that_fails_leaves_no_group_and_no_descriptor(monkeypatch):
    def fail(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    one = Sandbox(_fences=fences())
    with monkeypatch.context() as patch:
        patch.setattr(module.subprocess, "Popen", fail)
        groups, descriptors = own_groups(), open_descriptors()
        assert one.run(Program("python", "")).outcome == "infrastructure"
        assert set(own_groups()) <= set(groups)
        assert open_descriptors() <= descriptors
    assert one.run(Program("python", "")).outcome == "passed"
    one.close()


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def own_groups() -> list[Path]:
    return groups_of(os.getpid()) if fences().memory_group else []


def groups_of(process: int) -> list[Path]:
    parent, _ = memory_group._parent()
    return sorted(parent.glob(f"dist_lm-{process}-*"))


def test_groups_that_were_busy_are_removed_with_the_next(monkeypatch):
    if not fences().memory_group:
        pytest.skip("no cgroup here that this process may use")
    group = MemoryGroup.make()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rmdir", failing_rmdir)
        patch.setattr(memory_group, "REMOVE_S", 0.0)
        group.remove()
    assert group._path.exists()
    MemoryGroup.make().remove()
    assert not group._path.exists()


def failing_rmdir(path: Path) -> None:
    raise OSError(errno.EBUSY, "busy", str(path))
