"""How long tests wait: a deadline only ends what hangs, so it grows with how slow and how busy the machine is.

Deadlines in tests are written for a quiet machine of the kind that REFERENCE_S was measured on. `patient` turns them
into seconds of this machine, by its speed when the tests began and by its load now.
"""

import hashlib
import os
import subprocess
import sys
import time
from functools import cache

REFERENCE_S = 0.02  # of `_work`, on an idle core of an AMD EPYC at 2.6 GHz
MOST = 20.0  # a larger factor would keep what hangs for hours


def patient(seconds: float) -> float:
    """`seconds` of a quiet machine, in seconds of this one: never fewer."""
    load_per_core = os.getloadavg()[0] / (os.cpu_count() or 1)
    return seconds * min(MOST, max(1.0, slowness(), load_per_core))


@cache
def slowness() -> float:
    """How many times as long as on the reference machine a fixed piece of work took, when this was first called."""
    started = time.perf_counter()
    _work()
    return (time.perf_counter() - started) / REFERENCE_S


def _work() -> None:
    """Start a process and compute, as tests do."""
    subprocess.run([sys.executable, "-I", "-S", "-c", ""], check=True)
    content = b"dist_lm" * 1000
    for _ in range(2000):
        content = hashlib.sha256(content).digest() * 200
