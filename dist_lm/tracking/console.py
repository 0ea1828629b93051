"""Output for people: tables, progress, and warnings and errors as single lines.

Control characters are visible (`tracking/readable.py`).

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
from dist_lm.tracking.progress import Count, Display, GenerationProgress, PlainDisplay, TaskProgress, TrainingProgress
from dist_lm.tracking.readable import OutputConsole, visible
from dist_lm.tracking.redact import redact_text

FILE_WIDTH = 160  # columns of output that is not a terminal
ENDLESS = 100_000  # columns: a width that every table fits
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
        """Opens the console; nothing is printed yet.

        Args:
            output: stream of results; None: standard output.
            errors: stream of warnings and errors; None: standard error.
            live: whether to draw a live view instead of plain lines; None: if `output` is a terminal that can.
            clock: seconds; paces plain lines.
        """
        self._out = _printer(output or sys.stdout)
        self._err = _printer(errors or sys.stderr)

        if live is None:
            live = self._out.file.isatty() and not self._out.is_dumb_terminal
        self._live = live
        self._clock = clock
        self._view: LiveView | None = None

    def line(self, text: str) -> None:
        """Prints one line of text."""
        with self._above(self._out):
            self._out.print(Text(visible(text)))

    def warning(self, text: str) -> None:
        """Prints `warning: text` to standard error, in one line without passwords of URLs; the live view shows it,
        too."""
        message = _one_line(text)
        with self._above(self._err):
            if self._view:
                self._view.state.warn(message, self._clock())
            self._err.print(Text.assemble(("warning: ", "bold yellow"), message))

    def error(self, text: str) -> None:
        """Prints `error: text` to standard error, in one line."""
        with self._above(self._err):
            self._err.print(Text.assemble(("error: ", "bold red"), _one_line(text)))

    def details(self, text: str) -> None:
        """Prints text of several lines, such as a traceback, to standard error."""
        with self._above(self._err):
            self._err.print(Text(visible(redact_text(text.rstrip("\n")))))

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Iterable[Sequence[str]],
        below: Collection[str] = (),
        under: str = "",
    ) -> None:
        """Prints a title and a table of plain text to standard output; cells of a table that is too wide are folded.

        Args:
            rows: a cell for each of `columns`.
            below: columns whose cells are printed below their row where the table does not fit the terminal.
            under: the column under which these lines start; empty: the first.
        """
        cells = [tuple(map(visible, row)) for row in rows]

        width = self._out.width
        widths = _widths(columns, cells, width)
        words_stay_whole = _table_width(widths) <= width
        nothing_folds = words_stay_whole and widths == _widths(columns, cells, ENDLESS)

        table = Table(box=None, pad_edge=False)
        for column, column_width in zip(columns, widths, strict=True):
            table.add_column(column, overflow="fold", width=column_width if words_stay_whole else None)
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))

        with self._above(self._out):
            # The title is printed separately, because rich folds the title of a table to the table's width.
            self._out.print(Text(title, style="bold"), soft_wrap=not self._out.is_terminal)

            if nothing_folds or not below or (words_stay_whole and width >= NARROW):
                self._out.print(table, soft_wrap=False)
            else:
                self._out.print(*_with_rows_below(columns, cells, below, under, width), sep="\n")

    def summary(self, title: str, texts: Mapping[str, str]) -> None:
        """Prints a panel of names and texts (at least one) to standard output; without a frame, and nothing folded,
        where the frame would fold a text, such as a path."""
        texts = {name: visible(text) for name, text in texts.items()}
        grid = Table.grid(padding=(0, 2))
        for name, text in texts.items():
            grid.add_row(Text(name, style="bold"), Text(text, overflow="fold"))

        with self._above(self._out):
            if self._out.measure(grid).maximum + FRAME <= self._out.width:
                panel = Panel(grid, title=Text(title), title_align="left", expand=False)
                self._out.print(panel, soft_wrap=False)
                return

            self._out.print(Text(title, style="bold"))
            width = max(map(len, texts))
            for name, text in texts.items():
                self._out.print(Text.assemble((f"{name:{width}}", "bold"), "  ", text))

    @contextmanager
    def pipeline(self, title: str, stages: Iterable[tuple[str, StageState, str]]) -> Iterator[None]:
        """Shows the stages of a pipeline as (name, state, detail) in the live view while the block runs; work started
        in it appears in the same view. Does nothing where there is no live view."""
        if not self._live:
            yield
            return

        state = LiveState(self._clock(), title, [StageLine(*stage) for stage in stages])
        with self._viewing(state):
            yield

    def stage(self, name: str, state: Literal["running", "done"], detail: str = "") -> None:
        """Marks a stage of the pipeline (see `pipeline`) as running, or as done with its result `detail`; empty: that
        of its last work. Does nothing where there is no live view."""
        if self._view:
            with self._view.lock:
                if state == "running":
                    self._view.state.begin(name, self._clock())
                else:
                    self._view.state.done(name, self._clock(), detail)

    @contextmanager
    def counting(self, label: str, unit: str, total: int | None = None) -> Iterator[Count]:
        """Shows the progress of counted work while the block runs; the block tells the yielded counter. At its end one
        line stays; after an exception none."""
        with self._progress(label, total) as display:
            counter = Count(display, unit, self._clock, total)
            yield counter
            display.finish(counter.text())

    @contextmanager
    def tasks(self, label: str, sizes: Mapping[int, float], done: Collection[int]) -> Iterator[TaskProgress]:
        """Shows the progress of numbered tasks while the block runs; the block tells each end. At the end one line
        stays; after an exception none.

        Args:
            sizes: bytes of each task.
            done: those that an earlier command has run, which count neither for the speed nor for the time left.
        """
        with self._progress(label, len(sizes)) as display:
            progress = TaskProgress(display, sizes, done, self._clock)
            yield progress
            display.finish(progress.text())

    @contextmanager
    def waiting(self, label: str) -> Iterator[None]:
        """Shows work whose progress is unknown; at the end one line stays."""
        started = self._clock()

        with self._progress(label, None) as display:
            display.show(0, str)
            yield
            display.finish(f"{self._clock() - started:.1f} s")

    @contextmanager
    def training(self, label: str, steps: int, since: float = 0.0) -> Iterator[TrainingProgress]:
        """Shows a training stage of `steps` steps while the block runs; the block feeds it with lines of the metrics
        file. At the end one line stays; after an exception none.

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
        """Shows the number of answered prompts and the speed while the block runs; at its end one line stays.

        Args:
            prompts: all prompts that are to be answered.
        """
        with self._progress(label, prompts) as display:
            progress = GenerationProgress(display, prompts, self._clock)
            yield progress
            display.finish(progress.text())

    @contextmanager
    def _progress(self, label: str, total: int | None, training: TrainingState | None = None) -> Iterator[Display]:
        """Yields a display for one piece of work: plain lines, or a row of the live view, which is opened for the block
        if there is none; then the result is printed as a line at the end.

        Args:
            total: count at which the work is done; None: unknown.
            training: the state that the view draws, if the work is a training.
        """
        if not self._live:
            yield PlainDisplay(self._out, label, total, self._clock)
            return
        if self._view is None:
            with self._viewing(LiveState(self._clock())), self._progress(label, total, training) as display:
                yield display
            # The view is gone, so its last line is printed.
            if isinstance(display, Work) and display.result:
                self.line(f"{label}: {display.result}")
            return

        view = self._view
        work = Work(label, total, self._clock(), training=training)
        with view.lock:
            view.state.works.append(work)

        # A work that fails must leave the view, too.
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
        """Returns the context in which to print to a stream that may share the terminal with the view."""
        # Standard error may be a file while the view is on a terminal: nothing needs to move then.
        shares_terminal = self._view is not None and stream.file.isatty()
        if self._view and (shares_terminal or stream is self._out):
            return self._view.above()
        return nullcontext()


