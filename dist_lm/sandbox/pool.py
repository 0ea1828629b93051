"""Runs many programs at once: `with SandboxPool(workers=8) as pool: verdicts = pool.run(programs)`."""

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Protocol, Self

from dist_lm.sandbox.program import Limits, Program, Verdict
from dist_lm.sandbox.sandbox import Sandbox, fences
from dist_lm.storage.process import cores


class Sandboxes(Protocol):
    """An object that runs programs side by side, inside a `with` block."""

    def submit(self, program: Program, limits: Limits | None = None) -> Future[Verdict]: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_exception: object) -> None: ...


class _Turns:
    """Lets programs run beside each other, or one of them alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._waiting = 0  # for their turn alone
        self._is_alone = False

    @contextmanager
    def beside_others(self) -> Iterator[None]:
        """A block in which a program runs beside others; before it, waits while a program runs alone, or waits for
        that."""
        with self._changed:
            # Whoever waits to run alone goes first; else programs that keep coming would let it wait for ever.
            self._changed.wait_for(lambda: not self._waiting and not self._is_alone)
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A block inside `beside_others` in which the program runs alone: waits until no other one runs, and lets none
        begin before the end of the block."""
        with self._changed:
            # The program that asks runs as well, and would wait for itself.
            self._running -= 1
            self._waiting += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._running and not self._is_alone)
            self._waiting -= 1
            self._is_alone = True
        try:
            yield
        finally:
            with self._changed:
                self._is_alone = False
                self._running += 1
                self._changed.notify_all()


class SandboxPool:
    """Sandboxes that run programs side by side, each in a thread of this process that mostly waits.

    Args:
        workers: number of programs at once; 0: one for each core.
        trust_me: run programs without isolation where the machine allows none.
    """

    def __init__(self, workers: int = 0, trust_me: bool = False) -> None:
        self.workers = workers or cores()
        self._trust_me = trust_me
        self._idle: SimpleQueue[Sandbox] = SimpleQueue()
        self._turns = _Turns()
        self._threads: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        """Raises SandboxError if no sandbox can be made here."""
        fences(self._trust_me)
        # A sandbox ends with the thread that started it, so these threads start them, at their first program.
        self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="sandbox")
        for _ in range(self.workers):
            self._idle.put(Sandbox(self._trust_me, alone=self._turns.alone))
        return self

    def __exit__(self, *_exception: object) -> None:
        assert self._threads is not None
        self._threads.shutdown(cancel_futures=True)
        for _ in range(self.workers):
            self._idle.get().close()
        self._threads = None

    def submit(self, program: Program, limits: Limits | None = None) -> Future[Verdict]:
        """Runs a program as soon as a sandbox is free."""
        assert self._threads is not None, "a SandboxPool is a context manager"
        return self._threads.submit(self._run, program, limits or Limits())

    def run(self, programs: Iterable[Program], limits: Limits | None = None) -> list[Verdict]:
        """Returns the verdicts on `programs`, in their order."""
        futures = [self.submit(program, limits) for program in programs]
        return [future.result() for future in futures]

    def _run(self, program: Program, limits: Limits) -> Verdict:
        sandbox = self._idle.get()
        try:
            with self._turns.beside_others():
                return sandbox.run(program, limits)
        finally:
            self._idle.put(sandbox)
