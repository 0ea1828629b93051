"""The live view on a terminal: a thread draws it a few times a second, whatever else is printed goes above it."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TextIO, cast

from rich.console import Console
from rich.text import Text

from dist_lm.tracking.live.glyphs import glyphs_for
from dist_lm.tracking.live.region import Region
from dist_lm.tracking.live.state import LiveState
from dist_lm.tracking.live.view import view_lines

DRAW_S = 0.25


class LiveView:
    """Draws a `LiveState` while the block lasts; hold `lock` to change the state."""

    def __init__(self, console: Console, state: LiveState, clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing is drawn before the block is entered.

        Args:
            console: rich's, of the terminal.
            clock: that of the state, s.
        """
        self.lock = threading.RLock()  # a signal may print while its own thread draws
        self.state = state
        self.clock = clock
        self._console = console
        self._glyphs = glyphs_for(console.encoding)
        self._region = Region(console.file)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="live view", daemon=True)
        self._guarded: list[tuple[str, TextIO]] = []

    def __enter__(self) -> "LiveView":
        for name in ("stdout", "stderr"):
            stream: TextIO = getattr(sys, name)
            if stream.isatty():
                self._guarded.append((name, stream))
                setattr(sys, name, Above(stream, self))
        self.draw()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        try:
            self._thread.join()
        finally:  # also where a second Ctrl-C comes while that is waited for
            for name, stream in self._guarded:
                cast(Above, getattr(sys, name)).finish()
                setattr(sys, name, stream)
            with self.lock:
                self._region.erase(self._console.size.width)

    def draw(self) -> None:
        """Draw it as it is now."""
        with self.lock:
            if self._over.is_set():
                return
            width, height = self._console.size
            # the last column stays free, and so does a row: for the command line that was given, or the last message
            lines = view_lines(self.state, self.clock(), width - 1, height - 1, self._glyphs)
            self._region.draw([self._escaped(line) for line in lines], [line.cell_len for line in lines], width)

    @contextmanager
    def above(self) -> Iterator[None]:
        """What is printed in the block, whole lines, stays above the view."""
        with self.lock:
            self._region.erase(self._console.size.width)
            try:
                yield
            finally:
                self.draw()

    def _escaped(self, line: Text) -> str:
        with self._console.capture() as captured:
            self._console.print(line, end="", soft_wrap=True)
        return captured.get()

    def _work(self) -> None:
        while not self._over.wait(DRAW_S):
            try:
                self.draw()
            except OSError:  # the terminal is gone: whoever prints next says so, and the work itself needs no view
                return


class Above:
    """A standard stream whose whole lines are printed above a view."""

    def __init__(self, stream: TextIO, view: LiveView) -> None:
        self._stream = stream
        self._view = view
        self._line = ""

    def write(self, text: str) -> int:
        """Print the lines that `text` completes; the rest waits."""
        whole, newline, self._line = (self._line + text).rpartition("\n")
        if newline:
            with self._view.above():
                self._stream.write(whole + newline)
                self._stream.flush()
        return len(text)

    def finish(self) -> None:
        """Print what waits for the end of its line, which does not come."""
        if self._line:
            self.write("\n")

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)
