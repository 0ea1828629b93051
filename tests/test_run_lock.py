"""One writer a run, by the operating system's own lock."""

import os
import signal
import subprocess
import sys

import pytest

from dist_lm.errors import ArtefactError
from dist_lm.run_lock import locked

HOLD = (
    "import sys, pathlib; from dist_lm.run_lock import locked\nwith locked(pathlib.Path(sys.argv[1])): print(); input()"
)


def test_a_second_writer_is_refused_by_name_and_a_killed_one_lets_go(tmp_path):
    path = tmp_path / ".lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(ArtefactError, match=rf"in use by process {holder.pid} on "), locked(path):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait(timeout=10)
    with locked(path):
        assert f"process {os.getpid()}" in path.read_text()
