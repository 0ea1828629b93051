"""Requests on their way to actors and back, with actors that the tests play."""

import itertools
import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest

from dist_lm.cluster.events import PoolFailure
from dist_lm.generation.embedding import EmbeddingRequest
from dist_lm.generation.engine_options import EngineOptions
from dist_lm.generation.prefix_cache import PrefixCounts
from dist_lm.generation.request import Answer, Request
from dist_lm.server.engine_thread import Done, Embedded, Event, Failed, Grown
from dist_lm.server.pool_thread import LOST, MOST_DEATHS, PoolThread
from dist_lm.server.prefix_router import PrefixRouter
from dist_lm.server.serving_pool import Loss, Order, Report, ServingPool, ServingSpec
from tests.cluster.small_pool import MODEL
from tests.patience import patient
from tests.server.conftest import wait_for

LIMIT = 4  # answers that an actor takes
SPEC = ServingSpec(MODEL, EngineOptions(max_sequences=LIMIT), eot_id=0, queue_s=patient(30))


@dataclass
class PlayedActor:
    """An actor as the thread sees it."""

    orders: list[Order] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    is_loading: bool = False

    def order(self, orders: Sequence[Order], cancelled: Sequence[str]) -> None:
        self.orders += orders
        self.cancelled += cancelled

    @property
    def ids(self) -> list[str]:
        return [order.request.id for order in self.orders]


class PlayedPool:
    """A pool whose actors do what a test says."""

    def __init__(self, n_actors: int) -> None:
        self.serving = {number: PlayedActor() for number in range(n_actors)}
        self.wake: Callable[[], None] = lambda: None
        self.version = 1
        self.is_renewed = True
        self.news: queue.SimpleQueue[tuple[int, Report | Loss] | Exception] = queue.SimpleQueue()

    def tend(self) -> list[tuple[int, Report | Loss]]:
        happened = []
        while not self.news.empty():
            news = self.news.get()
            if isinstance(news, Exception):
                raise news
            happened.append(news)
        return happened

    def report(self, number: int, *events: Event) -> None:
        """Lets an actor tell what has happened."""
        self.news.put((number, Report(events, 3, 4, PrefixCounts(), 0.0)))
        self.wake()

    def lose(self, number: int, is_blamed: bool = True) -> None:
        """Lets an actor end, and another one start in its place."""
        self.serving[number] = PlayedActor()
        self.news.put((number, Loss(is_blamed)))
        self.wake()


class Played:
    """A thread over a played pool, and what its clients have got."""

    def __init__(self, n_actors: int = 2, spec: ServingSpec = SPEC) -> None:
        self.pool = PlayedPool(n_actors)
        self.thread = PoolThread(cast(ServingPool, self.pool), spec)
        self.events: dict[str, list[Event]] = {}
        self.thread.start()

    def submit(self, name: str, *, n: int = 1, streams: bool = False, prompt: Sequence[int] = (1, 2)) -> None:
        self.events[name] = []
        self.thread.submit(Request(name, prompt, n=n), self.events[name].append, streams=streams)

    def actor_of(self, name: str) -> int:
        """Returns the actor that has got a request."""
        assert wait_for(lambda: any(name in actor.ids for actor in self.pool.serving.values())), name
        return next(number for number, actor in self.pool.serving.items() if name in actor.ids)

    def texts(self, name: str) -> list[str]:
        return [event.answer.text for event in self.events[name] if isinstance(event, Done)]

    def failure_of(self, name: str) -> Failed:
        assert wait_for(lambda: any(isinstance(event, Failed) for event in self.events[name]))
        (failed,) = (event for event in self.events[name] if isinstance(event, Failed))
        return failed


@pytest.fixture
def played() -> Iterator[Callable[..., Played]]:
    threads: list[PoolThread] = []

    def start(*arguments: Any) -> Played:
        played = Played(*arguments)
        threads.append(played.thread)
        return played

    yield start
    for thread in threads:
        thread.stop(patient(10))


def done(name: str, index: int = 0, text: str = "right") -> Done:
    return Done(Answer(name, index, 2, (3,), text, (0.0,), (0.0,), "eot", 0, 1))


def grown(name: str) -> Grown:
    return Grown(name, 0, [(3, "be")], [0.0], [0.0], 1)


def test_what_was_not_begun_is_computed_again_and_a_begun_stream_ends(played: Callable[..., Played]):
    """Finds an answer that a lost actor takes with it, and a stream that goes on with another actor's tokens."""
    run = played(1)
    run.submit("whole", n=2)
    run.submit("begun", streams=True)
    run.submit("not begun", streams=True)
    for name in ("whole", "begun", "not begun"):
        run.actor_of(name)
    run.pool.report(0, done("whole", 0, "of the dead"), grown("begun"))
    assert wait_for(lambda: bool(run.events["begun"]))
    assert not run.events["whole"], "its other answer may be of other weights"

    run.pool.lose(0)
    assert (run.failure_of("begun").message, run.failure_of("begun").status) == (LOST, 500)
    assert wait_for(lambda: run.pool.serving[0].ids == ["whole", "not begun"])
    run.pool.report(0, done("whole", 1, "b"), done("whole", 0, "a"), grown("begun"), grown("not begun"))
    run.pool.report(0, done("not begun"))
    assert wait_for(lambda: run.texts("not begun") == ["right"])
    assert sorted(run.texts("whole")) == ["a", "b"]
    assert len(run.events["begun"]) == 2
    assert wait_for(lambda: run.thread.is_idle)


