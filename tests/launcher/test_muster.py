"""Which nodes a shrunk run takes for room to grow."""

import io
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from dist_lm.cluster.inspection import Demands
from dist_lm.cluster.ray_cluster import ClusterError, Node
from dist_lm.cluster.recruit import Crew, Placement
from dist_lm.launcher import muster as muster_module
from dist_lm.launcher.muster import Muster, demands_of
from dist_lm.launcher.process import Interrupt
from dist_lm.model.size import parameter_count
from dist_lm.prepare.compose import compose_config
from dist_lm.tracking.console import Console
from tests.conftest import TINY


@dataclass
class Nodes:
    """A cluster of nodes that are named by letters."""

    names: str
    config: object = None
    address: str = "127.0.0.2:6400"
    asked: list[int] = field(default_factory=list)

    def nodes(self) -> list[Node]:
        """Those with capital letters have a GPU."""
        return [Node(name, f"10.0.0.{ord(name.lower()) - 96}", cpus=2, gpus=name.isupper()) for name in self.names]


def crew(cluster: Nodes, names: str, left_out: str = "") -> Crew:
    nodes = [node for node in cluster.nodes() if node.id in names]
    return Crew(Placement(None, [], nodes), tuple(names), (), frozenset(left_out))


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [1000.0]
    # Only the module's name: a server that lives beside this test would sleep by a clock that jumps.
    monkeypatch.setattr(muster_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def muster_of(cluster: Nodes, errors: io.StringIO | None = None, gpus_per_node: int = 0) -> Muster:
    settings = ["cluster=ray", "cluster.address=h:1", "cluster.nodes=3", "cluster.min_nodes=1"]
    if gpus_per_node:
        settings += ["device=cuda", f"cluster.ranks_per_node={gpus_per_node}"]
    config = compose_config(["stage=language", *TINY, *settings, "cluster.grow_after_s=30"])
    console = Console(errors=errors or io.StringIO())
    return Muster(cluster, config, [3, 2, 1], Interrupt(), console)  # pyright: ignore[reportArgumentType]


def test_a_node_counts_when_it_has_been_there_for_a_while(clock):
    cluster = Nodes("a")
    muster = muster_of(cluster)
    assert muster.room_to_grow(crew(cluster, "a")) is None
    cluster.names = "abc"
    assert muster.room_to_grow(crew(cluster, "a")) is None
    clock[0] += 31
    assert muster.room_to_grow(crew(cluster, "a")) == 3
    assert muster.room_to_grow(crew(cluster, "abc")) is None


def test_a_lost_node_does_not_count_until_it_is_back_under_another_id(clock):
    cluster = Nodes("ab")
    muster = muster_of(cluster)
    muster.lose("b")
    muster.room_to_grow(crew(cluster, "a"))
    clock[0] += 31
    assert muster.room_to_grow(crew(cluster, "a")) is None
    cluster.names = "ac"
    muster.room_to_grow(crew(cluster, "a"))
    clock[0] += 31
    assert muster.room_to_grow(crew(cluster, "a")) == 2


def test_an_unfit_node_is_no_room_and_a_growth_in_vain_is_not_repeated_at_once(clock, monkeypatch):
    cluster = Nodes("abc")
    muster = muster_of(cluster)
    monkeypatch.setattr(muster, "_recruit", lambda nodes, timeout_s, avoid: crew(cluster, "a", left_out="b"))
    muster.room_to_grow(crew(cluster, "a"))
    clock[0] += 31
    assert muster.room_to_grow(crew(cluster, "a")) == 3
    assert muster.call((), 3) is not None  # one node only
    assert muster.room_to_grow(crew(cluster, "a")) is None  # c was seen 31 s ago, 60 s are asked now
    clock[0] += 31
    assert muster.room_to_grow(crew(cluster, "a")) == 2  # b is not counted


def test_what_could_not_be_inspected_is_said_once(monkeypatch):
    def recruit(cluster: Nodes, nodes: int, *, demands: Demands, note, **_) -> Crew:
        assert (demands.tried, demands.burn_s) == (0, 2.0)  # there are no GPUs
        note("the health of GPUs is not read")
        return crew(cluster, "abc")

    monkeypatch.setattr(muster_module, "recruit", recruit)
    errors = io.StringIO()
    muster = muster_of(Nodes("abc"), errors)
    for _ in range(3):
        assert muster.call(()) is not None
    assert errors.getvalue().count("not read") == 1


def test_a_run_shrinks_to_the_nodes_that_have_gpus(monkeypatch):
    def recruit(muster: Muster, nodes: int, *rest) -> Crew:
        asked.append(nodes)
        if nodes == 3:
            raise ClusterError("too few")
        return crew(cluster, "B")

    cluster, asked = Nodes("aB"), []
    monkeypatch.setattr(Muster, "_recruit", recruit)
    assert muster_of(cluster, gpus_per_node=1).call(()) is not None
    assert asked == [3, 1]


@pytest.mark.heavy
def test_a_node_has_room_for_a_checkpoint_also_for_the_last_one_and_for_an_average():
    def room(*settings: str) -> int:
        demands = demands_of(compose_config(["stage=language", *TINY, *settings]), 0)
        return demands.free_bytes - demands.temporary_bytes

    plain = room()
    assert plain == 12 * parameter_count(compose_config(["stage=language", *TINY]).model)
    assert room("stage.checkpoint_every=0") == plain
    assert room("stage.ema_decay=0.9") == plain * 16 // 12


def test_every_gpu_that_a_rank_takes_is_tried():
    config = compose_config(["stage=language", *TINY, "cluster.gpu_check_s=3"])
    demands = demands_of(config, 8)
    assert (demands.gpus, demands.tried, demands.burn_s, demands.device) == (8, 8, 3.0, "cuda")
