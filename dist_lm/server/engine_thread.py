"""One thread that runs the engine: requests join the running batch as they arrive, and their tokens go to a callback.

    submit -> inbox -> waiting -> engine -> sink(Grown), sink(Done) or sink(Failed)
    embed  -> inbox -> embedding ---------> sink(Embedded) or sink(Failed)

Only this thread touches the engine. A request waits here, not in the engine, until the engine has room for its answers,
so that its time in the queue can be limited. Embeddings are computed between the steps, a pack of sequences at a time.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from dist_lm.errors import UserError
from dist_lm.generation.decoder import Weights
from dist_lm.generation.embedding import EmbeddingRequest, embeddings
from dist_lm.generation.engine import Engine
from dist_lm.generation.prefix_cache import PrefixCounts
from dist_lm.generation.request import Answer, AnswerSequence, Request, RequestError, TopLogprobs

log = logging.getLogger(__name__)

IDLE_S = 0.2  # seconds between two looks at an empty inbox, for limits of time
NAN = "the model's hidden states are not numbers (nan)"
MOST_TIMES = 10_000  # times that the figures remember


@dataclass(frozen=True)
class Grown:
    """New tokens of an answer, all with their log-probabilities."""

    request: str
    index: int
    pieces: Sequence[tuple[int, str]]  # each token with the text that became final with it
    raw_logprobs: Sequence[float]
    logprobs: Sequence[float]
    version: int  # the weights' version
    top_logprobs: Sequence[TopLogprobs] = ()


@dataclass(frozen=True)
class Done:
    """A complete answer."""

    answer: Answer


@dataclass(frozen=True)
class Embedded:
    """The embeddings of a request."""

    request: str
    vectors_SD: np.ndarray  # fp32, one row for each sequence
    version: int  # the weights' version


@dataclass(frozen=True)
class Failed:
    """A request without an answer; the status is that of HTTP."""

    request: str
    message: str
    status: int


Event = Grown | Done | Embedded | Failed
Sink = Callable[[Event], None]
"""Called in the thread of the engine; it must not block."""


@dataclass(frozen=True)
class _Cancel:
    """Ends a request."""

    request: str


@dataclass(frozen=True)
class _Stop:
    """Ends the thread."""


@dataclass(frozen=True)
class _NewWeights:
    """Replaces the weights when no request runs on the old ones."""

    weights: Weights
    version: int
    loaded: Callable[[str], None]  # gets the error, empty if there is none


@dataclass
class Figures:
    """Counts since the start, and times in seconds. The thread writes, others read."""

    answered: int = 0
    failed: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    waiting: int = 0  # answers
    running: int = 0  # answers
    queue_s: deque[float] = field(default_factory=lambda: deque(maxlen=MOST_TIMES))
    first_token_s: deque[float] = field(default_factory=lambda: deque(maxlen=MOST_TIMES))


@dataclass
class _Order:
    """A request on its way."""

    request: Request
    sink: Sink
    streams: bool  # whether the sink gets tokens while the answer grows
    arrived: float
    pieces: dict[int, list[tuple[int, str]]] = field(default_factory=dict)  # not yet sent, by the answer's index
    sequences: Sequence[AnswerSequence] = ()
    sent: dict[int, int] = field(default_factory=dict)  # tokens that were sent
    open: set[int] = field(default_factory=set)  # answers that are not complete
    has_token: bool = False

    def take(self, name: str, index: int, token: int, text: str) -> None:
        """Keeps a new token until it is sent; called by the engine."""
        self.pieces[index].append((token, text))


@dataclass
class _Embedding:
    """A request for embeddings on its way."""

    request: EmbeddingRequest
    sink: Sink
    arrived: float
    packs: Iterator[np.ndarray] | None = None  # None: not begun
    parts: list[np.ndarray] = field(default_factory=list)  # rows that are computed


_Message = _Order | _Embedding | _Cancel | _NewWeights | _Stop


class EngineThread:
    """The thread; `start` it, and `stop` it at the end."""

    def __init__(self, engine: Engine, queue_s: float) -> None:
        """
        Args:
            queue_s: seconds that a request may wait for its first step.
        """
        self.figures = Figures()
        self.max_sequences = engine.options.max_sequences
        self._engine = engine
        self._queue_s = queue_s
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._waiting: deque[_Order] = deque()
        self._running: dict[str, _Order] = {}
        self._embedding: deque[_Embedding] = deque()  # the first one may have begun
        self._new_weights: _NewWeights | None = None  # requests under way end first, and none is admitted meanwhile
        self._is_stopping = False
        self._failure = ""
        self._turned_at = time.monotonic()  # when the thread last began another turn
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def failure(self) -> str:
        """Why the engine computes no more; empty while it does."""
        return self._failure

    @property
    def silent_s(self) -> float:
        """Seconds since the thread began its present turn; an idle one takes `IDLE_S`."""
        return time.monotonic() - self._turned_at

    @property
    def n_engines(self) -> int:
        """Engines that compute."""
        return 0 if self._failure else 1

    @property
    def version(self) -> int:
        """Version of the weights that the next request gets."""
        return self._engine.version or 0

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way."""
        return not (self._waiting or self._running or self._embedding) and self._inbox.empty()

    @property
    def free_pages(self) -> int:
        """Pages of the cache that no sequence holds."""
        return self._engine.free_pages

    @property
    def n_pages(self) -> int:
        """Pages of the cache."""
        return self._engine.options.n_pages

    def use_threads(self, n: int) -> None:
        """Sets how many threads of torch the engine has; before `start`."""
        self._threads = n

    @property
    def prefix_counts(self) -> PrefixCounts:
        """How many tokens of prompts were looked up in the prefix cache, and how many it held."""
        return self._engine.prefix_counts

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, request: Request, sink: Sink, *, streams: bool) -> None:
        """Queues a request, whose id must be new; `sink` gets a `Done` for each answer, or one `Failed`.

        Args:
            streams: whether the sink gets `Grown` before.
        """
        self._inbox.put(_Order(request, sink, streams, time.monotonic(), open=set(range(request.n))))

    def embed(self, request: EmbeddingRequest, sink: Sink) -> None:
        """Queues a request for embeddings, whose id must be new; `sink` gets one `Embedded` or `Failed`. Not with
        several devices."""
        self._inbox.put(_Embedding(request, sink, time.monotonic()))

    def cancel(self, request: str) -> None:
        """Ends a request, if it is under way: its pages become free, and its sink gets nothing more."""
        self._inbox.put(_Cancel(request))

    def load_weights(self, weights: Weights, version: int, loaded: Callable[[str], None]) -> None:
        """Replaces the weights: requests that run end on the old ones, those that wait get the new ones.

        Args:
            loaded: called in the thread of the engine, with an error or an empty text.
        """
        self._inbox.put(_NewWeights(weights, version, loaded))

    def stop(self, seconds: float) -> None:
        """Fails all requests and waits for the thread's end, at most so many seconds."""
        self._inbox.put(_Stop())
        self._thread.join(seconds)

    def close(self) -> None:
        """Ends the other processes of the model, if any; the thread has ended."""
        self._engine.close()

    def _run(self) -> None:
        torch.set_num_threads(self._threads)  # each thread has a number of its own
        try:
            while not self._is_stopping:
                self._turned_at = time.monotonic()
                self._read_inbox()
                self._swap_weights()
                self._admit()
                self._embed()
                if self._running:
                    self._step()
                self._count_answers()

        # A dead thread would leave its clients without an answer, so every error ends their requests.
        except Exception as error:
            log.exception("the engine has failed")
            self._failure = f"the engine has failed ({error}): start the server again"
        self._fail_all(self._failure or "the server is stopping")

    def _count_answers(self) -> None:
        self.figures.waiting = sum(order.request.n for order in self._waiting)
        self.figures.running = sum(len(order.open) for order in self._running.values())

    def _fail_all(self, reason: str) -> None:
        """Fails all requests with status 503, also those that still arrive, until the thread is told to stop; weights
        that wait to be loaded are answered with `reason` too.
        """
        while True:
            for order in (*self._running.values(), *self._waiting, *self._embedding):
                self._fail(order, reason, 503)
            self._running.clear()
            self._waiting.clear()
            self._embedding.clear()
            if self._new_weights:
                self._new_weights.loaded(reason)
                self._new_weights = None
            self._count_answers()

            if self._is_stopping and self._inbox.empty():
                return
            self._take(self._inbox.get())

    def _swap_weights(self) -> None:
        """Loads new weights if there are some and nothing runs on the old ones."""
        new = self._new_weights

        # All packs of a request must come from the same weights.
        has_begun = bool(self._embedding and self._embedding[0].packs)
        if not new or self._running or has_begun:
            return
        self._new_weights = None
        # Cancelled answers leave the engine with its next step.
        while self._engine.busy:
            self._engine.step()
        try:
            self._engine.load_weights(new.weights, new.version)
        except UserError as error:  # they do not fit the model: the old ones stay
            new.loaded(str(error))
        else:
            new.loaded("")

    def _read_inbox(self) -> None:
        """Takes all messages; waits for one if nothing runs."""
        # While something runs, a wait for messages would delay its next step.
        if not self._running and not self._embedding:
            try:
                self._take(self._inbox.get(timeout=IDLE_S))
            except queue.Empty:
                return
        while not self._inbox.empty():
            self._take(self._inbox.get())

    def _take(self, message: _Message) -> None:
        """Puts a message of another thread where it is looked for: orders and embeddings are queued, a cancelled
        request is dropped, new weights take the place of those that are not loaded yet, whose sender learns so. Any
        other message stops the thread.
        """
        if isinstance(message, _Order):
            self._waiting.append(message)
        elif isinstance(message, _Embedding):
            self._embedding.append(message)
        elif isinstance(message, _Cancel):
            self._drop(message.request)
        elif isinstance(message, _NewWeights):
            if self._new_weights:
                self._new_weights.loaded("newer weights have arrived before")
            self._new_weights = message
        else:
            self._is_stopping = True

    def _drop(self, name: str) -> None:
        """Ends a cancelled request."""
        for order in [order for order in self._waiting if order.request.id == name]:
            self._waiting.remove(order)
            self.figures.cancelled += 1
        for order in [order for order in self._embedding if order.request.id == name]:
            self._embedding.remove(order)
            self.figures.cancelled += 1
        if self._running.pop(name, None):
            # The engine returns what there is of it with the next step, and nobody asks for it.
            self._engine.cancel(name)
            self.figures.cancelled += 1

    def _admit(self) -> None:
        """Gives the engine requests while it has room, oldest first; fails those that have waited too long."""
        now = time.monotonic()
        while self._waiting and now - self._waiting[0].arrived > self._queue_s:
            self._fail_late(self._waiting.popleft())

        if self._new_weights:
            return

        # An idle engine takes any request: it refuses one that never fits, which would wait for ever here.
        n_active = sum(len(order.open) for order in self._running.values())
        while self._waiting and (not n_active or n_active + self._waiting[0].request.n <= self.max_sequences):
            order = self._waiting.popleft()
            if order.streams:
                order.pieces = {index: [] for index in order.open}
                order.sent = dict.fromkeys(order.open, 0)
            try:
                order.sequences = self._engine.submit(order.request, order.take if order.streams else None)
            except RequestError as error:
                self._fail(order, error.reason, 400)
                continue
            except UserError as error:  # such as a cache that does not fit into memory
                self._fail(order, str(error), 500)
                continue
            self._running[order.request.id] = order
            self.figures.queue_s.append(now - order.arrived)
            self.figures.prompt_tokens += len(order.request.prompt)
            n_active += order.request.n

    def _embed(self) -> None:
        """Computes the next pack of the oldest request for embeddings. A new one waits while new weights do."""
        while self._embedding and not self._embedding[0].packs:
            if time.monotonic() - self._embedding[0].arrived <= self._queue_s:
                break
            self._fail_late(self._embedding.popleft())
        if not self._embedding:
            return

        order = self._embedding[0]
        if order.packs is None:
            if self._new_weights:
                return
            order.packs = embeddings(self._engine.decoder, order.request, self._engine.device)
            self.figures.prompt_tokens += sum(map(len, order.request.sequences))
        vectors_sD = next(order.packs, None)
        if vectors_sD is None:
            self._embedding.popleft()
            self.figures.answered += 1
            version = self._engine.version_of(order.request.adapter)
            order.sink(Embedded(order.request.id, np.concatenate(order.parts), version))
        # JSON has no nan, so such a vector would end as a defect of the server.
        elif not np.isfinite(vectors_sD).all():
            self._embedding.popleft()
            self._fail(order, NAN, 500)
        else:
            order.parts.append(vectors_sD)

    def _step(self) -> None:
        results = self._engine.step()
        now = time.monotonic()
        for order in self._running.values():
            if not order.has_token and any(sequence.n_new for sequence in order.sequences):
                order.has_token = True
                self.figures.first_token_s.append(now - order.arrived)
            if order.streams:
                self._send_tokens(order)

        for result in results:
            order = self._running.get(result.request)
            if order is None:  # cancelled
                continue
            if not isinstance(result, Answer):
                del self._running[result.request]
                self._fail(order, result.error, 400)
                continue
            order.open.discard(result.index)
            self.figures.answered += 1
            self.figures.new_tokens += len(result.tokens)
            order.sink(Done(result))
            if not order.open:
                del self._running[result.request]

    def _send_tokens(self, order: _Order) -> None:
        """Sends new tokens of answers all of whose tokens have log-probabilities."""
        for sequence in order.sequences:
            index = sequence.index
            pieces = order.pieces[index]
            # Tokens that a constraint forced have no log-probability until the model has computed them.
            if not pieces or sequence.n_unscored:
                continue

            new = slice(order.sent[index], order.sent[index] + len(pieces))
            event = Grown(
                request=order.request.id,
                index=index,
                pieces=pieces,
                raw_logprobs=sequence.raw_logprobs[new],
                logprobs=sequence.logprobs[new],
                version=self._engine.version_of(order.request.adapter),
                top_logprobs=sequence.top_logprobs[new],
            )
            order.pieces[index], order.sent[index] = [], new.stop
            order.sink(event)

    def _fail_late(self, order: _Order | _Embedding) -> None:
        self._fail(order, f"no room for this request within {self._queue_s:g} s: try later", 503)

    def _fail(self, order: _Order | _Embedding, reason: str, status: int) -> None:
        self.figures.failed += 1
        order.sink(Failed(order.request.id, reason, status))
