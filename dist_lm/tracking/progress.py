"""Progress of work, shown in the live view or as plain lines."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.text import Text

from dist_lm.tracking.live_state import FIGURES, RankPulse, TrainingState, Work
from dist_lm.tracking.readable import duration, four_digits

Item = TypeVar("Item")
PLAIN_INTERVAL_S = 10.0
PLAIN_SHARE = 0.1  # a plain line is also due after this share of the work


class PlainDisplay:
    """A line about every ten seconds, or every tenth of the work if that is sooner."""

    def __init__(self, console: Console, label: str, total: int | None, clock: Callable[[], float]) -> None:
        self._console = console
        self._label = label
        self._total = total
        self._clock = clock
        self._shown: tuple[int, float] | None = None  # count and time of the last line
        self._printed: int | None = None  # count of the last printed line
        self._latest = 0

    def show(self, done: int, text: Callable[[], str]) -> None:
        now, self._latest = self._clock(), done
        if done == self._total:  # `finish` prints the last line
            return
        if self._shown is not None:
            share = (done - self._shown[0]) / self._total if self._total else 0.0
            if now - self._shown[1] < PLAIN_INTERVAL_S and share < PLAIN_SHARE:
                return
            self._print(text())
            self._printed = done
        self._shown = (done, now)

    def finish(self, text: str) -> None:
        if self._latest != self._printed:
            self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(Text(f"{self._label}: {text}"))


Display = Work | PlainDisplay
"""Shows one piece of work."""


class Count:
    """Counted work; see `Console.counting`."""

    def __init__(self, display: Display, unit: str, clock: Callable[[], float]) -> None:
        self._display = display
        self._unit = unit
        self._clock = clock
        self._started = clock()
        self.done = 0

    def advance(self, by: int = 1) -> None:
        """Count `by` more units."""
        self.done += by
        self._display.show(self.done, self.text)

    def each(self, item: Item) -> Item:
        """Count one item and return it."""
        self.advance()
        return item

    def text(self) -> str:
        """The count and its rate."""
        elapsed = self._clock() - self._started
        rate = f" ({self.done / elapsed:,.0f}/s)" if elapsed > 0 else ""
        return f"{self.done:,} {self._unit}{rate}"


class TrainingProgress:
    """A training stage; see `Console.training`."""

    def __init__(self, display: Display, state: TrainingState, clock: Callable[[], float]) -> None:
        self._display = display
        self.state = state
        self._clock = clock

    def update(self, line: Mapping[str, Any]) -> bool:
        """Take in one line of the metrics file. Returns False for a line of an earlier attempt, which is not shown."""
        of_this_attempt = self.state.take(line)
        if of_this_attempt:
            self._display.show(self.state.step, self.text)
        return of_this_attempt

    def heard(self, ranks: Sequence[RankPulse]) -> None:
        """Take in the last heartbeats of the ranks."""
        self.state.hear(ranks, self._clock())

    def saved(self, step: int, just_now: bool) -> None:
        """Take in the step of the newest checkpoint; 0: none."""
        self.state.save(step, self._clock() if just_now else None)

    def text(self) -> str:
        """Step, figures (with their step where they are older), time left."""
        state = self.state
        parts = [f"step {state.step:,}/{state.steps:,}"]
        parts += filter(None, (state.shown(one.metric, one.plain, one.form) for one in FIGURES if one.plain))
        left = state.seconds_left()
        if left is not None:
            parts.append(f"{duration(left)} left")
        return "  ".join(parts)


class GenerationProgress:
    """Generation of answers; see `Console.generating`."""

    def __init__(self, display: Display, prompts: int, clock: Callable[[], float]) -> None:
        self._display = display
        self._prompts = prompts
        self._clock = clock
        self._began = clock()
        self._first: tuple[int, int] | None = None  # prompts and tokens at the first update
        self._done = (0, 0)

    def update(self, prompts: int, tokens: int) -> None:
        """Take in the totals of answered prompts and tokens, earlier commands included."""
        self._done = (prompts, tokens)
        if self._first is None:
            self._first = self._done
        self._display.show(prompts, self.text)

    def text(self) -> str:
        """Prompts, speed of this command and the time left."""
        elapsed, first = self._clock() - self._began, self._first or self._done
        new, tokens = self._done[0] - first[0], self._done[1] - first[1]
        speed = tokens / elapsed if elapsed > 0 else 0.0
        parts = [f"{self._done[0]:,}/{self._prompts:,} prompts", f"{four_digits(speed)} tokens/s"]
        if new and self._done[0] < self._prompts:
            parts.append(f"{duration(elapsed / new * (self._prompts - self._done[0]))} left")
        return "  ".join(parts)
