"""How far the anonymous memory of this process rises while something runs; reads /proc."""

import threading
import time
from collections.abc import Callable
from pathlib import Path


def rise_of(work: Callable[[], object]) -> int:
    """Bytes by which RssAnon rises above its value at the start, at most, while `work` runs."""
    before = peak = _anonymous()
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.is_set():
            peak = max(peak, _anonymous())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        work()
    finally:
        ended.set()
        watcher.join()
    return peak - before


def _anonymous() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10
