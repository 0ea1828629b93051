"""Some lines of a terminal that are drawn again in their place, below whatever else is printed.

The cursor rests at the end of the last line while nothing is written. A line never fills the terminal's last
column, and a frame is written over the one before, so nothing flickers.
"""

from collections.abc import Sequence
from typing import IO

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
TO_END_OF_LINE, TO_END_OF_SCREEN = "\x1b[K", "\x1b[J"
BEGIN, END = "\x1b[?2026h", "\x1b[?2026l"  # of a frame that is to be shown at once; others ignore it


class Region:
    """The lines at the end of what a terminal shows."""

    def __init__(self, file: IO[str]) -> None:
        """Nothing is drawn yet."""
        self._file = file
        self._widths: list[int] = []  # cells of the lines that are there
        self._columns = 0  # of the terminal they were drawn for
        self._last: list[str] | None = None

    def draw(self, lines: Sequence[str], widths: Sequence[int], columns: int) -> None:
        """Put `lines` in the place of those before.

        Args:
            lines: with their escape sequences.
            widths: how many cells each takes.
            columns: of the terminal, now; lines that were drawn for a wider one have been folded by it.
        """
        if self._last == list(lines) and columns == self._columns:
            return
        text = [BEGIN, HIDE, self._to_top(columns)]
        if columns < self._columns:
            text.append(TO_END_OF_SCREEN)
        text.append("\r\n".join(f"{line}{TO_END_OF_LINE}" for line in lines))
        # below the last line, whose end must not be erased
        text.append(f"{TO_END_OF_SCREEN}{END}")
        self._write("".join(text))
        self._widths, self._columns, self._last = list(widths), columns, list(lines)

    def erase(self, columns: int) -> None:
        """Take the lines away; the cursor is where the first began, and is shown."""
        if self._last is None:
            return
        self._write(f"{BEGIN}{self._to_top(columns)}{TO_END_OF_SCREEN}{SHOW}{END}")
        self._widths, self._last = [], None

    def leave(self) -> None:
        """Leave the lines where they are, and the cursor below them, shown."""
        if self._last is not None:
            self._write(f"\r\n{SHOW}")
        self._widths, self._last = [], None

    def _to_top(self, columns: int) -> str:
        rows = sum(max(1, -(-width // max(1, columns))) for width in self._widths)
        return "\r" + (f"\x1b[{rows - 1}A" if rows > 1 else "")

    def _write(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()
