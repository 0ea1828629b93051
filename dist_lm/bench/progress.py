"""Progress of a benchmark, for people who wait for it."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console

from dist_lm.tracking.readable import say

SAY_EVERY_S = 10.0  # seconds between lines where the output is no terminal


@contextmanager
def progress(
    console: Console, errors: TextIO | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[str], None]]:
    """Yields a function that says what is being done: in one line of a terminal, which it replaces; elsewhere as a line
    on `errors` (standard error) with the seconds since the start, the first at once and others when `SAY_EVERY_S` have
    passed since the last.

    Args:
        clock: seconds.
    """
    if console.is_terminal:
        with console.status("") as status:
            yield status.update
        return

    began = clock()
    last_line = -math.inf

    def tell(text: str) -> None:
        nonlocal last_line
        now = clock()
        if now - last_line >= SAY_EVERY_S:
            last_line = now
            say(f"{now - began:4.0f} s  {text}", errors or sys.stderr)

    yield tell
