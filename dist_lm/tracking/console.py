"""Output for people: tables, progress, and warnings and errors as single lines.

On a terminal one live view shows the progress, below everything else that is printed. Elsewhere (a file, a batch job,
TERM=dumb) progress is a plain line about every ten seconds. Results go to standard output, warnings and errors to
standard error. Colour follows the terminal and NO_COLOR.
"""

import sys
import textwrap
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import zip_longest
from typing import Literal, TextIO

from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dist_lm.tracking.live_state import LiveState, StageLine, StageState, TrainingState, Work
from dist_lm.tracking.live_terminal import LiveView
from dist_lm.tracking.progress import Count, Display, GenerationProgress, PlainDisplay, TrainingProgress
from dist_lm.tracking.redact import redact_text

FILE_WIDTH = 160  # columns of output that is not a terminal
ENDLESS = 100_000
NARROW = 90  # on fewer columns folded cells are hard to read
GAP = 2  # characters between two columns of a table
FRAME = 4  # columns of a panel's frame


class Console:
    """Prints everything for people."""

    def __init__(
        self,
        output: TextIO | None = None,
        errors: TextIO | None = None,
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            output: None: standard output.
            errors: None: standard error.
            live: a live view, or plain lines; None: live if `output` is a terminal that can.
            clock: seconds; paces plain lines.
        """
        self._out, self._err = _printer(output or sys.stdout), _printer(errors or sys.stderr)
        can = self._out.file.isatty() and not self._out.is_dumb_terminal
        self._live = can if live is None else live
        self._clock = clock
        self._view: LiveView | None = None

    def line(self, text: str) -> None:
        """Print one line of text."""
        with self._above(self._out):
            self._out.print(Text(text))

    def warning(self, text: str) -> None:
        """Print `warning: text` to standard error."""
        said = redact_text(" ".join(text.split()))
        with self._above(self._err):
            if self._view:
                self._view.state.warn(said, self._clock())
            self._err.print(Text.assemble(("warning: ", "bold yellow"), said))

    def error(self, text: str) -> None:
        """Print `error: text` to standard error, in one line."""
        with self._above(self._err):
            self._err.print(Text.assemble(("error: ", "bold red"), redact_text(" ".join(text.split()))))

    def details(self, text: str) -> None:
        """Print text of several lines, such as a traceback, to standard error."""
        with self._above(self._err):
            self._err.print(Text(redact_text(text.rstrip("\n"))))

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Iterable[Sequence[str]],
        below: Collection[str] = (),
        under: str = "",
    ) -> None:
        """Print a table of plain text.

        Args:
            below: columns whose cells are printed below their row where the table does not fit the terminal.
            under: the column under which these lines begin; empty: the first.
        """
        listed = [tuple(row) for row in rows]
        width = self._out.width
        widths = _widths(columns, listed, width)
        whole = _table_width(widths) <= width
        fits = whole and widths == _widths(columns, listed, ENDLESS)
        table = Table(box=None, pad_edge=False)
        for column, own in zip(columns, widths, strict=True):
            table.add_column(column, overflow="fold", width=own if whole else None)
        for row in listed:
            table.add_row(*(Text(cell) for cell in row))
        with self._above(self._out):
            # printed apart, because rich folds a table's title to the width of the table
            self._out.print(Text(title, style="bold"), soft_wrap=not self._out.is_terminal)
            if fits or not below or (whole and width >= NARROW):
                self._out.print(table, soft_wrap=False)
            else:
                self._out.print(*_with_rows_below(columns, listed, below, under, width), sep="\n")

    def summary(self, title: str, entries: Mapping[str, str]) -> None:
        """Print a panel of names and values; without a frame where the frame would fold a value, such as a path."""
        grid = Table.grid(padding=(0, 2))
        for name, value in entries.items():
            grid.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
        with self._above(self._out):
            if self._out.measure(grid).maximum + FRAME <= self._out.width:
                panel = Panel(grid, title=Text(title), title_align="left", expand=False)
                self._out.print(panel, soft_wrap=False)
                return
            self._out.print(Text(title, style="bold"))
            width = max(map(len, entries))
            for name, value in entries.items():
                self._out.print(Text.assemble((f"{name:{width}}", "bold"), "  ", value))

    @contextmanager
    def pipeline(self, title: str, stages: Iterable[tuple[str, StageState, str]]) -> Iterator[None]:
        """Show the stages of a pipeline as (name, state, detail); work in the block is shown in the same view."""
        if not self._live:
            yield
            return
        state = LiveState(self._clock(), title, [StageLine(*stage) for stage in stages])
        with self._viewing(state):
            yield

    def stage(self, name: str, state: Literal["running", "done"], detail: str = "") -> None:
        """Mark a stage of the pipeline as running, or as done with its result."""
        if self._view:
            with self._view.lock:
                if state == "running":
                    self._view.state.begin(name, self._clock())
                else:
                    self._view.state.done(name, self._clock(), detail)

    @contextmanager
    def counting(self, label: str, unit: str, total: int | None = None) -> Iterator[Count]:
        """Show the progress of counted work; at the end one line stays."""
        with self._progress(label, total) as display:
            count = Count(display, unit, self._clock)
            yield count
            display.finish(count.text())

    @contextmanager
    def waiting(self, label: str) -> Iterator[None]:
        """Show work whose progress is unknown; at the end one line stays."""
        started = self._clock()
        with self._progress(label, None) as display:
            display.show(0, str)
            yield
            display.finish(f"{self._clock() - started:.1f} s")

    @contextmanager
    def training(self, label: str, steps: int, since: float = 0.0) -> Iterator[TrainingProgress]:
        """Show a training stage of `steps` steps; feed it with lines of the metrics file.

        Args:
            since: seconds since 1970; lines with an earlier time belong to an earlier attempt.
        """
        state = TrainingState(steps, since)
        with self._progress(label, steps, state) as display:
            progress = TrainingProgress(display, state, self._clock)
            yield progress
            display.finish(progress.text())

    @contextmanager
    def generating(self, label: str, prompts: int) -> Iterator[GenerationProgress]:
        """Show the number of answered prompts and the speed."""
        with self._progress(label, prompts) as display:
            progress = GenerationProgress(display, prompts, self._clock)
            yield progress
            display.finish(progress.text())

    @contextmanager
    def _progress(self, label: str, total: int | None, training: TrainingState | None = None) -> Iterator[Display]:
        if not self._live:
            yield PlainDisplay(self._out, label, total, self._clock)
            return
        if self._view is None:
            with self._viewing(LiveState(self._clock())), self._progress(label, total, training) as display:
                yield display
            if isinstance(display, Work) and display.result:  # the view is gone, its last line stays
                self.line(f"{label}: {display.result}")
            return
        view, work = self._view, Work(label, total, self._clock(), training=training)
        with view.lock:
            view.state.works.append(work)
        try:
            yield work
        finally:
            with view.lock:
                view.state.close(work)

    @contextmanager
    def _viewing(self, state: LiveState) -> Iterator[None]:
        with LiveView(self._out, state, self._clock) as view:
            self._view = view
            try:
                yield
            finally:
                self._view = None

    def _above(self, stream: RichConsole) -> AbstractContextManager[None]:
        """A block in which to print to a stream that may share the terminal with the view."""
        shares = self._view is not None and stream.file.isatty()
        return self._view.above() if self._view and (shares or stream is self._out) else nullcontext()


def _printer(file: TextIO) -> RichConsole:
    made = RichConsole(file=file, highlight=False, soft_wrap=True)
    if not made.file.isatty():
        made.width = FILE_WIDTH
    return made


def _widths(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """Widths of the columns of a table: as wide as fits `width`, at least as wide as the longest word."""
    cells = list(zip(columns, *rows, strict=True))
    words = [max(cell_len(word) for cell in column for word in ("", *cell.split())) for column in cells]
    found = [max(map(cell_len, column)) for column in cells]
    while _table_width(found) > width and found != words:
        found[max((place for place in range(len(found)) if found[place] > words[place]), key=found.__getitem__)] -= 1
    return found


def _table_width(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * len(widths)


def _with_rows_below(
    columns: Sequence[str], rows: Sequence[Sequence[str]], below: Collection[str], under: str, width: int
) -> Iterator[Text]:
    """A table for a narrow terminal: cells of the columns `below` follow their row; words stay whole."""
    short = [place for place, column in enumerate(columns) if column not in below]
    in_line = [[row[place] for place in short] for row in (columns, *rows)]
    widths = _widths(in_line[0], in_line[1:], width)
    start = GAP + sum(
        own + GAP for place, own in zip(short, widths, strict=True) if place < columns.index(under or columns[0])
    )

    def aligned(cells: Sequence[str]) -> Iterator[str]:
        folded = [_wrapped(cell, own) for cell, own in zip(cells, widths, strict=True)]
        for line in zip_longest(*folded, fillvalue=""):
            yield (
                (" " * GAP)
                .join(part + " " * (own - cell_len(part)) for part, own in zip(line, widths, strict=True))
                .rstrip()
            )

    yield from (Text(line, style="bold") for line in aligned(in_line[0]))
    for row, cells in zip(rows, in_line[1:], strict=True):
        yield from map(Text, aligned(cells))
        for place, cell in enumerate(row):
            if place not in short and cell:
                yield from (Text(" " * start + line, style="dim") for line in _wrapped(cell, width - start))


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(1, width), break_long_words=False, break_on_hyphens=False) or [""]
