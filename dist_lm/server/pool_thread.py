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
class _Routed:
    """A request on its way to an actor and back."""

    order: Order
    sink: Sink
    arrived: float
    digests: Sequence[bytes]  # its prompt's blocks
    lane: int | None = None  # number of the actor that computes it
    has_begun: bool = False  # whether the sink has got a part of it
    held_back: list[Done] = field(default_factory=list)  # answers that wait for the others of their request
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


_Message = _Routed | _Cancel | _NewWeights | _Wake | _Stop


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
        self._most_answers = spec.options.max_sequences  # limit of one actor
        self._router = PrefixRouter(most_extra=max(1, self._most_answers // 4))
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._waiting: deque[_Routed] = deque()
        self._running: dict[str, _Routed] = {}  # keys: ids of requests
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
        """See `Backend`; as in the last reports of the actors."""
        return sum(report.free_pages for report in [*self._reports.values()])

    @property
    def n_pages(self) -> int:
        """See `Backend`; as in the last reports of the actors."""
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
        digests = block_digests(request.prompt, request.prefix_key)
        self._inbox.put(_Routed(Order(request, streams), sink, time.monotonic(), digests, n_open=request.n))

    def embed(self, request: EmbeddingRequest, sink: Sink) -> None:
        """See `Backend`."""
        self._inbox.put(_Routed(Order(request, streams=False), sink, time.monotonic(), ()))

    def cancel(self, request: str) -> None:
        """See `Backend`."""
        self._inbox.put(_Cancel(request))

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int, loaded: Callable[[str], None]) -> None:
        """Hands new weights to the pool, see `Backend`. Returns at once; `loaded` is called with an empty text when all
        actors that are up have the weights.

        Weights that do not fit the model raise nothing: `loaded` is called with the reason, in this thread.
        """
        # An actor that rejects weights counts as lost, so weights are checked before any actor gets them.
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

        # A dead thread would leave its clients without an answer, so every error ends their requests.
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
        if isinstance(message, _Routed):
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
        routed = self._running.pop(request, None)
        if routed is None:
            routed = next((routed for routed in self._waiting if routed.id == request), None)
            if routed is None:
                return
            self._waiting.remove(routed)
        elif routed.lane is not None:
            self._pool.serving[routed.lane].order((), [request])
        self.figures.cancelled += 1

    def _take_news(self, number: int, happened: Report | Loss) -> None:
        if isinstance(happened, Report):
            self._reports[number] = happened
            for event in happened.events:
                self._pass_on(number, event)
            return

        self._reports.pop(number, None)

        # The next actor of this number begins with an empty cache.
        self._router.forget(number)
        lost = [routed for routed in self._running.values() if routed.lane == number]
        # In reverse, since each goes to the front: they keep their order.
        for routed in reversed(lost):
            self._begin_again(routed, happened.is_blamed)

    def _begin_again(self, routed: _Routed, is_blamed: bool) -> None:
        """Lets a request wait for another actor, if nothing of it was sent."""
        del self._running[routed.id]
        routed.deaths += is_blamed
        if routed.has_begun:
            self._fail(routed, LOST, 500)
        elif routed.deaths >= MOST_DEATHS:
            self._fail(routed, f"{routed.deaths} actors ended while they worked on this request", 500)
        else:
            routed.lane, routed.held_back, routed.n_open = None, [], routed.n_answers
            self._waiting.appendleft(routed)

    def _pass_on(self, number: int, event: Event) -> None:
        """Gives an event of an actor to the sink of its request. Answers that are not streamed come together, so that
        all are of one version of the weights."""
        name = event.answer.request if isinstance(event, Done) else event.request
        routed = self._running.get(name)
        if routed is None or routed.lane != number:  # cancelled
            return

        if isinstance(event, Failed):
            del self._running[name]
            self.figures.failed += 1
            routed.sink(event)
            return
        if isinstance(event, Grown):
            if not routed.has_begun:
                self.figures.first_token_s.append(time.monotonic() - routed.arrived)
            routed.has_begun = True
            routed.sink(event)
            return

        routed.n_open -= 1
        if not routed.n_open:
            del self._running[name]
        if isinstance(event, Embedded):
            self.figures.answered += 1
            routed.sink(event)
            return
        for answered in self._ready(routed, event):
            self.figures.answered += 1
            self.figures.new_tokens += len(answered.answer.tokens)
            routed.sink(answered)

    def _ready(self, routed: _Routed, answered: Done) -> Iterator[Done]:
        """Yields the answers that the sink may get now."""
        if routed.order.streams:
            routed.has_begun = True
            yield answered
            return
        # If the actor ends before the last answer, all are computed again, maybe with other weights.
        routed.held_back.append(answered)
        if not routed.n_open:
            yield from routed.held_back

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
        for routed in self._running.values():
            if routed.lane in loads:
                loads[routed.lane] += routed.n_open

        orders: dict[int, list[Order]] = {}
        while self._waiting:
            routed = self._waiting[0]
            # An idle actor takes any request.
            open_loads = {
                number: load
                for number, load in loads.items()
                if not load or load + routed.n_answers <= self._most_answers
            }
            if not open_loads:
                break
            self._waiting.popleft()
            routed.lane = self._router.choose(routed.digests, open_loads)
            self._router.remember(routed.digests, routed.lane)
            loads[routed.lane] += routed.n_answers
            self._running[routed.id] = routed
            orders.setdefault(routed.lane, []).append(routed.order)
            self.figures.queue_s.append(time.monotonic() - routed.arrived)
            self.figures.prompt_tokens += routed.n_prompt
        for number, of_actor in orders.items():
            actors[number].order(of_actor, ())

    def _count(self) -> None:
        self._n_engines = len(self._pool.serving)
        self.figures.waiting = sum(routed.n_answers for routed in self._waiting)
        self.figures.running = sum(routed.n_open for routed in self._running.values())

    def _fail_all(self, reason: str) -> None:
        """Fails all requests, also those that still arrive, until the thread is told to stop."""
        self._n_engines = 0
        while True:
            for routed in (*self._running.values(), *self._waiting):
                self._fail(routed, reason, 503)
            self._running.clear()
            self._waiting.clear()
            if self._new_weights:
                self._new_weights.loaded(reason)
                self._new_weights = None
            if self._is_stopping and self._inbox.empty():
                return
            self._take(self._inbox.get())

    def _fail(self, routed: _Routed, reason: str, status: int) -> None:
        self.figures.failed += 1
        routed.sink(Failed(routed.id, reason, status))
