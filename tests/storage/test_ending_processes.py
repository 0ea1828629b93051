import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from dist_lm.storage import process

DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"


@pytest.fixture
def deaf() -> Iterator[subprocess.Popen[bytes]]:
    """A process that ignores SIGTERM."""
    with subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            yield child
        finally:
            child.kill()


def test_a_process_that_is_found_no_more_is_waited_for(deaf):
    """Fault: a process that is ending has lost its mark, and its devices were taken for free."""
    looks = iter([[psutil.Process(deaf.pid)]])

    assert process.end(lambda: next(looks, []), grace_s=0.2) == []

    assert deaf.poll() == -signal.SIGKILL
