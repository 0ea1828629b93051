"""Collection of garbage at the same steps on all ranks.

Python collects whenever enough objects have been made, so on many ranks some rank pauses in almost every step, and all
others wait for it. Here all ranks pause after the same steps, and scan only what training has made.
"""

import gc
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

log = logging.getLogger(__name__)

COLLECT_EVERY = 50  # steps between collections of garbage


@contextmanager
def without_collection() -> Iterator[None]:
    """Turns automatic collection off inside the block, for the whole process."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class ScheduledCollection:
    """A context manager that turns automatic collection off inside its block, for the whole process.

    Afterwards the collector is as it was before, also after an error: other stages may run in the process.
    """

    def __init__(self) -> None:
        self._was_enabled = False
        self._froze = False
        self._is_cost_known = False

    def __enter__(self) -> Self:
        self._was_enabled = gc.isenabled()
        gc.disable()
        gc.collect()

        # Collections scan what set-up has left no more. What somebody else has frozen could not be told apart later.
        self._froze = gc.get_freeze_count() == 0
        if self._froze:
            gc.freeze()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._froze:
            gc.unfreeze()
        if self._was_enabled:
            gc.enable()

    def after_step(self, step: int) -> None:
        """Collects if it is due after `step` completed steps; the first time, logs what that costs."""
        if step % COLLECT_EVERY:
            return
        started = time.perf_counter()
        gc.collect()

        if not self._is_cost_known:
            self._is_cost_known = True
            elapsed_ms = 1000 * (time.perf_counter() - started)
            log.info("garbage is collected every %d steps: the first time took %.1f ms", COLLECT_EVERY, elapsed_ms)

    @contextmanager
    def automatic(self) -> Iterator[None]:
        """Lets Python collect as before inside the block: for long work between steps, such as an evaluation."""
        if self._was_enabled:
            gc.enable()
        try:
            yield
        finally:
            gc.disable()
