"""Standard streams, signals and exit codes of a command.

Standard streams may be closed or full. A user error or a full disk prints one line to standard error and exits with
code 2.

While ranks train, the first Ctrl-C, TERM or USR1 asks for a checkpoint and a stop, and a second Ctrl-C ends at once.
Before that, while text is tokenized or the cluster is joined, there is nothing to save: a signal ends the command at
once, and the interrupted part of a stage is built again.
"""

import errno
import logging
import os
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import Any

from dist_lm.errors import UserError
from dist_lm.tracking.console import Console
from dist_lm.tracking.readable import VisibleFormatter, visible

_FORMAT_WARNING = warnings.formatwarning  # Python's own
WAYS_OUT = {
    errno.ENOSPC: "make room, and give the same command again",
    errno.EDQUOT: "make room, and give the same command again",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), and give the same command again",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "allow it, or choose another place",
}


def run_program(program: Callable[[], object], say: Callable[[str], None]) -> None:
    """Runs a command and turns its errors into an exit code; returns if it succeeds. Other exceptions pass through.

    Args:
        say: shows an error to the user.

    Raises:
        SystemExit: with the code of the command, with 2 after a user error, a deleted working directory, a full or
            read-only disk, a file beyond the size limit or a path without permission, or silently with 1 (as Click
            does) if the reader of standard output has closed it.
    """
    try:
        open_streams()
        check_directory()
        try:
            program()
        finally:
            # A failure here can still be reported.
            sys.stdout.flush()
        return
    except UserError as error:
        say(str(error))
    except BrokenPipeError:
        # Other pipes than standard output break too; that is a defect of ours.
        if not _output_has_no_reader():
            raise
        drop_output()
        sys.exit(1)
    except OSError as error:
        reason = disk_trouble(error)
        if reason is None:
            show_tracebacks_visibly()
            raise
        say(reason)
    except Exception:
        show_tracebacks_visibly()
        raise

    drop_output()
    sys.exit(2)


def open_streams() -> None:
    """Replaces a closed standard stream by /dev/null.

    Characters that the encoding of a stream lacks are written as escapes, and control characters in what `logging` and
    `warnings` print as symbols.

    Raises:
        UserError: standard output was closed. A file opened later would get its descriptor and receive the output.
    """
    null = Path(os.devnull)
    if sys.stdin is None:
        sys.stdin = null.open()
    output_was_closed = sys.stdout is None
    if output_was_closed:
        sys.stdout = null.open("w")
    if sys.stderr is None:
        sys.stderr = null.open("w")
    for stream in (sys.stdout, sys.stderr):
        # A path or name that the terminal's encoding lacks would end the command in a traceback.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if logging.lastResort:
        logging.lastResort.setFormatter(VisibleFormatter())
    warnings.formatwarning = format_warning_visibly

    if output_was_closed:
        raise UserError("standard output is closed: leave it open, or send it to /dev/null")


def format_warning_visibly(*values: Any, **options: Any) -> str:
    """`warnings.formatwarning` whose result is text for people: a warning of a package may quote a file."""
    return visible(_FORMAT_WARNING(*values, **options))


def show_tracebacks_visibly() -> None:
    """Lets the interpreter print the traceback that ends this process as text for people: a message may quote a file,
    whose control characters a terminal would obey."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.stderr.write(visible("".join(traceback.format_exception(kind, error, trace))))

    sys.excepthook = show


def check_directory() -> None:
    """Refuses a working directory that is gone: relative paths mean nothing there, and processes do not start.

    Raises:
        UserError: says so.
    """
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UserError("the working directory was deleted: change to one that exists (cd), and try again") from None


def disk_trouble(error: BaseException, elsewhere: str = "standard output or a file") -> str | None:
    """Returns the message for a full or read-only disk or a path without permission; None for any other error, also for
    a permission that concerns no file.

    Args:
        elsewhere: name of the place, if the error has none.
    """
    if not isinstance(error, OSError) or error.errno not in WAYS_OUT:
        return None
    if error.errno == errno.EACCES and not error.filename:
        # Not a file: a socket, for instance.
        return None
    where = error.filename or ("standard output" if _output_is_stuck() else elsewhere)
    return f"{where}: {error.strerror}: {WAYS_OUT[error.errno]}"


def drop_output() -> None:
    """Discards buffered output that cannot be written, so that the interpreter does not fail on it at exit."""
    if not _output_is_stuck():
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _output_is_stuck() -> bool:
    """Returns whether standard output has buffered text that cannot be written."""
    try:
        sys.stdout.flush()
    except OSError:
        return True
    return False


def _output_has_no_reader() -> bool:
    """Returns whether standard output is a pipe or a socket whose reader has closed it."""
    # Text longer than the buffer is lost by the failed write, so nothing is stuck then.
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(BaseException):
    """Raised by TERM or USR1; `number` is the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"by {signal.Signals(number).name}")
        self.number = number


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Lets TERM and USR1 raise `Stopped` in the block, as Ctrl-C raises KeyboardInterrupt."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(number)

    with _handled({number: stop for number in SIGNALS if number != signal.SIGINT}):
        yield


@dataclass
class Interrupt:
    """The signal that requested a stop; 0: none so far."""

    number: int = 0

    @property
    def requested(self) -> bool:
        return self.number != 0


@contextmanager
def watch_signals(console: Console, then: str = "writing a checkpoint, then stopping") -> Iterator[Interrupt]:
    """Yields an `Interrupt` that Ctrl-C, TERM and USR1 set, instead of their usual effect; the first one is reported as
    a warning.

    Once one of them has come, Ctrl-C raises KeyboardInterrupt; TERM and USR1 may be repeated. The end of the block
    brings back the earlier handlers.

    Args:
        then: the consequence of the first signal, for the warning.

    Raises:
        ValueError: this is not the main thread, which alone may set handlers.
    """
    interrupt = Interrupt()

    def note(number: int, frame: object) -> None:
        # The second Ctrl-C ends at once; batch systems may repeat the other signals.
        if interrupt.requested and number == signal.SIGINT:
            raise KeyboardInterrupt

        is_first = not interrupt.requested
        interrupt.number = number
        if is_first:
            console.warning(f"received {signal.Signals(number).name}: {then}")

    with _handled(dict.fromkeys(SIGNALS, note)):
        yield interrupt


@contextmanager
def left_at_once(interrupt: Interrupt, console: Console) -> Iterator[None]:
    """Inside `watch_signals`: Ctrl-C, TERM or USR1 leaves the block at once, with a warning, because nothing in it must
    be finished.

    No exception comes out; the code after the block checks `interrupt`. The handlers before return with the end of the
    block.
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
