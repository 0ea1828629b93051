"""What people see: tables, one progress display, warnings and errors in one line.

On a terminal progress is a live bar; elsewhere (a file, a batch job) it is a plain line about every ten
seconds. Results go to standard output, warnings and errors to standard error. Colour follows the terminal and
NO_COLOR.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console as RichConsole
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from dist_lm.tracking.progress import Count, Display, GenerationProgress, LiveDisplay, PlainDisplay, TrainingProgress

FRAME = 4  # columns of a panel beside what is in it


class Console:
    """Where everything for people is printed."""

    def __init__(
        self,
        output: TextIO | None = None,
        errors: TextIO | None = None,
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Print to two streams.

        Args:
            output: standard output if None.
            errors: standard error if None.
            live: bars that are redrawn, or plain lines; None: whether `output` is a terminal.
            clock: seconds; paces plain lines.
        """
        self._out = RichConsole(file=output or sys.stdout, highlight=False, soft_wrap=True)
        self._err = RichConsole(file=errors or sys.stderr, highlight=False, soft_wrap=True)
        self._live = self._out.is_terminal if live is None else live
        self._clock = clock

    def line(self, text: str) -> None:
        """Print one line of text as it is."""
        self._out.print(Text(text))

    def warning(self, text: str) -> None:
        """Print `warning: text` to standard error."""
        self._err.print(Text.assemble(("warning: ", "bold yellow"), " ".join(text.split())))

    def error(self, text: str) -> None:
        """Print `error: text` to standard error, in one line."""
        self._err.print(Text.assemble(("error: ", "bold red"), " ".join(text.split())))

    def details(self, text: str) -> None:
        """Print text of several lines, such as a traceback, to standard error as it is."""
        self._err.print(Text(text.rstrip("\n")))

    def table(self, title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
        """Print a table of plain text."""
        self._out.print(Text(title, style="bold"))  # not the table's own title: that is folded to the table's width
        table = Table(box=None, pad_edge=False)
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self._out.print(table, soft_wrap=False)

    def plan(self, title: str, stages: Iterable[tuple[str, str, str]]) -> None:
        """Print a plan: (stage, what is done about it, detail) a row."""
        self.table(title, ("stage", "plan", ""), stages)

    def summary(self, title: str, entries: Mapping[str, str]) -> None:
        """Print a panel of names and values; without its frame where that would cut a value, which may be a path."""
        grid = Table.grid(padding=(0, 2))
        for name, value in entries.items():
            grid.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
        panel = Panel(grid, title=Text(title), title_align="left", expand=False)
        if self._out.measure(grid).maximum + FRAME <= self._out.width:
            self._out.print(panel, soft_wrap=False)
            return
        self._out.print(Text(title, style="bold"))
        width = max(map(len, entries))
        for name, value in entries.items():
            self._out.print(Text.assemble((f"{name:{width}}", "bold"), "  ", value))

    @contextmanager
    def counting(self, label: str, unit: str, total: int | None = None) -> Iterator[Count]:
        """Show how much of some work is done; its end is one line that stays."""
        with self._progress(label, total) as display:
            count = Count(display, unit, self._clock)
            yield count
            display.done(count.text())

    @contextmanager
    def waiting(self, label: str) -> Iterator[None]:
        """Show that something is going on whose progress is not known; its end is one line that stays."""
        started = self._clock()
        with self._progress(label, None) as display:
            display.show(0, "")
            yield
            display.done(f"{self._clock() - started:.1f} s")

    @contextmanager
    def training(self, label: str, steps: int, since: float = 0.0) -> Iterator[TrainingProgress]:
        """Show a training stage of `steps` steps, fed with lines of its metrics file.

        Args:
            since: seconds since 1970; lines written before are of an earlier attempt.
        """
        with self._progress(label, steps) as display:
            progress = TrainingProgress(display, steps, since)
            yield progress
            display.done(progress.text())

    @contextmanager
    def generating(self, label: str, prompts: int) -> Iterator[GenerationProgress]:
        """Show how many of some prompts are answered, and how fast."""
        with self._progress(label, prompts) as display:
            progress = GenerationProgress(display, prompts, self._clock)
            yield progress
            display.done(progress.text())

    @contextmanager
    def _progress(self, label: str, total: int | None) -> Iterator[Display]:
        if not self._live:
            yield PlainDisplay(self._out, label, total, self._clock)
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=24))
        with Progress(*columns, TextColumn("{task.fields[text]}", markup=False), console=self._out) as progress:
            yield LiveDisplay(progress, label, total)
