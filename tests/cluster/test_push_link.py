"""Weights straight from a sender to actors, here threads of a process: equal bits by every transport, lost actors."""

import threading
import time
from collections import defaultdict
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from dist_lm.cluster.pool_actor import Member
from dist_lm.cluster.pool_push import MOST_FAILURES, Held, Sender
from dist_lm.cluster.pool_weights import BROADCAST, IPC, RAY, Place, choose_transport
from dist_lm.cluster.push_link import FAILURES, Offer, Receiver, SharedBucket, opened, packed, sizes_of, unpacked
from dist_lm.config.pool import PUSH_AUTO, PUSH_DIRECT, PUSH_RAY
from dist_lm.errors import ArtefactError
from tests.cluster.small_pool import MODEL, weights_of
from tests.patience import patient

HOST = torch.device("cpu")
ADDRESS = "127.0.0.1"
LOST_AT = 3  # buckets that a lost actor takes


@pytest.fixture(autouse=True)
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value).to(dtype) for name, value in weights_of(seed).items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


class Stores:
    """A store for each group, shared by all threads."""

    def __init__(self) -> None:
        self._made: dict[str, dist.Store] = defaultdict(dist.HashStore)

    def __call__(self, group: str) -> dist.Store:
        return self._made[group]


class Actor:
    """A `Member` whose actor is a thread."""

    def __init__(self, pid: int, stores: Stores, dtype: torch.dtype, lost: str = "") -> None:
        """`lost`: how it ends after `LOST_AT` buckets: dead (known to Ray), or silent."""
        self.pid, self.place, self.left = pid, Place("node"), False
        self.got: dict[int, dict[str, torch.Tensor]] = {}  # by version
        self.offers: list[Offer] = []
        self.reason: str | None = None
        self.forgotten = False
        self._stores, self._dtype, self.lost = stores, dtype, lost
        self._receiver: Receiver | None = None
        self.thread = threading.Thread()

    def receive(self, offer: Offer, version: int) -> None:
        self.offers.append(offer)
        self.thread = threading.Thread(target=self._receive, args=(offer, version), daemon=True)
        self.thread.start()

    def _receive(self, offer: Offer, version: int) -> None:
        try:
            if self._receiver is None or self._receiver.offer.group != offer.group:
                self._receiver = Receiver(offer, HOST, ADDRESS, store=self._stores)
            buckets = self._receiver.buckets(MODEL, self._dtype)
            if self.lost:
                for _ in range(LOST_AT):
                    next(buckets)
                if self.lost == "dead":
                    self._receiver.close()
                    self._receiver = buckets = None
                    self.reason = f"actor {self.pid} died"
                return
            found = dict(unpacked(buckets, MODEL, self._dtype))
            assert not list(buckets)
            self.got[version] = found
        except FAILURES as error:
            self._receiver, self.left = None, True
            self.reason = str(error)

    def why_not(self) -> str | None:
        return self.reason

    def forget_push(self) -> None:
        self.forgotten = True

    def __str__(self) -> str:
        return f"actor {self.pid}"


class Trial:
    """A sender and actors."""

    def __init__(
        self, transports: list[str], dtype: torch.dtype = torch.float32, lost: str = "", patience_s: float = 20.0
    ) -> None:
        stores = Stores()
        self.actors = [Actor(10 + i, stores, dtype, lost if i == 0 else "") for i in range(len(transports))]
        self.warned: list[str] = []
        self.asked = 0
        transport_of = {id(actor.place): transport for actor, transport in zip(self.actors, transports, strict=True)}
        self.sender = Sender(
            MODEL,
            dtype,
            HOST,
            lambda place: transport_of[id(place)],
            ADDRESS,
            patience_s,
            bucket_bytes=5000,
            store=stores,
        )

    def send(self, given: Any, version: int) -> Held:
        held = self.sender.send(given, version, cast("list[Member]", self.actors), self._keep_going, self.warned.append)
        assert isinstance(held, Held)
        return held

    def _keep_going(self) -> bool:
        self.asked += 1
        return True


@pytest.mark.parametrize(
    ("push", "sender", "actor", "tp", "transport"),
    [
        (PUSH_AUTO, Place("a", "GPU-1"), Place("a", "GPU-1"), 1, IPC),
        (PUSH_AUTO, Place("a", "GPU-1"), Place("a", "GPU-1"), 2, IPC),
        (PUSH_AUTO, Place("a", "GPU-1"), Place("a", "GPU-2"), 1, BROADCAST),
        (PUSH_AUTO, Place("a", "GPU-1"), Place("b", "GPU-3"), 1, BROADCAST),
        (PUSH_AUTO, Place("a", "GPU-1"), Place("a", "GPU-2"), 2, RAY),  # NCCL of its process stays on loopback
        (PUSH_AUTO, Place("a", "GPU-1"), Place("a"), 1, RAY),
        (PUSH_AUTO, Place("a"), Place("a"), 1, RAY),
        (PUSH_DIRECT, Place("a"), Place("a"), 1, IPC),
        (PUSH_DIRECT, Place("a"), Place("b"), 1, BROADCAST),
        (PUSH_DIRECT, Place("a"), Place("b", "GPU-1"), 1, RAY),
        (PUSH_RAY, Place("a", "GPU-1"), Place("a", "GPU-1"), 1, RAY),
        (PUSH_RAY, Place("a"), Place("b"), 1, RAY),
    ],
)
def test_the_transport_to_an_actor_follows_from_both_places(push, sender, actor, tp, transport):
    assert choose_transport(push, sender, actor, tp) == transport


