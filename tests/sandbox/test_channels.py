"""Sandboxes cannot signal each other, or the host, by locks of the files that they share."""

import fcntl
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from dist_lm.sandbox.program import Limits, Program, Verdict
from dist_lm.sandbox.sandbox import Sandbox, fences
from tests.patience import patient
from tests.sandbox.as_user import ask, user_process

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
LIMITS = Limits(cpu_s=2, wall_s=patient(10))
FILES = ("/usr/bin/env", "/usr/bin", "/etc/ld.so.cache", "/etc/alternatives", os.path.realpath(sys.base_prefix))
DEVICES = ("/dev/null", "/dev/urandom")
LOOKS = """
import fcntl, os, struct
LOCK = "hhqqi"
for path in {paths!r}:
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        continue
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("flock", path)
    except PermissionError:
        pass
    if not os.path.isdir(path):
        asked = struct.pack(LOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        if struct.unpack(LOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK:
            print("lock", path)
"""


@pytest.fixture(params=["root", "user", "namespaces"])
def run(request, tmp_path: Path) -> Iterator[Callable[[Program, Limits], Verdict]]:
    if request.param == "user":
        if os.geteuid():
            pytest.skip("needs root")
        with user_process(tmp_path) as process:
            yield lambda program, limits: ask(process, program, limits)
            assert process.stdin
            process.stdin.close()
        return
    available = fences()
    if request.param == "namespaces":
        available = replace(available, landlock=0, seccomp=False)
    with Sandbox(_fences=available) as sandbox:
        yield sandbox.run


@pytest.fixture
def locked() -> Iterator[None]:
    """Locks of this process, as a neighbour's would be, on all that sandboxes share."""
    with ExitStack() as stack:
        for path in (*FILES, *DEVICES):
            if not Path(path).exists():
                continue
            file = os.open(path, os.O_RDONLY)
            stack.callback(os.close, file)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not Path(path).is_dir():
                fcntl.fcntl(file, fcntl.F_SETLK, struct.pack("hhqqi", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))
        yield


@pytest.mark.usefixtures("locked")
def test_locks_of_others_are_not_seen(run, request):
    paths = FILES
    if os.geteuid() == 0 and "user" not in request.node.name:  # others have the devices of the host
        paths = (*FILES, *DEVICES)
    verdict = run(Program("python", LOOKS.format(paths=paths)), LIMITS)
    assert (verdict.outcome, verdict.stdout) == ("passed", ("",)), verdict


def test_locks_of_a_program_hold_inside_it(run):
    source = """
exec 9>/tmp/lock
flock -n 9 || echo mine
(exec 8>/tmp/lock; flock -n 8 && echo shared)
echo done
"""
    verdict = run(Program("bash", source), LIMITS)
    assert (verdict.outcome, verdict.stdout) == ("passed", ("done\n",)), verdict
