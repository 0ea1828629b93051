"""The pool of actors of a server: each runs an engine thread, and requests come and go one by one.

`ServingPool` is a `Pool` with its places, restarts and nodes; only the work of its actors differs. Where actors of a
pool take a slice of work and report at its end, these compute on, and a waiting call brings each event as it happens:
tokens, answers, refusals. New weights are loaded actor by actor, so that others go on.
"""

import queue
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dist_lm.cluster.pool import Pool
from dist_lm.cluster.pool_actor import EngineSpec, Loaded, Member, MemberLostError, PoolActor, Weights
from dist_lm.cluster.pool_weights import Stored, read
from dist_lm.cluster.ray_cluster import Node
from dist_lm.errors import UserError
from dist_lm.generation.adapters import AdapterWeights
from dist_lm.generation.embedding import EmbeddingRequest
from dist_lm.generation.prefix_cache import PrefixCounts
from dist_lm.generation.request import Request
from dist_lm.server.engine_thread import Done, Embedded, EngineThread, Event

REPORT_S = 0.5  # longest time between two reports of an actor
GATHER_S = 0.005  # a report waits so long for further events: an engine brings one for each of its answers
ORDERS, REPORTS = "orders", "reports"  # Ray runs the calls of each group in their order, beside those of other groups


@dataclass(frozen=True)
class ServingSpec(EngineSpec):
    """The engine that every actor builds."""

    queue_s: float = 60.0  # longest wait of a request for its first step
    adapters: tuple[AdapterWeights, ...] = ()  # adapters of the pool's weights, which then never change


@dataclass(frozen=True)
class Order:
    """A request on its way to an actor."""

    request: Request | EmbeddingRequest
    streams: bool


@dataclass(frozen=True)
class Report:
    """Events of an actor since its last report."""

    events: Sequence[Event]
    free_pages: int
    n_pages: int
    prefix_counts: PrefixCounts
    silent_s: float  # since its engine began its present step


@dataclass(frozen=True)
class Loss:
    """An actor has ended, and what it had under way is lost."""

    is_blamed: bool  # whether its requests may have caused it


class ServingActor(PoolActor):
    """An engine in a thread, for requests that come one by one."""

    def __init__(self, spec: ServingSpec, threads: int, devices: tuple[int, ...] = ()) -> None:
        """See `PoolActor`."""
        super().__init__(spec, threads, devices)
        self._queue_s, self._adapters = spec.queue_s, spec.adapters
        self._thread: EngineThread | None = None
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def load(self, chunks: Sequence[Any], version: int, under_way: bool = False) -> Loaded:
        """Uses other weights from now on; requests under way end on the old ones, and it returns after them. The first
        call builds the engine.

        Args:
            under_way: False, as an answer of a server is of one version.

        Raises:
            UserError: the weights do not fit the model, or the node has too few devices.
        """
        assert not under_way
        if self._thread is None:
            # Each thread of a process has a number of its own.
            torch.set_num_threads(self._threads)
            loaded = super().load(chunks, version)
            assert self._engine
            for adapter in self._adapters:
                self._engine.add_adapter(adapter)
            self._thread = EngineThread(self._engine, self._queue_s)
            self._thread.start()
            return loaded

        outcome: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread.load_weights(read(chunks, self._spec.dtype), version, outcome.put)
        if reason := outcome.get():
            raise UserError(reason)
        return self._loaded()

    def take_orders(self, orders: Sequence[Order], cancelled: Sequence[str]) -> None:
        """Queues requests, and ends those whose ids are `cancelled`."""
        assert self._thread
        for order in orders:
            if isinstance(order.request, EmbeddingRequest):
                self._thread.embed(order.request, self._events.put)
            else:
                self._thread.submit(order.request, self._events.put, streams=order.streams)
        for request in cancelled:
            self._thread.cancel(request)

    def report(self) -> Report:
        """Returns what has happened since the last call, as soon as something has, and after `REPORT_S` at the latest.

        Raises:
            RuntimeError: the engine has failed.
        """
        thread = self._thread
        assert thread
        events: list[Event] = []
        with suppress(queue.Empty):
            events.append(self._events.get(timeout=REPORT_S))
            time.sleep(GATHER_S)
            while True:
                events.append(self._events.get_nowait())

        # The pool computes its requests again elsewhere, so nobody must learn of their end here.
        if thread.failure:
            raise RuntimeError(thread.failure)
        return Report(events, thread.free_pages, thread.n_pages, thread.prefix_counts, thread.silent_s)


