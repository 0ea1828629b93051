"""The progress of work, which the live view or plain lines display."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.text import Text

from dist_lm.tracking.live_state import FIGURES, RankPulse, TrainingState, Work
from dist_lm.tracking.readable import duration, four_digits

Item = TypeVar("Item")
PLAIN_INTERVAL_S = 10.0
PLAIN_SHARE = 0.1  # a plain line is also due after this share of the work


class PlainDisplay:
    """Prints a line about every ten seconds, or every tenth of the work if that is sooner."""

    def __init__(self, console: Console, label: str, total: int | None, clock: Callable[[], float]) -> None:
        self._console = console
        self._label = label
        self._total = total
        self._clock = clock
        self._due_from: tuple[int, float] | None = None  # (count, time) of the first call or of the last printed line
        self._printed: int | None = None  # count of the last printed line
        self._latest = 0

    def show(
        self, completed: int, text: Callable[[], str], seconds_left: Callable[[], float | None] | None = None
    ) -> None:
        """Notes the count, and prints a line if one is due: not at the first call, nor when all is completed.

        Args:
            text: returns the text of the line; called only if it is printed.
            seconds_left: not printed, because the text has it.
        """
        now = self._clock()
        self._latest = completed

        # `finish` prints the last line.
        if completed == self._total:
            return
        # Lines come at intervals of time or of progress, so that a log file stays short.
        if self._due_from is not None:
            share = (completed - self._due_from[0]) / (self._total or math.inf)
            if now - self._due_from[1] < PLAIN_INTERVAL_S and share < PLAIN_SHARE:
                return
            self._print(text())
            self._printed = completed

        self._due_from = (completed, now)

    def finish(self, text: str) -> None:
        if self._latest != self._printed:
            self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(Text(f"{self._label}: {text}"))


Display = Work | PlainDisplay
"""Either displays one piece of work."""


class Count:
    """Counted work; see `Console.counting`."""

    def __init__(self, display: Display, unit: str, clock: Callable[[], float], total: int | None = None) -> None:
        self._display = display
        self._unit = unit
        self._clock = clock
        self._total = total
        self._started = clock()
        self.done = 0

    def advance(self, by: int = 1) -> None:
        """Counts `by` more units."""
        self.done += by
        self._display.show(self.done, self.text)

    def each(self, element: Item) -> Item:
        """Counts one element and returns it, so that `map` can count."""
        self.advance()
        return element

    def text(self) -> str:
        """Returns the count and its rate."""
        elapsed = self._clock() - self._started
        text = f"{self.done:,} {self._unit}"
        if self._total is not None:
            text = f"{self.done:,} of {self._total:,} {self._unit}"
        if elapsed > 0:
            rate = self.done / elapsed
            # A task of a build may take a minute.
            digits = 0
            if rate < 10:
                digits = 1
            text += f" ({rate:,.{digits}f}/s)"
        return text


class TaskProgress:
    """Tasks of about known sizes that end in any order; see `Console.tasks`."""

    def __init__(
        self, display: Display, sizes: Mapping[int, float], done: Collection[int], clock: Callable[[], float]
    ) -> None:
        self._display = display
        self._sizes = sizes
        self._done_before = frozenset(done)
        self._left = sum(size for number, size in sizes.items() if number not in self._done_before)
        self._clock = clock
        self._began = clock()
        self._n_bytes = 0.0  # of the tasks that this command has run
        self._n_ended = 0

    def ended(self, number: int) -> int:
        """Counts the end of a task, and returns its number."""
        self._n_ended += 1
        # An earlier command has run it: its result was only read.
        if number not in self._done_before:
            self._n_bytes += self._sizes[number]
        self._display.show(self._n_ended, self.text, self.seconds_left)
        return number

    def seconds_left(self) -> float | None:
        """Estimates the time left from the bytes of this command; None before its first task has ended."""
        if not self._n_bytes:
            return None
        return (self._clock() - self._began) * (self._left - self._n_bytes) / self._n_bytes

    def text(self) -> str:
        """Returns ended tasks and, once this command has run one, its speed and the time left."""
        facts = [f"{self._n_ended:,} of {len(self._sizes):,} tasks"]
        elapsed = self._clock() - self._began
        if elapsed > 0 and self._n_bytes:
            facts.append(f"{four_digits(self._n_bytes / elapsed / 1e6)} MB/s")
        left_s = self.seconds_left()
        if left_s is not None and self._n_ended < len(self._sizes):
            facts.append(f"{duration(left_s)} left")
        return "  ".join(facts)


class TrainingProgress:
    """A training stage; see `Console.training`."""

    def __init__(self, display: Display, state: TrainingState, clock: Callable[[], float]) -> None:
        self._display = display
        self.state = state
        self._clock = clock

    def update(self, line: Mapping[str, Any]) -> bool:
        """Records one line of the metrics file and displays it. Returns False for a line of an earlier attempt, which
        is recorded and not displayed."""
        # Figures of an earlier attempt would make the progress jump back.
        of_this_attempt = self.state.take(line)
        if of_this_attempt:
            self._display.show(self.state.step, self.text)

        return of_this_attempt

    def heard(self, ranks: Sequence[RankPulse]) -> None:
        """Records the last heartbeats of the ranks."""
        self.state.hear(ranks, self._clock())

    def saved(self, step: int, just_now: bool) -> None:
        """Records the step of the newest checkpoint; 0: there is none."""
        self.state.save(step, self._clock() if just_now else None)

    def text(self) -> str:
        """Returns step, those figures that have a value (an older one with its step) and, if known, the time left,
        separated by two spaces."""
        state = self.state
        facts = [f"step {state.step:,}/{state.steps:,}"]
        if epochs := state.epochs:
            facts.append(f"epoch {epochs}")
        figures = [figure for figure in FIGURES if figure.plain]
        facts += filter(None, (state.shown(figure.metric, figure.plain, figure.form) for figure in figures))

        left_s = state.seconds_left()
        if left_s is not None:
            facts.append(f"{duration(left_s)} left")

        return "  ".join(facts)


class GenerationProgress:
    """Generation of answers; see `Console.generating`."""

    def __init__(self, display: Display, prompts: int, clock: Callable[[], float]) -> None:
        self._display = display
        self._prompts = prompts
        self._clock = clock

        self._began = clock()
        self._first: tuple[int, int] | None = None  # (prompts, tokens) at the first update
        self._totals = (0, 0)  # (prompts, tokens) at the last update

    def update(self, prompts: int, tokens: int) -> None:
        """Records the totals of answered prompts and tokens, those of earlier commands included."""
        self._totals = (prompts, tokens)
        if self._first is None:
            self._first = self._totals
        self._display.show(prompts, self.text, self.seconds_left)

    def seconds_left(self) -> float | None:
        """Estimates the time left from the prompts that this command has answered; None before the first one."""
        prompts = self._totals[0]
        new_prompts = prompts - (self._first or self._totals)[0]
        if not new_prompts:
            return None
        return (self._clock() - self._began) / new_prompts * (self._prompts - prompts)

    def text(self) -> str:
        """Returns answered prompts, the speed of this command in tokens/s and, once it has answered a prompt, the time
        left."""
        elapsed = self._clock() - self._began
        prompts, tokens = self._totals

        # Earlier commands may have answered prompts: speed and time left count what this command adds.
        _, first_tokens = self._first or self._totals
        speed = (tokens - first_tokens) / elapsed if elapsed > 0 else 0.0

        facts = [f"{prompts:,}/{self._prompts:,} prompts", f"{four_digits(speed)} tokens/s"]
        left_s = self.seconds_left()
        if left_s is not None and prompts < self._prompts:
            facts.append(f"{duration(left_s)} left")

        return "  ".join(facts)
