"""The requests of one job, or one for embeddings, in the engine: their events on the way to the client, and their end
if the client goes.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress

from fastapi import Request

from dist_lm.server.backend import Backend
from dist_lm.server.embedding_fields import EmbeddingJob
from dist_lm.server.engine_thread import Done, Embedded, Event
from dist_lm.server.job import Job
from dist_lm.server.serving import Serving


class Run:
    """The requests of a job in the engine, and their events. It counts as an open request from its beginning."""

    def __init__(self, serving: Serving) -> None:
        """Counts as an open request of `serving` from here on, until `end`."""
        self._serving = serving
        self._thread: Backend | None = None
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._gone: asyncio.Task[None] | None = None
        self._is_open = True
        self._under_way: set[str] = set()
        self.n_open = 0  # answers that are not complete
        serving.open_requests += 1

    def start(self, job: Job, thread: Backend, request: Request) -> None:
        """Gives the requests of a job to the engine, and watches for the end of the client's connection, whose body
        has been read."""
        sink = self._watch(thread, request)
        for engine_request in job.requests:
            self._under_way.add(engine_request.id)
            self.n_open += engine_request.n
            thread.submit(engine_request, sink, streams=job.stream)

    def start_embedding(self, job: EmbeddingJob, thread: Backend, request: Request) -> None:
        """Does the same as `start` with a request for embeddings."""
        sink = self._watch(thread, request)
        self._under_way.add(job.request.id)
        self.n_open = 1
        thread.embed(job.request, sink)

    def _watch(self, thread: Backend, request: Request) -> Callable[[Event], None]:
        """Returns a sink whose events come from `next_event`, and begins to watch the client's connection."""
        loop = asyncio.get_running_loop()
        self._thread = thread
        # The body has been read, so the next message can only say that the client has gone.
        self._gone = asyncio.create_task(_client_gone(request))

        # Events come from the thread of the engine, and a queue of asyncio belongs to the thread of its loop.
        def sink(event: Event) -> None:
            with suppress(RuntimeError):  # the loop has ended, and nobody waits
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        return sink

    async def next_event(self) -> Event | None:
        """Returns the next event; None: the client has gone."""
        assert self._gone, "the run has started"
        event = asyncio.create_task(self._events.get())
        try:
            await asyncio.wait({event, self._gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # A `get` that stays open would take the next event, and nobody would see it.
            if not event.done():
                event.cancel()
        if event.cancelled() or not event.done():
            return None

        result = event.result()
        if isinstance(result, Done | Embedded):
            self.n_open -= 1
        return result

    def end(self) -> None:
        """Cancels the requests that are not complete, and is no longer counted in `open_requests`; a second call does
        nothing.
        """
        if not self._is_open:
            return
        self._is_open = False
        if self._gone:
            self._gone.cancel()
        self._serving.open_requests -= 1

        # The engine ignores requests that are complete.
        if self.n_open and self._thread:
            for name in self._under_way:
                self._thread.cancel(name)


async def _client_gone(request: Request) -> None:
    """Returns when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
