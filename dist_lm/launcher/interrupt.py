"""Ctrl-C, TERM and USR1 while stages run.

While ranks train the first asks for a checkpoint and a stop, and a second Ctrl-C ends at once. Before that, while text
is tokenized or the cluster joined, there is nothing to save: they end at once, and a part of a stage is made again.
"""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from dist_lm.tracking.console import Console

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(BaseException):
    """TERM or USR1 has come; `number` is the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"by {signal.Signals(number).name}")
        self.number = number


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """TERM and USR1 raise `Stopped` in the block, as Ctrl-C raises KeyboardInterrupt."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(number)

    with _handled({number: stop for number in SIGNALS if number != signal.SIGINT}):
        yield


@dataclass
class Interrupt:
    """The signal that asked to stop; 0: none so far."""

    number: int = 0

    @property
    def requested(self) -> bool:
        return self.number != 0


@contextmanager
def watch_signals(console: Console, then: str = "writing a checkpoint, then stopping") -> Iterator[Interrupt]:
    """An `Interrupt` that the signals set, instead of what they did before; people are told what happens `then`."""
    interrupt = Interrupt()

    def note(number: int, frame: object) -> None:
        if interrupt.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        first, interrupt.number = not interrupt.requested, number
        if first:
            console.warning(f"received {signal.Signals(number).name}: {then}")

    with _handled(dict.fromkeys(SIGNALS, note)):
        yield interrupt


@contextmanager
def left_at_once(interrupt: Interrupt, console: Console) -> Iterator[None]:
    """Within `watch_signals`: a signal ends the block where it is, as nothing in it has to be brought to an end.

    What follows the block asks `interrupt` whether one has come.
    """

    def leave(number: int, frame: object) -> None:
        interrupt.number = number
        console.warning(f"received {signal.Signals(number).name}: stopping")
        raise Stopped(number)

    with suppress(Stopped), _handled(dict.fromkeys(SIGNALS, leave)):
        yield


@contextmanager
def _handled(handlers: Mapping[signal.Signals, Callable[[int, object], None]]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