def test_a_request_that_ends_its_actors_is_refused(played: Callable[..., Played]):
    """Finds a request that kills one actor after the other; the loss of a node says nothing against it."""
    run = played(1)
    run.submit("poison")
    for death in range(MOST_DEATHS + 2):
        run.actor_of("poison")
        run.pool.lose(0, is_blamed=death > 1)
        if death < MOST_DEATHS + 1:
            run.actor_of("poison")
            assert not run.events["poison"]
    assert run.failure_of("poison").status == 500


def test_without_actors_requests_fail_with_503(played: Callable[..., Played]):
    """Finds clients that wait for ever once the pool has given up."""
    run = played(1)
    run.submit("running")
    run.actor_of("running")
    run.pool.news.put(PoolFailure("8 actors died"))
    run.pool.wake()
    assert run.failure_of("running").status == 503
    run.submit("late")
    assert run.failure_of("late").status == 503
    assert "8 actors died" in run.thread.failure
    assert run.thread.n_engines == 0


def test_requests_wait_for_room_and_not_for_ever(played: Callable[..., Played]):
    """Finds an actor that gets more than it can hold, an order other than that of arrival, and a wait without end."""
    run = played(1, ServingSpec(MODEL, EngineOptions(max_sequences=LIMIT), eot_id=0, queue_s=patient(1.5)))
    names = [f"r{number}" for number in range(LIMIT + 2)]
    for name in names:
        run.submit(name)
    run.actor_of(names[LIMIT - 1])
    assert run.pool.serving[0].ids == names[:LIMIT]
    run.pool.report(0, done("r1"))
    run.actor_of(names[LIMIT])
    assert run.failure_of(names[-1]).status == 503

    run.thread.cancel("r0")
    assert wait_for(lambda: run.pool.serving[0].cancelled == ["r0"])
    run.pool.report(0, done("r0"))
    run.pool.report(0, *(done(name) for name in names[2:-1]))
    assert wait_for(lambda: run.thread.is_idle)
    assert run.events["r0"] == []


def test_an_actor_that_loads_gets_requests_only_if_no_other_is_there(played: Callable[..., Played]):
    """Finds requests that wait behind new weights although another actor is free."""
    run = played(2)
    run.pool.serving[0].is_loading = True
    for number in range(LIMIT):
        run.submit(f"r{number}")
    run.actor_of(f"r{LIMIT - 1}")
    assert run.pool.serving[0].ids == []
    run.pool.serving[1].is_loading = True
    run.submit("last")
    assert run.actor_of("last") == 0


def test_embeddings_come_from_any_actor(played: Callable[..., Played]):
    """Finds a request for embeddings that is lost with its actor."""
    run = played(1)
    events: list[Event] = []
    run.thread.embed(EmbeddingRequest("e", [[1], [2]]), events.append)
    run.actor_of("e")
    run.pool.lose(0)
    run.actor_of("e")
    run.pool.report(0, Embedded("e", np.zeros((2, 3), np.float32), 1))
    assert wait_for(lambda: [type(event) for event in events] == [Embedded])


def test_conversations_stay_with_their_actor(played: Callable[..., Played]):
    """Finds a router that forgets, and one that gives all to an actor that has read a common beginning."""
    run = played(2)
    common = [1] * 300
    run.submit("first", prompt=common)
    home = run.actor_of("first")
    run.pool.report(home, done("first"))
    run.submit("other", prompt=[2])
    run.submit("second", prompt=[*common, 5])
    assert run.actor_of("second") == home


def test_the_router_prefers_what_an_actor_has_read_unless_it_is_busy():
    router = PrefixRouter(most_extra=2)
    router.remember([b"a", b"ab"], 0)
    router.remember([b"a", b"ac"], 1)
    assert router.choose([b"a", b"ab"], {0: 2, 1: 0}) == 0
    assert router.choose([b"a", b"ac"], {0: 0, 1: 2}) == 1
    assert router.choose([b"a", b"ad"], {0: 1, 1: 0}) == 1
    assert router.choose([b"a", b"ab"], {0: 3, 1: 0, 2: 0}) == 1, "the next shorter beginning"
    assert router.choose([b"x"], {0: 3, 1: 1, 2: 0}) == 2
    router.forget(0)
    assert router.choose([b"a", b"ab"], {0: 0, 1: 1}) == 1
    assert router.choose([], {5: 0}) == 5


def test_the_router_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch):
    """Finds memory that grows with each prompt."""
    monkeypatch.setattr("dist_lm.server.prefix_router.MOST_BLOCKS", 3)
    router = PrefixRouter(most_extra=9)
    for number, lane in zip(range(6), itertools.cycle((0, 1))):
        router.remember([bytes([number])], lane)
    assert len(router._lanes_of) == 3
    assert router.choose([bytes([5])], {0: 0, 1: 5}) == 1
    assert router.choose([bytes([1])], {0: 0, 1: 5}) == 0