def _one_line(text: str) -> str:
    """Returns a message in one line, without passwords of URLs, with visible control characters."""
    return visible(redact_text(" ".join(text.split())))


def _printer(file: TextIO) -> RichConsole:
    printer = OutputConsole(file=file, soft_wrap=True)
    # rich would assume 80 columns and fold every longer line.
    if not printer.file.isatty():
        printer.width = FILE_WIDTH
    return printer


def _widths(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """Returns the widths of a table's columns: as wide as fits `width`, at least as wide as the longest word."""
    cells_of = list(zip(columns, *rows, strict=True))
    longest_words = [max(cell_len(word) for cell in cells for word in ("", *cell.split())) for cells in cells_of]
    widths = [max(map(cell_len, cells)) for cells in cells_of]

    # Narrow the widest column, cell by cell, until the table fits or every column is at its longest word.
    while _table_width(widths) > width and widths != longest_words:
        foldable = [index for index in range(len(widths)) if widths[index] > longest_words[index]]
        widths[max(foldable, key=widths.__getitem__)] -= 1

    return widths


def _table_width(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * len(widths)


def _with_rows_below(
    columns: Sequence[str], rows: Sequence[Sequence[str]], below: Collection[str], under: str, width: int
) -> Iterator[Text]:
    """Yields the lines of a table for a narrow terminal: cells of the columns `below` follow their row."""
    in_row = [index for index, column in enumerate(columns) if column not in below]
    row_cells = [[row[index] for index in in_row] for row in (columns, *rows)]
    widths = _widths(row_cells[0], row_cells[1:], width)

    # The lines below a row start where the column `under` starts.
    before_under = columns.index(under or columns[0])
    start = GAP + sum(column + GAP for index, column in zip(in_row, widths, strict=True) if index < before_under)

    def padded(text: str, column: int) -> str:
        return text + " " * (column - cell_len(text))

    def aligned(cells: Sequence[str]) -> Iterator[str]:
        folded = [_wrapped(cell, column) for cell, column in zip(cells, widths, strict=True)]
        for parts in zip_longest(*folded, fillvalue=""):
            yield (" " * GAP).join(map(padded, parts, widths)).rstrip()

    yield from (Text(line, style="bold") for line in aligned(row_cells[0]))

    for row, cells in zip(rows, row_cells[1:], strict=True):
        yield from map(Text, aligned(cells))
        for index, cell in enumerate(row):
            if index not in in_row and cell:
                yield from (Text(" " * start + line, style="dim") for line in _wrapped(cell, width - start))


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(1, width), break_long_words=False, break_on_hyphens=False) or [""]
