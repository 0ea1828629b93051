"""The live view on a terminal: a thread draws it four times a second, below everything else that is printed.

While nothing is written the cursor rests at the end of the last line. A line never fills the last column, and a frame
overwrites the one before, so nothing flickers.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import IO, TextIO, cast

from rich.console import Console
from rich.text import Text

from dist_lm.tracking.live_drawing import glyphs_for
from dist_lm.tracking.live_state import LiveState
from dist_lm.tracking.live_view import view_lines

DRAW_S = 0.25
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
TO_END_OF_LINE, TO_END_OF_SCREEN = "\x1b[K", "\x1b[J"
BEGIN, END = "\x1b[?2026h", "\x1b[?2026l"  # draw a frame at once; a terminal without this feature ignores them


class LiveView:
    """A context manager that draws a `LiveState`; hold `lock` to change the state."""

    def __init__(self, console: Console, state: LiveState, clock: Callable[[], float] = time.monotonic) -> None:
        """Prepares the view; the block of the context manager starts and ends it.

        Args:
            console: rich's console of the terminal.
            clock: the clock of the state's times, in seconds.
        """
        # A signal handler may print while this thread draws.
        self.lock = threading.RLock()
        self.state = state
        self.clock = clock

        self._console = console
        self._glyphs = glyphs_for(console.encoding)

        self._region = Region(console.file)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="live view", daemon=True)
        self._guarded: list[tuple[str, TextIO]] = []

    def __enter__(self) -> "LiveView":
        # Output of other code must not break into the drawn lines.
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
        # The thread must end first, or it would draw over the restored terminal.
        self._over.set()
        try:
            self._thread.join()
        finally:
            # Also if a second Ctrl-C interrupts the join.
            for name, stream in self._guarded:
                cast(Above, getattr(sys, name)).finish()
                setattr(sys, name, stream)

            with self.lock:
                self._region.erase(self._console.size.width)

    def draw(self) -> None:
        """Draws the current state, now and in this thread; nothing after the block of the context manager has ended.

        Raises:
            OSError: the terminal is gone.
        """
        with self.lock:
            if self._over.is_set():
                return

            width, height = self._console.size
            # One row stays free for the command line, or for the last message.
            lines = view_lines(self.state, self.clock(), width - 1, height - 1, self._glyphs)
            self._region.draw([self._escaped(line) for line in lines], [line.cell_len for line in lines], width)

    @contextmanager
    def above(self) -> Iterator[None]:
        """Erases the view for the block, so that complete lines printed in it appear above the view; then draws it
        again. The lock is held inside the block.

        Raises:
            OSError: the terminal is gone.
        """
        with self.lock:
            self._region.erase(self._console.size.width)
            try:
                yield
            finally:
                self.draw()

    def _escaped(self, line: Text) -> str:
        with self._console.capture() as capture:
            self._console.print(line, end="", soft_wrap=True)
        return capture.get()

    def _work(self) -> None:
        while not self._over.wait(DRAW_S):
            try:
                self.draw()
            except OSError:
                # The terminal is gone; the stage continues without a view.
                return


class Above:
    """A standard stream whose complete lines are printed above a view."""

    def __init__(self, stream: TextIO, view: LiveView) -> None:
        self._stream = stream
        self._view = view
        self._line = ""

    def write(self, text: str) -> int:
        """Prints the lines that `text` completes above the view, and buffers the rest until its line is complete, or
        until `finish`. Returns the number of characters of `text`.

        Raises:
            OSError: the terminal is gone.
        """
        complete, newline, self._line = (self._line + text).rpartition("\n")
        if newline:
            with self._view.above():
                self._stream.write(complete + newline)
                self._stream.flush()
        return len(text)

    def finish(self) -> None:
        """Prints an incomplete last line."""
        if self._line:
            self.write("\n")

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


class Region:
    """The last lines of a terminal, redrawn in place."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._widths: list[int] = []  # width of each drawn line, in cells
        self._columns = 0  # columns of the terminal when they were drawn
        self._last: list[str] | None = None

    def draw(self, lines: Sequence[str], widths: Sequence[int], columns: int) -> None:
        """Replaces the drawn lines; writes nothing if they and `columns` are the same as before.

        Args:
            lines: text of each line, with escape sequences.
            widths: width of each line, in cells.
            columns: columns of the terminal now.
        """
        # An unchanged frame is not written again, so that a slow terminal gets little.
        if self._last == list(lines) and columns == self._columns:
            return

        parts = [BEGIN, HIDE, self._to_top(columns)]
        # The terminal has become narrower and has folded the drawn lines.
        if columns < self._columns:
            parts.append(TO_END_OF_SCREEN)

        parts.append("\r\n".join(f"{line}{TO_END_OF_LINE}" for line in lines))
        parts.append(f"{TO_END_OF_SCREEN}{END}")
        self._write("".join(parts))

        self._widths = list(widths)
        self._columns = columns
        self._last = list(lines)

    def erase(self, columns: int) -> None:
        """Removes the drawn lines and shows the cursor at the start of the first one."""
        if self._last is None:
            return

        self._write(f"{BEGIN}{self._to_top(columns)}{TO_END_OF_SCREEN}{SHOW}{END}")
        self._widths = []
        self._last = None

    def _to_top(self, columns: int) -> str:
        # A line that is wider than the terminal takes several rows (division rounded up).
        rows = sum(max(1, -(-width // max(1, columns))) for width in self._widths)
        if rows < 2:
            return "\r"
        return f"\r\x1b[{rows - 1}A"

    def _write(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()
