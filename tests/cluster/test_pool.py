"""A pool of actors: the same answers whatever dies, comes or goes."""

import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch

from dist_lm.cluster import pool as pool_module
from dist_lm.cluster.events import PoolFailure
from dist_lm.cluster.pool import Pool
from dist_lm.cluster.pool_actor import EngineSpec
from dist_lm.cluster.ray_cluster import RayCluster, connect
from dist_lm.config.cluster import ClusterConfig
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.generation.engine import Engine
from dist_lm.generation.request import Answer, Refusal, Request
from tests.cluster.small_pool import MODEL, SPEC, requests, sorted_results, weights_of
from tests.cluster.waiting import eventually, living
from tests.patience import patient

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with connect(ClusterConfig(name="local", connect_timeout_s=patient(30))) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def pool(cluster: RayCluster) -> Iterator[Pool]:
    with Pool.start(cluster, SPEC, weights_of(0), actors=2) as pool:
        yield pool


def answers_of_one(spec: EngineSpec, asked: Iterable[Request]) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """What one engine in this process says, in the order of the requests."""
    weights = {name: torch.from_numpy(value) for name, value in weights_of(0).items()}
    engine = Engine(spec.model, weights, eot_id=spec.eot_id, options=spec.options)
    for request in asked:
        engine.submit(request)
        answers = [one for one in engine.run() if isinstance(one, Answer)]
        yield from sorted((one.request, one.index, one.tokens) for one in answers)


def killing(pool: Pool, results, kills: int, count: int) -> list:
    """The results of a generate during which actors are killed, evenly spread over its time."""
    came = []
    killed = set()
    for result in results:
        came.append(result)
        if len(killed) < kills and len(came) * (kills + 1) >= count * (len(killed) + 1):
            for victim in [member.pid for member in pool.members if member.pid not in killed][-1:]:
                os.kill(victim, signal.SIGKILL)
                killed.add(victim)
    assert len(killed) == kills
    return came


def test_actors_that_die_at_their_start_end_the_pool(cluster):  # the pool of later tests takes all places
    spec = replace(SPEC, device="nonsense")
    alone = replace(cluster, config=replace(cluster.config, max_restarts=0, nodes=1))
    with (
        pytest.raises(PoolFailure, match=r"1 actors died without an answer.*nonsense"),
        Pool.start(alone, spec, weights_of(0)),
    ):
        pass


@pytest.mark.bars
def test_an_actor_whose_model_lies_in_several_processes_is_replaced_when_one_of_them_dies(cluster):
    expected = list(answers_of_one(SPEC, requests(30)))
    alone = replace(cluster, config=replace(cluster.config, nodes=1))
    said: list[str] = []
    with Pool.start(alone, replace(SPEC, tp=2), weights_of(0), actors=1, warn=said.append) as pool:
        (member,) = pool.members
        ranks = psutil.Process(member.pid).children()
        assert len(ranks) == 1
        results = pool.generate(requests(30))
        came = [next(results)]
        ranks[0].kill()
        came += results
        came = sorted_results(came, requests(30))
        assert [(one.request, one.index, one.tokens) for one in came] == expected
        assert any("rank 1" in text and "SIGKILL" in text for text in said)
        later = psutil.Process(pool.members[0].pid).children()
    eventually("no process of the pool is left", lambda: not living([rank.pid for rank in [*ranks, *later]]))


@pytest.mark.heavy
def test_nothing_is_slept_through_while_there_is_work_or_none_is_left(pool, monkeypatch):
    """A moment's sleep is for pools without an actor."""
    slept: list[float] = []
    monkeypatch.setattr(pool_module, "time", SimpleNamespace(monotonic=time.monotonic, sleep=slept.append))
    assert len(list(pool.generate(requests(30)))) > 0
    assert not slept


def test_a_model_over_more_gpus_than_a_node_has_is_refused(cluster, monkeypatch):
    nodes = [replace(node, gpus=2) for node in cluster.nodes()]
    monkeypatch.setattr(RayCluster, "nodes", lambda self: nodes)
    spec = replace(SPEC, device="cuda", tp=4)
    with pytest.raises(ConfigError, match=r"^parallel\.tp=4: expected at most 2, the GPUs that one node has[^\n]*$"):
        Pool.start(cluster, spec, weights_of(0))


@pytest.mark.heavy
def test_actors_that_die_cost_no_answer_and_change_none(pool):
    undisturbed = sorted_results(pool.generate(requests(60)), requests(60))
    assert [(one.request, one.index) for one in undisturbed] == [
        (request.id, index) for request in requests(60) for index in range(request.n)
    ]
    assert all(isinstance(one, Answer) for one in undisturbed)
    disturbed = killing(pool, pool.generate(requests(60)), 2, 72)
    assert sorted_results(disturbed, requests(60)) == undisturbed


@pytest.mark.bars  # test_actors_that_die_cost_no_answer_and_change_none kills two
def test_ten_kills_during_a_thousand_requests(pool):
    undisturbed = sorted_results(pool.generate(requests(1000)), requests(1000))
    disturbed = killing(pool, pool.generate(requests(1000)), 10, 1200)
    assert len(disturbed) == 1200
    assert sorted_results(disturbed, requests(1000)) == undisturbed


def test_what_cannot_be_answered_is_refused_and_others_go_on(pool):
    asked = [*requests(4), Request("bad", []), Request("bad too", [99]), *requests(2)]
    results = list(pool.generate(asked))
    refused = {one.request: one.error for one in results if isinstance(one, Refusal)}
    assert refused.keys() == {"bad", "bad too"}
    assert refused["bad"].startswith("prompt is empty")
    assert refused["bad too"] == "prompt has token 99; expected 0 to 63"
    assert len(results) == sum(request.n for request in [*requests(4), *requests(2)]) + 2


@pytest.mark.heavy
def test_requests_are_pulled_as_there_is_room_and_a_call_can_be_left(pool):
    pulled = []
    results = pool.generate(pulled.append(one) or one for one in requests(100_000))
    first = next(results)
    assert len(pulled) < 100
    with pytest.raises(RuntimeError, match="one `generate` at a time"):
        next(pool.generate(requests(1)))
    with pytest.raises(RuntimeError, match="weights cannot change during `generate`"):
        pool.load_weights(weights_of(1), 1)
    results.close()
    assert first in list(pool.generate(requests(60)))


def test_new_weights_are_everybodys_also_of_an_actor_that_comes_later(pool):
    pool.load_weights(weights_of(1), 7)
    asked = list(requests(30))
    answers = sorted_results(killing(pool, pool.generate(asked), 1, 36), asked)
    assert {one.version for one in answers} == {7}
    pool.load_weights(weights_of(0), 8)
    old = sorted_results(pool.generate(asked), asked)
    assert {one.version for one in old} == {8}
    assert [one.tokens for one in old] != [one.tokens for one in answers]
    with pytest.raises(ArtefactError, match="another model"):
        pool.load_weights(weights_of(0, replace(MODEL, d_ff=80)), 9)
    pool.load_weights(weights_of(0), 8)


@pytest.mark.heavy
def test_a_pool_that_is_no_longer_wanted_stops(pool, monkeypatch):
    wanted = [True] * 8
    monkeypatch.setattr(pool, "_keep_going", lambda: bool(wanted and wanted.pop()))
    assert len(list(pool.generate(requests(100_000)))) < 1000