@pytest.mark.parametrize("size", [500, 5000, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_come_out_of_buckets_as_they_went_in(dtype, size):
    expected = weights(1, dtype)
    buckets = [bucket.clone() for bucket in packed(expected.items(), MODEL, dtype, lambda: torch.empty(size).byte())]
    assert [len(bucket) for bucket in buckets] == sizes_of(MODEL, dtype, size)
    assert same(dict(unpacked(iter(buckets), MODEL, dtype)), expected)


def test_weights_of_another_model_are_refused_by_name():
    given = weights(0)
    given["final_norm.weight"] = torch.zeros(3)
    with pytest.raises(ArtefactError, match=r"final_norm\.weight"):
        list(packed(given.items(), MODEL, torch.float32, lambda: torch.empty(100, dtype=torch.uint8)))
    missing = list(weights(0).items())[:-1]
    with pytest.raises(ArtefactError, match="is missing"):
        list(packed(missing, MODEL, torch.float32, lambda: torch.empty(100, dtype=torch.uint8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transports", [[BROADCAST, BROADCAST], [IPC], [IPC, BROADCAST]])
def test_actors_get_the_same_bits_by_every_transport(transports, dtype):
    trial = Trial(transports, dtype)
    for version in (1, 2):
        held = trial.send(weights(version, dtype).items(), version)
        for actor in trial.actors:
            actor.thread.join(120)
            assert same(actor.got[version], weights(version, dtype))
        assert same(dict(unpacked(iter(held.buckets), MODEL, dtype)), weights(version, dtype))
    assert all(len({offer.group for offer in actor.offers}) == 1 for actor in trial.actors)  # it is kept
    kept = trial.sender.hold(weights(3, dtype).items())
    assert trial.send(kept, 3) is kept
    for actor in trial.actors:
        actor.thread.join(120)
        assert same(actor.got[3], weights(3, dtype))
    trial.sender.close()
    assert not trial.warned


@pytest.mark.parametrize("lost", ["dead", "silent"])
@pytest.mark.parametrize("transports", [[BROADCAST, BROADCAST], [IPC, BROADCAST], [IPC]])
def test_a_lost_actor_ends_a_push_and_the_version_is_kept_whole(transports, lost):
    trial = Trial(transports, lost=lost, patience_s=1.0 if lost == "silent" else patient(60))
    began = time.monotonic()
    held = trial.send(weights(1).items(), 1)
    assert lost == "silent" or time.monotonic() - began < patient(45)
    assert same(dict(unpacked(iter(held.buckets), MODEL, torch.float32)), weights(1))
    assert all(actor.forgotten for actor in trial.actors)  # nobody's result counts: a bucket may have changed too soon
    assert not any(actor.got for actor in trial.actors)
    (line,) = trial.warned
    assert "weights 1 to actor 10" in line
    assert "Ray's store" in line
    assert trial.asked
    for actor in trial.actors:  # another one in its place
        actor.thread.join(120)
        actor.lost, actor.reason, actor._receiver = "", None, None
    trial.send(weights(2).items(), 2)
    for actor in trial.actors:
        actor.thread.join(120)
        assert same(actor.got[2], weights(2))
    assert trial.sender.is_on


def test_pushes_that_always_fail_stop():
    trial = Trial([IPC], lost="silent", patience_s=0.2)
    for version in range(MOST_FAILURES):
        trial.actors[0]._receiver = None
        trial.send(weights(version).items(), version)
    assert not trial.sender.is_on
    assert "later ones go there too" in trial.warned[-1]
    assert len(trial.actors[0].offers) == MOST_FAILURES
    kept = trial.sender.hold(weights(9).items())
    assert trial.send(kept, 9) is kept
    assert len(trial.actors[0].offers) == MOST_FAILURES


def test_a_closed_bucket_cannot_be_opened():
    shared = SharedBucket.create(4096, HOST)
    handle = shared.handle()
    shared.bucket.fill_(7)
    assert bool((opened(handle, 4096, HOST) == 7).all())
    shared.close()
    others = [SharedBucket.create(4096, HOST) for _ in range(3)]  # one of them gets the descriptor's number
    with pytest.raises(RuntimeError, match="closed"):
        opened(handle, 4096, HOST)
    for other in others:
        other.close()
