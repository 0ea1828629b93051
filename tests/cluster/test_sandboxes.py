"""Programs run on every node of a cluster, and elsewhere when a node is lost."""

import shutil
import sys
from concurrent.futures import CancelledError, Future, wait

import psutil
import pytest

from dist_lm.cluster import sandboxes as module
from dist_lm.cluster.ray_cluster import RayCluster, connect
from dist_lm.cluster.sandboxes import AHEAD, ClusterSandboxes, SandboxActor, SandboxNode, sandboxes_of
from dist_lm.config.cluster import ClusterConfig
from dist_lm.sandbox.pool import SandboxPool
from dist_lm.sandbox.program import Limits, Program, Test, infrastructure_error
from tests.cluster.loopback_ray import loopback_ray
from tests.cluster.waiting import eventually
from tests.patience import patient

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
LIMITS = Limits(cpu_s=5, wall_s=60)
DEADLINE_S = patient(60)


def programs(count: int) -> list[Program]:
    """One in three fails."""
    return [Program("python", f"print({i} * 2)", (Test(stdout=str(i * 2 + (i % 3 == 0))),)) for i in range(count)]


EXPECTED = ["failed" if i % 3 == 0 else "passed" for i in range(60)]


@pytest.mark.heavy
@pytest.mark.cluster
@pytest.mark.skipif(sys.platform != "linux", reason="other loopback addresses exist on Linux only")
def test_all_nodes_run_programs_and_a_lost_one_loses_none(tmp_path, caplog):
    with loopback_ray(tmp_path, nodes=2) as ray, connect(ray.config(nodes=2)) as cluster:
        eventually("two nodes", lambda: len(cluster.nodes()) == 2)
        found = sandboxes_of(cluster, 2, False)
        assert isinstance(found, ClusterSandboxes)
        with found as sandboxes:
            own, other = sandboxes._nodes
            eventually("the other node has begun", lambda: other.workers == 2)
            assert other.name == "node 127.0.0.3"
            ran = {place.name: counted(place) for place in (own, other)}
            assert [one.result().outcome for one in [sandboxes.submit(one, LIMITS) for one in programs(60)]] == EXPECTED
            assert all(ran.values()), ran
            assert sum(map(len, ran.values())) == 60
            futures = [sandboxes.submit(one, LIMITS) for one in programs(60)]
            ray.lose(1)
            assert [one.result().outcome for one in futures] == EXPECTED
            more = programs(6)  # in case the node had done its part before it was lost
            eventually(
                "the lost node is left out",
                lambda: (
                    [one.result() for one in [sandboxes.submit(one, LIMITS) for one in more]]
                    and sandboxes._nodes == [own]
                ),
            )
        assert "node 127.0.0.3 runs no programs of models any more: " in caplog.text


def counted(place: SandboxNode) -> list[Program]:
    """The programs that a place is given from now on."""
    given, run = [], place.run
    place.run = lambda program, limits: given.append(program) or run(program, limits)
    return given


def test_a_place_that_fails_is_left_out_and_the_least_busy_one_is_given_work(monkeypatch, caplog):
    """Without Ray: places that never answer, and one that is lost with its first program."""
    silent = SandboxNode("silent", lambda *_: Future(), workers=2)
    lost = SandboxNode("lost", lambda *_: failed("the node has died"), workers=8)
    monkeypatch.setattr(ClusterSandboxes, "_start_actors", lambda self: self._nodes.extend((silent, lost)))
    cluster = RayCluster("", ClusterConfig(name="local"))
    with ClusterSandboxes(cluster, workers=2) as sandboxes:
        futures = [sandboxes.submit(one, LIMITS) for one in programs(12)]
        eventually("all are given out", lambda: sum(one.done() for one in futures) == 12 - silent.running)
        assert 0 < silent.running <= AHEAD * silent.workers
        assert [one.name for one in sandboxes._nodes] == ["this node", "silent"]
        done = [(one.result().outcome, place) for place, one in enumerate(futures) if one.done()]
        assert [outcome for outcome, _ in done] == [EXPECTED[place] for _, place in done]
    assert "lost runs no programs of models any more: the node has died" in caplog.text


@pytest.fixture
def alone(monkeypatch) -> ClusterSandboxes:
    """The sandboxes of this node, one at once, and nodes that never answer."""
    silent = SandboxNode("silent", lambda *_: Future(), workers=1)
    monkeypatch.setattr(ClusterSandboxes, "_start_actors", lambda self: self._nodes.append(silent))
    return ClusterSandboxes(RayCluster("", ClusterConfig(name="local")), workers=1)


def test_nobody_waits_for_verdicts_of_sandboxes_that_were_closed(alone):
    with alone as sandboxes:
        futures = [sandboxes.submit(one, LIMITS) for one in programs(20)]
        eventually("all that can be are given out", lambda: sandboxes._running)
    assert wait(futures, timeout=DEADLINE_S).not_done == set()
    closed = [one for one in futures if isinstance(one.exception(), CancelledError)]
    assert 0 < len(closed) <= 20


def test_a_program_that_was_cancelled_does_not_run(alone):
    given: list[Future] = []
    verdict = infrastructure_error(Program("python", ""), "none")
    with alone as sandboxes:
        sandboxes._nodes[0].run = lambda *_: given.append(Future()) or given[-1]
        futures = [sandboxes.submit(one, LIMITS) for one in programs(6)]
        eventually("all that can be are given out", lambda: len(sandboxes._running) == 4)
        assert [one.cancel() for one in futures] == [False] * 4 + [True] * 2
        last = sandboxes.submit(programs(1)[0], LIMITS)
        given[0].set_result(verdict)
        eventually("the last is given out", lambda: len(given) == 3)
        given[2].set_result(verdict)
        assert last.result(DEADLINE_S) is verdict
    assert wait(futures, timeout=DEADLINE_S).not_done == set()
    assert [one.cancelled() for one in futures] == [False] * 4 + [True] * 2


def test_an_actor_that_is_closed_leaves_no_process(monkeypatch):
    monkeypatch.setattr(module, "die_with_parent", lambda: None)
    before = {one.pid for one in psutil.Process().children()}
    actor = SandboxActor(2, False)
    assert actor.run(programs(2)[1], LIMITS).outcome == "passed"
    [server] = [one for one in psutil.Process().children() if one.pid not in before]
    actor.close()
    assert not server.is_running()


def failed(reason: str) -> Future:
    future: Future = Future()
    future.set_exception(OSError(reason))
    return future


def test_a_single_node_needs_no_actors():
    assert isinstance(sandboxes_of(None, 3, False), SandboxPool)
