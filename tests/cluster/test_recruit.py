"""Which nodes are left out, of those that are there and of those looked at."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dist_lm.cluster import recruit as module
from dist_lm.cluster.inspection import Demands, Inspection
from dist_lm.cluster.ray_cluster import Node
from dist_lm.cluster.recruit import recruit, sift

FOUND = Inspection(("a", "b", "c", "d"), unfit={0: "its clock is off"}, slow={0: "sends 1", 2: "sends 2"}, rates=())


def test_slow_nodes_are_left_out_only_where_others_could_come():
    assert sift(FOUND, spare=2, tolerated=()) == ({0: "its clock is off", 2: "sends 2"}, {})
    assert sift(FOUND, spare=1, tolerated=()) == ({0: "its clock is off"}, {2: "sends 2"})


def test_an_unfit_node_is_left_out_whether_there_are_others_or_not():
    assert sift(FOUND, spare=0, tolerated=())[0] == {0: "its clock is off"}


def test_a_slow_node_whose_replacement_was_busy_is_kept():
    assert sift(FOUND, spare=3, tolerated={2}) == ({0: "its clock is off"}, {2: "sends 2"})


@pytest.mark.parametrize(("nodes", "without"), [(4, set()), (3, {"c"})])
def test_a_suspect_is_left_out_only_where_enough_others_have_gpus(monkeypatch, nodes: int, without: set[str]):
    """A head without GPUs takes nobody's place."""
    found = [Node(name, f"10.0.0.{name}", cpus=8, gpus=0 if name == "head" else 8) for name in ("head", *"abcd")]
    asked: list[Any] = []
    monkeypatch.setattr(module, "place", lambda *given, without, **options: asked.append(without))
    cluster: Any = SimpleNamespace(nodes=lambda: found)
    demands = Demands(gpus=8, free_bytes=0, temporary_bytes=0, clock_skew_s=5.0, link_ratio=0.25)
    options: Any = {"gpus_per_node": 8, "directory": Path(), "demands": demands, "timeout_s": 1.0}
    assert recruit(cluster, nodes, avoid=["10.0.0.c"], **options) is None
    assert asked == [without]
