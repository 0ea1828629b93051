"""One thread that gives requests to the actors of a pool, and their events to whoever waits for them.

    submit -> inbox -> waiting -> actor -> sink(Grown), sink(Done), sink(Embedded) or sink(Failed)
                         ^          |
                         '-- again -'  its actor has ended, and nothing of the answer was sent

Requests wait here until an actor has room. An answer is a function of its request and the weights, so one that is
computed again is the same. A stream that has begun cannot be: other weights may be there by now.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from dist_lm.cluster.pool_weights import Stored
from dist_lm.errors import UserError
from dist_lm.generation.decoder import check_weights
from dist_lm.generation.embedding import EmbeddingRequest
from dist_lm.generation.prefix_cache import PrefixCounts, block_digests
from dist_lm.generation.request import Request
from dist_lm.model.size import parameter_shapes
from dist_lm.server.engine_thread import Done, Embedded, Event, Failed, Figures, Grown, Sink
from dist_lm.server.prefix_router import PrefixRouter
from dist_lm.server.serving_pool import Loss, Order, Report, ServingPool, ServingSpec

log = logging.getLogger(__name__)

LOOK_S = 0.5  # seconds between two looks at the pool, for lost nodes and limits of time
MOST_DEATHS = 5  # a request is refused after so many deaths of actors that worked on it
LOST = "the actor that computed this answer has ended: ask again"


@dataclass
class _Way:
    """A request on its way."""

    order: Order
    sink: Sink
    arrived: float
    digests: Sequence[bytes]  # of the blocks of its prompt
    lane: int | None = None  # number of the actor that computes it
    has_begun: bool = False  # whether the sink has got a part of it
    done: list[Done] = field(default_factory=list)  # answers that wait for the others of their request
    n_open: int = 1  # answers that are not complete
    deaths: int = 0

    @property
    def id(self) -> str:
        return self.order.request.id

    @property
    def n_answers(self) -> int:
        request = self.order.request
        return request.n if isinstance(request, Request) else 1

    @property
    def n_prompt(self) -> int:
        request = self.order.request
        return len(request.prompt) if isinstance(request, Request) else sum(map(len, request.sequences))


@dataclass(frozen=True)
class _Cancel:
    """Ends a request."""

    request: str


@dataclass(frozen=True)
class _NewWeights:
    """Replaces the weights."""

    weights: Stored
    version: int
    loaded: Callable[[str], None]


@dataclass(frozen=True)
class _Wake:
    """Says that an actor has something to tell."""


@dataclass(frozen=True)
class _Stop:
    """Ends the thread."""


_Message = _Way | _Cancel | _NewWeights | _Wake | _Stop


class PoolThread:
    """The thread; `start` it, and `stop` it at the end. A `Backend`."""

    def __init__(self, pool: ServingPool, spec: ServingSpec) -> None:
        """
        Args:
            pool: started; `close` ends it.
            spec: of its actors.
        """
        self.figures = Figures()
        self._pool = pool
        self._spec = spec
        self._most_answers = spec.options.max_sequences  # of one actor
        self._router = PrefixRouter(most_extra=max(1, self._most_answers // 4))
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._waiting: deque[_Way] = deque()
        self._running: dict[str, _Way] = {}  # by the request's id
        self._reports: dict[int, Report] = {}  # the last one of each actor
        self._new_weights: _NewWeights | None = None  # not on all actors yet
        self._n_engines = len(pool.serving)
        self._is_stopping = False
        self._failure = ""
        self._thread = threading.Thread(target=self._run, name="pool", daemon=True)
        pool.wake = lambda: self._inbox.put(_Wake())

    @property
    def failure(self) -> str:
        """See `Backend`."""
        return self._failure

    @property
    def version(self) -> int:
        """See `Backend`."""
        return self._pool.version

    @property
    def is_idle(self) -> bool:
        """See `Backend`."""
        return not (self._waiting or self._running)

    @property
    def n_engines(self) -> int:
        """See `Backend`."""
        return self._n_engines

    @property
    def free_pages(self) -> int:
        """See `Backend`; as of the actors' last reports."""
        return sum(report.free_pages for report in [*self._reports.values()])

    @property
    def n_pages(self) -> int:
        """See `Backend`; as of the actors' last reports."""
        return sum(report.n_pages for report in [*self._reports.values()])

    @property
    def prefix_counts(self) -> PrefixCounts:
        """See `Backend`; of the actors that are up."""
        counts = [report.prefix_counts for report in [*self._reports.values()]]
        return PrefixCounts(sum(count.looked_up for count in counts), sum(count.reused for count in counts))

    def use_threads(self, n: int) -> None:
        """Does nothing: actors have threads of their own."""

    def start(self) -> None:
        """See `Backend`."""
        self._thread.start()

    def submit(self, request: Request, sink: Sink, *, streams: bool) -> None:
        """See `Backend`."""
        digests = block_digests(request.prompt, request.cache_key)
        self._inbox.put(_Way(Order(request, streams), sink, time.monotonic(), digests, n_open=request.n))

    def embed(self, request: EmbeddingRequest, sink: Sink) -> None:
        """See `Backend`."""
        self._inbox.put(_Way(Order(request, streams=False), sink, time.monotonic(), ()))

    def cancel(self, request: str) -> None:
        """See `Backend`."""
        self._inbox.put(_Cancel(request))

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int, loaded: Callable[[str], None]) -> None:
        """See `Backend`; `loaded` is called when all actors that are up have the weights."""
        config = self._spec.model
        try:
            check_weights(config, {name: tuple(weight.shape) for name, weight in weights.items()})
        except UserError as error:
            loaded(str(error))
            return
        stored = self._pool.hold((name, weights[name]) for name in parameter_shapes(config))
        assert isinstance(stored, Stored), "the pool has no sender"
        self._inbox.put(_NewWeights(stored, version, loaded))

    def stop(self, seconds: float) -> None:
        """See `Backend`."""
        self._inbox.put(_Stop())
        self._thread.join(seconds)

    def close(self) -> None:
        """Ends the actors; the thread has ended."""
        self._pool.close()

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self._read_inbox()
                for number, happened in self._pool.tend():
                    self._take_news(number, happened)
                self._note_weights()
                self._fail_late()
                self._hand_out()
                self._count()
        except Exception as error:
            log.exception("the pool has failed")
            self._failure = f"the pool has failed ({error}): start the server again"
        self._fail_all(self._failure or "the server is stopping")

    def _read_inbox(self) -> None:
        """Waits for a message, at most `LOOK_S`, and takes all that are there."""
        try:
            self._take(self._inbox.get(timeout=LOOK_S))
        except queue.Empty:
            return
        while not self._inbox.empty():
            self._take(self._inbox.get())

    def _take(self, message: _Message) -> None:
        if isinstance(message, _Way):
            self._waiting.append(message)
        elif isinstance(message, _Cancel):
            self._drop(message.request)
        elif isinstance(message, _NewWeights):
            self._replace_weights(message)
        elif isinstance(message, _Stop):
            self._is_stopping = True

    def _replace_weights(self, new: _NewWeights) -> None:
        if self._new_weights:
            self._new_weights.loaded("newer weights have arrived before")
        self._new_weights = new
        self._pool.renew(new.weights, new.version)

    def _note_weights(self) -> None:
        """Tells when all actors have the new weights."""
        if self._new_weights and self._pool.is_renewed:
            self._new_weights.loaded("")
            self._new_weights = None

    def _drop(self, request: str) -> None:
        """Ends a cancelled request."""
        way = self._running.pop(request, None)
        if way is None:
            way = next((way for way in self._waiting if way.id == request), None)
            if way is None:
                return
            self._waiting.remove(way)
        elif way.lane is not None:
            self._pool.serving[way.lane].order((), [request])
        self.figures.cancelled += 1

    def _take_news(self, number: int, happened: Report | Loss) -> None:
        if isinstance(happened, Report):
            self._reports[number] = happened
            for event in happened.events:
                self._pass_on(number, event)
            return

        self._reports.pop(number, None)
        self._router.forget(number)
        lost = [way for way in self._running.values() if way.lane == number]
        # In reverse, since each goes to the front: they keep their order.
        for way in reversed(lost):
            self._begin_again(way, happened.is_blamed)

    def _begin_again(self, way: _Way, is_blamed: bool) -> None:
        """Lets a request wait for another actor, if nothing of it was sent."""
        del self._running[way.id]
        way.deaths += is_blamed
        if way.has_begun:
            self._fail(way, LOST, 500)
        elif way.deaths >= MOST_DEATHS:
            self._fail(way, f"{way.deaths} actors ended while they worked on this request", 500)
        else:
            way.lane, way.done, way.n_open = None, [], way.n_answers
            self._waiting.appendleft(way)

    def _pass_on(self, number: int, event: Event) -> None:
        """Gives an event of an actor to the sink of its request. Answers that are not streamed come together, so that
        all are of one version of the weights."""
        name = event.answer.request if isinstance(event, Done) else event.request
        way = self._running.get(name)
        if way is None or way.lane != number:  # cancelled
            return

        if isinstance(event, Failed):
            del self._running[name]
            self.figures.failed += 1
            way.sink(event)
            return
        if isinstance(event, Grown):
            if not way.has_begun:
                self.figures.first_token_s.append(time.monotonic() - way.arrived)
            way.has_begun = True
            way.sink(event)
            return

        way.n_open -= 1
        if not way.n_open:
            del self._running[name]
        if isinstance(event, Embedded):
            self.figures.answered += 1
            way.sink(event)
            return
        for done in self._ready(way, event):
            self.figures.answered += 1
            self.figures.new_tokens += len(done.answer.tokens)
            way.sink(done)

    def _ready(self, way: _Way, done: Done) -> Iterator[Done]:
        """Yields the answers that the sink may get now."""
        if way.order.streams:
            way.has_begun = True
            yield done
            return
        way.done.append(done)
        if not way.n_open:
            yield from way.done

    def _fail_late(self) -> None:
        """Fails requests that have waited too long for an actor."""
        now = time.monotonic()
        queue_s = self._spec.queue_s
        while self._waiting and now - self._waiting[0].arrived > queue_s:
            self._fail(self._waiting.popleft(), f"no room for this request within {queue_s:g} s: try later", 503)

    def _hand_out(self) -> None:
        """Gives requests to actors that have room, oldest first."""
        actors = self._pool.serving
        # An actor that takes in new weights lets requests wait.
        if any(not actor.is_loading for actor in actors.values()):
            actors = {number: actor for number, actor in actors.items() if not actor.is_loading}
        loads = dict.fromkeys(actors, 0)
        for way in self._running.values():
            if way.lane in loads:
                loads[way.lane] += way.n_open

        orders: dict[int, list[Order]] = {}
        while self._waiting:
            way = self._waiting[0]
            # An idle actor takes any request.
            open_loads = {
                number: load for number, load in loads.items() if not load or load + way.n_answers <= self._most_answers
            }
            if not open_loads:
                break
            self._waiting.popleft()
            way.lane = self._router.choose(way.digests, open_loads)
            self._router.remember(way.digests, way.lane)
            loads[way.lane] += way.n_answers
            self._running[way.id] = way
            orders.setdefault(way.lane, []).append(way.order)
            self.figures.queue_s.append(time.monotonic() - way.arrived)
            self.figures.prompt_tokens += way.n_prompt
        for number, of_actor in orders.items():
            actors[number].order(of_actor, ())

    def _count(self) -> None:
        self._n_engines = len(self._pool.serving)
        self.figures.waiting = sum(way.n_answers for way in self._waiting)
        self.figures.running = sum(way.n_open for way in self._running.values())

    def _fail_all(self, reason: str) -> None:
        """Fails all requests, also those that still arrive, until the thread is told to stop."""
        self._n_engines = 0
        while True:
            for way in (*self._running.values(), *self._waiting):
                self._fail(way, reason, 503)
            self._running.clear()
            self._waiting.clear()
            if self._new_weights:
                self._new_weights.loaded(reason)
                self._new_weights = None
            if self._is_stopping and self._inbox.empty():
                return
            self._take(self._inbox.get())

    def _fail(self, way: _Way, reason: str, status: int) -> None:
        self.figures.failed += 1
        way.sink(Failed(way.id, reason, status))
