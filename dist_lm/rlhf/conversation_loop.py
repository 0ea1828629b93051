"""An event loop in a thread of its own, in which many conversations are held at once."""

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, Self, TypeVar

from dist_lm.rlhf.request_feed import RequestFeed

Host_co = TypeVar("Host_co", covariant=True)


class ConversationLoop(Generic[Host_co]):
    """An event loop in a thread of its own, with the host of environments. A context manager."""

    def __init__(self, open_host: Callable[[], AbstractAsyncContextManager[Host_co]]) -> None:
        self._open_host = open_host
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="conversations")

    def __enter__(self) -> Self:
        """Raises UserError if the environment cannot be opened, such as a class that cannot be imported."""
        self._thread.start()
        try:
            self._context = self._open_host()
            self.host = self.begin(self._context.__aenter__()).result()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        try:
            self.begin(self._context.__aexit__(None, None, None)).result()
        finally:
            self._end()

    def hold_all(self, holding: Sequence[Callable[[], Awaitable[None]]], at_once: int, feed: RequestFeed) -> Future:
        """Begins to call the coroutine functions in their order, some at a time, and ends `feed` when all are done.

        The first error cancels the others, and is the result's.
        """
        return self.begin(_hold_all(deque(holding), at_once, feed))

    def run_all(self, running: Sequence[Callable[[], Awaitable[None]]], at_once: int) -> None:
        """Calls coroutine functions that ask no model, in their order, some at a time, until all are done.

        Raises:
            Exception: what one of them raises first; the others are cancelled.
        """
        ended = self.hold_all(running, at_once, RequestFeed(lambda: None))
        try:
            ended.result()
        except BaseException:
            ended.cancel()
            raise

    def begin(self, work: Coroutine[Any, Any, Any]) -> Future:
        """Begins to run a coroutine in the loop; returns its result to come."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call_soon(self, call: Callable[[], object]) -> None:
        """Calls a function in the thread of the loop; does not wait."""
        self._loop.call_soon_threadsafe(call)

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _hold_all(waiting: deque[Callable[[], Awaitable[None]]], at_once: int, feed: RequestFeed) -> None:
    async def work() -> None:
        while waiting:
            await waiting.popleft()()

    workers = [asyncio.ensure_future(work()) for _ in range(min(at_once, len(waiting)))]
    try:
        await asyncio.gather(*workers)
    except BaseException:
        feed.abort()
        raise
    finally:
        # Conversations under way close their environments.
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        feed.end()
