"""How far some work has come, and the two ways it is shown: in the live view, or in plain lines now and then."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.text import Text

from dist_lm.tracking.live.state import TextOrCall, Work
from dist_lm.tracking.live.training_state import FIGURES, GangFacts, RankPulse, TrainingState
from dist_lm.tracking.readable import duration, four_digits

Item = TypeVar("Item")
PLAIN_INTERVAL_S = 10.0
PLAIN_SHARE = 0.1  # of the work: a plain line comes after so much of it, if that is sooner


class Display(Protocol):
    """One piece of work on its way."""

    def show(self, done: int, text: TextOrCall) -> None:
        """Show it, unless it was shown a moment ago."""
        ...

    def done(self, text: str) -> None:
        """Say how it ended."""
        ...


class ViewDisplay:
    """Work in a live view, which draws it when it is time."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self.end: str | None = None

    def show(self, done: int, text: TextOrCall) -> None:
        self._work.done, self._work.text = done, text

    def done(self, text: str) -> None:
        self.end = text


class PlainDisplay:
    """A line about every ten seconds or tenth of the work, whichever comes first."""

    def __init__(self, console: Console, label: str, total: int | None, clock: Callable[[], float]) -> None:
        self._console = console
        self._label = label
        self._total = total
        self._clock = clock
        self._shown: tuple[int, float] | None = None  # done and time at the last line
        self._printed: int | None = None  # done at the last line that was printed
        self._latest = 0

    def show(self, done: int, text: TextOrCall) -> None:
        now, self._latest = self._clock(), done
        if done == self._total:  # the line that stays says it
            return
        if self._shown is not None:
            share = (done - self._shown[0]) / self._total if self._total else 0.0
            if now - self._shown[1] < PLAIN_INTERVAL_S and share < PLAIN_SHARE:
                return
            self._print(_as_text(text))
            self._printed = done
        self._shown = (done, now)

    def done(self, text: str) -> None:
        if self._latest != self._printed:
            self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(Text(f"{self._label}: {text}"))


class Count:
    """Counted work; see `Console.counting`."""

    def __init__(self, display: Display, unit: str, clock: Callable[[], float]) -> None:
        self._display = display
        self._unit = unit
        self._clock = clock
        self._started = clock()
        self.done = 0

    def advance(self, by: int = 1) -> None:
        """Say that `by` more units are done."""
        self.done += by
        self._display.show(self.done, self.text)

    def each(self, item: Item) -> Item:
        """Count one and give it back."""
        self.advance()
        return item

    def text(self) -> str:
        """The count and its rate."""
        elapsed = self._clock() - self._started
        rate = f" ({self.done / elapsed:,.0f}/s)" if elapsed > 0 else ""
        return f"{self.done:,} {self._unit}{rate}"


class TrainingProgress:
    """A training stage under way; see `Console.training`."""

    def __init__(self, display: Display, state: TrainingState, clock: Callable[[], float]) -> None:
        self._display = display
        self._state = state
        self._clock = clock

    def update(self, line: Mapping[str, Any]) -> None:
        """Take in one line of the metrics file; one of an earlier attempt is neither shown nor timed."""
        if self._state.take(line):
            self._display.show(self._state.step, self.text)

    def attempt(self, gang: GangFacts) -> None:
        """Another gang begins."""
        self._state.start(gang)

    def heard(self, ranks: Sequence[RankPulse]) -> None:
        """What the ranks were last heard doing."""
        self._state.hear(ranks, self._clock())

    def saved(self, step: int, just_now: bool) -> None:
        """The newest checkpoint is that of `step`; 0: there is none."""
        self._state.save(step, self._clock() if just_now else None)

    def text(self) -> str:
        """Step, loss, speed and the time left."""
        state = self._state
        parts = [f"step {state.step:,}/{state.steps:,}"]
        parts += [
            figure.plain.format(figure.form(state.values[figure.metric]))
            for figure in FIGURES
            if figure.plain and figure.metric in state.values
        ]
        left = state.seconds_left()
        if left is not None:
            parts.append(f"{duration(left)} left")
        return "  ".join(parts)


class GenerationProgress:
    """Prompts that are answered; see `Console.generating`."""

    def __init__(self, display: Display, prompts: int, clock: Callable[[], float]) -> None:
        self._display = display
        self._prompts = prompts
        self._clock = clock
        self._began = clock()
        self._first: tuple[int, int] | None = None  # prompts and tokens that were there at the beginning
        self._done = (0, 0)

    def update(self, prompts: int, tokens: int) -> None:
        """Say how many prompts are answered, with how many tokens, by earlier commands too."""
        self._done = (prompts, tokens)
        if self._first is None:
            self._first = self._done
        self._display.show(prompts, self.text)

    @property
    def tokens_per_s(self) -> float:
        """Of this command."""
        elapsed = self._clock() - self._began
        return (self._done[1] - self._first[1]) / elapsed if self._first and elapsed > 0 else 0.0

    def text(self) -> str:
        """Prompts, speed and the time left."""
        parts = [f"{self._done[0]:,}/{self._prompts:,} prompts", f"{four_digits(self.tokens_per_s)} tokens/s"]
        new = self._done[0] - self._first[0] if self._first else 0
        if new and self._done[0] < self._prompts:
            parts.append(f"{duration((self._clock() - self._began) / new * (self._prompts - self._done[0]))} left")
        return "  ".join(parts)


def _as_text(text: TextOrCall) -> str:
    return text if isinstance(text, str) else text()
