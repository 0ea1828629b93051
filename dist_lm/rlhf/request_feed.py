"""The way between conversations, which wait for answers in an event loop, and engines in another thread."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Self

from dist_lm.generation.request import (
    Answer,
    Request,
)

ALIVE_EVERY_S = 1.0  # most time between two calls of `alive`
Ask = Callable[[Request], Coroutine[Any, Any, Answer]]
"""Returns the answer to a request for one answer."""


class AbortedError(Exception):
    """Raised in conversations when the engines have failed: their answers never come. Raised to engines if nobody waits
    for their answers any more."""


class RequestFeed:
    """Requests of conversations, as an iterator for `RolloutSource.results`, and their answers.

    `ask` belongs to the thread of the event loop, everything else to the thread that generates.
    """

    def __init__(self, alive: Callable[[], None]) -> None:
        """`alive` is called regularly while the iterator is read."""
        self._alive = alive
        self._beaten = time.monotonic()
        self._changed = threading.Condition()
        self._ready: deque[Request] = deque()
        self._asking: dict[str, asyncio.Future[Answer]] = {}
        self._n_generating = 0
        self._is_over = False
        self._is_left = False

    async def ask(self, request: Request) -> Answer:
        """Returns the answer to a request for one answer.

        Raises:
            AbortedError: the engines have failed.
        """
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        with self._changed:
            if self._is_over:
                raise AbortedError
            self._asking[request.id] = future
            self._ready.append(request)
            self._changed.notify()
        return await future

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Request | None:
        """Returns the next request; None: there is none now. It waits for one if nothing is being generated.

        Raises:
            AbortedError: `leave` was called.
        """
        with self._changed:
            if self._is_left:
                raise AbortedError
            # While engines work, the caller must go on with their steps, so only idle ones wait here.
            if not self._ready and not self._n_generating and not self._is_over:
                self._changed.wait(ALIVE_EVERY_S)
            request = self._ready.popleft() if self._ready else None
            self._n_generating += request is not None
            is_over = self._is_over
        if time.monotonic() - self._beaten > ALIVE_EVERY_S:
            self._alive()
            self._beaten = time.monotonic()
        if request is None and is_over:
            raise StopIteration
        return request

    def deliver(self, answer: Answer) -> None:
        """Gives an answer to the conversation that asked."""
        with self._changed:
            future = self._asking.pop(answer.request, None)
            self._n_generating -= 1
        if future is not None:  # after `abort` nobody waits
            future.get_loop().call_soon_threadsafe(_resolve, future, answer)

    def end(self) -> None:
        """Ends the iterator once all requests are read; for any thread."""
        with self._changed:
            self._is_over = True
            self._changed.notify()

    def leave(self) -> None:
        """As `abort`; the engines stop where they are, in the middle of answers."""
        with self._changed:
            self._is_left = True
        self.abort()

    def abort(self) -> None:
        """Raises AbortedError in all conversations that wait for an answer or ask for one later; for any thread."""
        self.end()
        with self._changed:
            asking, self._asking = self._asking, {}
        for future in asking.values():
            with suppress(RuntimeError):  # its loop is closed: nobody waits
                future.get_loop().call_soon_threadsafe(_refuse, future)


def _resolve(future: asyncio.Future[Answer], answer: Answer) -> None:
    if not future.done():
        future.set_result(answer)


def _refuse(future: asyncio.Future[Answer]) -> None:
    if not future.done():
        future.set_exception(AbortedError())