class ServingMember(Member):
    """A `ServingActor` on its reserved place."""

    actor_class: ClassVar[type[PoolActor]] = ServingActor
    actor_options: ClassVar[Mapping[str, Any]] = {"concurrency_groups": {ORDERS: 1, REPORTS: 1}}

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """See `Member`."""
        super().__init__(*arguments, **options)
        self.wake: Callable[[], None] = lambda: None  # called in a thread of Ray when a call has ended
        self._reporting: tuple[Any, float] | None = None  # the open `report` call, and its start

    @property
    def is_loading(self) -> bool:
        """Whether it takes in new weights: requests wait there until those under way have ended."""
        return self.is_up and self._loading is not None

    def load(self, weights: Weights) -> None:
        """See `Member.load`."""
        super().load(weights)
        assert self._loading
        self._wake_after(self._loading[0])

    def order(self, orders: Sequence[Order], cancelled: Sequence[str]) -> None:
        """Sends requests, and the ids of those that nobody waits for any more."""
        self._actor.take_orders.options(concurrency_group=ORDERS).remote(orders, cancelled)

    def take_report(self, patience_s: float) -> Report | None:
        """Returns the report that the actor has sent, and asks for the next one; None if there is none yet. It does not
        wait.

        Args:
            patience_s: seconds. A report may take so long after it was asked for, and so may a step of the engine.

        Raises:
            MemberLostError: the actor has ended, its engine has failed, or one of the two times was longer. Also if an
                actor that was up cannot load new weights.
            UserError: the actor rejected the weights that it was to start with.
        """
        if self._loading:
            self._take_loading(self._loading)
        if not self.is_up:
            return None
        if self._reporting is None:
            self._ask_for_report()
            return None

        call, began = self._reporting
        report: Report | None = self._result(call)
        # With a report its engine may hang, without one the whole actor.
        silent_s = report.silent_s if report else time.monotonic() - began
        if silent_s > patience_s:
            raise MemberLostError(f"{self}: silent for {silent_s:.0f} s")
        if report:
            self._ask_for_report()
        return report

    def end(self) -> None:
        """See `Member.end`."""
        super().end()
        self._reporting = None

    def _take_loading(self, loading: tuple[Any, int, float]) -> None:
        """Notes that the actor has loaded weights, if it has.

        Raises:
            MemberLostError, UserError: as `take_report`.
        """
        call, version, _ = loading
        try:
            loaded: Loaded | None = self._result(call)
        except UserError as error:
            # It was up, so weights of this shape fit: its engine is in a state that nobody knows.
            if self.is_up:
                raise MemberLostError(f"{self}: {error}") from error
            raise
        if loaded is not None:
            self._loading = None
            self._has_loaded(loaded, version)

    def _ask_for_report(self) -> None:
        call = self._actor.report.options(concurrency_group=REPORTS).remote()
        self._reporting = (call, time.monotonic())
        self._wake_after(call)

    def _wake_after(self, call: Any) -> None:
        call.future().add_done_callback(lambda _: self.wake())


class ServingPool(Pool):
    """Actors that compute requests one by one. One thread drives it after its start, by `tend` and the members."""

    member_class: ClassVar[type[Member]] = ServingMember

    def __init__(self, *arguments: Any) -> None:
        """See `Pool`."""
        super().__init__(*arguments)
        self.wake: Callable[[], None] = lambda: None  # called in a thread of Ray when `tend` has something to do
        self._happened: list[tuple[int, Report | Loss]] = []

    @property
    def serving(self) -> dict[int, ServingMember]:
        """The actors that are up, by their numbers."""
        return {number: self._serving(member) for number, member in self._members.items() if member.is_up}

    @property
    def version(self) -> int:
        """Version of the present weights."""
        return self._weights.version

    @property
    def is_renewed(self) -> bool:
        """Whether an actor is up, and all that are have the present weights."""
        return bool(self.members) and all(member.version == self.version for member in self.members)

    def renew(self, weights: Stored, version: int) -> None:
        """Gives actors other weights, one after the other; those that start later begin with these."""
        self._weights = Weights(weights, version)

    def tend(self) -> list[tuple[int, Report | Loss]]:
        """Collects reports, replaces lost actors and starts missing ones; returns what has happened, with the numbers
        of the actors, in order. Does not wait.

        Raises:
            ActorsLostError: no actor, and no place for one within cluster.node_wait_s.
            PoolFailure: actors keep dying.
            UserError: actors that start reject the weights.
        """
        self._tend()
        happened, self._happened = self._happened, []
        return happened

    def _collect(self, number: int, member: Member) -> bool:
        report = self._serving(member).take_report(self._cluster.config.hang_min_s)
        if report is None:
            return False
        self._note(number, report)
        return any(isinstance(event, Done | Embedded) for event in report.events)

    def _renew(self, member: Member) -> None:
        # An actor takes no new requests while those under way end, so the others must go on.
        is_one_loading = any(other.is_loading for other in self.serving.values())
        if not is_one_loading and member.is_up and member.next_version != self.version:
            member.load(self._weights)

    def _leave(self, number: int, blamed: bool) -> None:
        self._note(number, Loss(blamed))

    def _member_on(self, node: Node, ordinal: int) -> Member:
        member = self._serving(super()._member_on(node, ordinal))
        member.wake = lambda: self.wake()
        return member

    def _note(self, number: int, happened: Report | Loss) -> None:
        self._happened.append((number, happened))

    @staticmethod
    def _serving(member: Member) -> ServingMember:
        assert isinstance(member, ServingMember)
        return member
