"""New weights straight from the pool's process into Ray actors; `test_push_link.py` has the bits of every transport."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle

import pytest
import torch

from dist_lm.cluster.pool import Pool
from dist_lm.cluster.pool_push import Held, Sender
from dist_lm.cluster.pool_weights import BROADCAST, IPC, RAY
from dist_lm.cluster.ray_cluster import connect
from dist_lm.config.cluster import ClusterConfig
from dist_lm.generation.request import Answer
from tests.cluster.small_pool import MODEL, SPEC, requests, sorted_results, weights_of
from tests.patience import patient as in_time

LOCAL = ClusterConfig(name="local", connect_timeout_s=120.0, node_wait_s=180.0)
HOST, ADDRESS = torch.device("cpu"), "127.0.0.2"
AT = 9  # parameters that have been sent

pytestmark = pytest.mark.cluster


def stream(seed: int, then: Callable[[], None] = lambda: None) -> Iterator[tuple[str, torch.Tensor]]:
    for number, (name, value) in enumerate(weights_of(seed).items()):
        if number == AT:
            then()
        yield name, torch.from_numpy(value)


def answers(pool: Pool) -> list[Answer]:
    found = sorted_results(pool.generate(requests(8)), requests(8))
    assert all(isinstance(one, Answer) for one in found)
    return [replace(one, version=0) for one in found if isinstance(one, Answer)]


def went_straight(pool: Pool) -> bool:
    stored = pool._weights.stored
    return isinstance(stored, Held) and "chunks" not in vars(stored)


def sender_of(transports: Iterator[str], patience_s: float) -> Sender:
    return Sender(MODEL, SPEC.dtype, HOST, lambda place: next(transports), ADDRESS, patience_s, bucket_bytes=5000)


@pytest.mark.parametrize(
    "transports",
    [
        pytest.param((IPC, BROADCAST), marks=pytest.mark.heavy),
        pytest.param((BROADCAST, BROADCAST), marks=pytest.mark.bars),
    ],
)
def test_a_pool_draws_the_same_by_every_transport_and_after_a_death_amid_a_push(transports):
    warned: list[str] = []
    sender = sender_of(cycle((RAY, RAY)), 60.0)
    with (
        connect(LOCAL) as cluster,
        Pool.start(cluster, SPEC, weights_of(0), actors=2, sender=sender, warn=warned.append) as pool,
    ):
        pool.load_weights(stream(1), 1)
        assert not went_straight(pool)
        expected, members = answers(pool), pool.members
        assert len(members) == 2
        order = cycle(transports)
        sender._transport_to = lambda place: next(order)
        pool.load_weights(stream(0), 2)
        assert went_straight(pool)
        pool.load_weights(stream(1), 3)
        assert went_straight(pool)
        assert answers(pool) == expected
        pool.load_weights(pool.hold(stream(1)), 4)
        assert went_straight(pool)
        assert answers(pool) == expected
        assert not warned
        victim, survivor = (member.pid for member in members)
        pool.load_weights(stream(1, lambda: os.kill(victim, signal.SIGKILL)), 5)
        assert not went_straight(pool)
        assert answers(pool) == expected
        assert survivor in [member.pid for member in pool.members]
        assert victim not in [member.pid for member in pool.members]
        assert f"{transports[0]} of weights 5" in warned[0]
        assert "Ray's store" in warned[0]
        # On a busy machine the new actor is there only after some versions.
        deadline = time.monotonic() + in_time(60)
        version = 6
        while version == 6 or (not went_straight(pool) and time.monotonic() < deadline):
            pool.load_weights(stream(0), version)
            pool.load_weights(stream(1), version + 1)
            version += 2
        assert went_straight(pool)
        assert answers(pool) == expected


@pytest.mark.bars
@pytest.mark.parametrize("transport", [IPC, BROADCAST])
def test_an_actor_that_stops_amid_a_push_is_replaced(transport):
    warned: list[str] = []
    patient = replace(LOCAL, hang_min_s=20.0)
    sender = sender_of(cycle((transport,)), 3.0)
    with (
        connect(patient) as cluster,
        Pool.start(cluster, SPEC, weights_of(1), actors=1, sender=sender, warn=warned.append) as pool,
    ):
        expected, (member,) = answers(pool), pool.members
        victim = member.pid
        pool.load_weights(stream(1, lambda: os.kill(victim, signal.SIGSTOP)), 1)
        assert answers(pool) == expected
        assert [member.pid for member in pool.members] != [victim]
        assert f"{transport} of weights 1" in warned[0]
        assert "new weights" in warned[1]
