"""Ctrl-C, TERM and USR1 while stages run: the first asks for a checkpoint and a stop, a second Ctrl-C ends at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dist_lm.tracking.console import Console

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass
class Interrupt:
    """The signal that asked to stop; 0: none so far."""

    number: int = 0

    @property
    def requested(self) -> bool:
        return self.number != 0


@contextmanager
def watch_signals(console: Console) -> Iterator[Interrupt]:
    """An `Interrupt` that the signals set, instead of what they did before."""
    interrupt = Interrupt()

    def note(number: int, frame: object) -> None:
        if interrupt.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not interrupt.requested:
            console.warning(f"received {signal.Signals(number).name}: writing a checkpoint, then stopping")
        interrupt.number = number

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
