"""How ranks and actors share the nodes of a cluster, and refusals that name a remedy."""

from collections import Counter

import pytest

from dist_lm.cluster.allocation import (
    Reserved,
    Site,
    actors_in_all,
    core_users,
    missing_places,
    ranks_per_node_with_pool,
    site_of,
)
from dist_lm.cluster.ray_cluster import Node
from dist_lm.config.cluster import ClusterConfig
from dist_lm.config.pool import AS_MANY, RolloutPoolConfig
from dist_lm.errors import ConfigError


def nodes(count: int, cpus: int = 8, gpus: int = 0) -> list[Node]:
    return [Node(f"id{i}", f"10.0.0.{i}", cpus, gpus) for i in range(count)]


def ranks(pool: RolloutPoolConfig, found: list[Node], gpus: int = 0, **cluster: int) -> int:
    return ranks_per_node_with_pool(pool, ClusterConfig(name="local", **cluster), found, gpus)


@pytest.mark.parametrize(
    ("pool", "found", "gpus", "cluster", "expected"),
    [
        (RolloutPoolConfig(actors=1), nodes(1, cpus=2), 0, {}, 1),  # a core each
        (RolloutPoolConfig(actors=1), nodes(1, cpus=8), 0, {}, 2),
        (RolloutPoolConfig(actors=0), nodes(1, cpus=2), 0, {"ranks_per_node": 2}, 2),
        (RolloutPoolConfig(actors=1, placement="shared"), nodes(1, cpus=2), 0, {"ranks_per_node": 2}, 2),
        (RolloutPoolConfig(actors=-1, placement="shared"), nodes(1, cpus=2), 0, {}, 2),
        (RolloutPoolConfig(actors=-1, placement="shared"), nodes(1, cpus=16, gpus=8), 8, {}, 8),
        (RolloutPoolConfig(actors=2), nodes(1, gpus=8), 8, {}, 6),
        (RolloutPoolConfig(actors=2, tp=2), nodes(1, gpus=8), 8, {}, 4),
        (RolloutPoolConfig(actors=3), nodes(2, gpus=8), 8, {"nodes": 2}, 6),  # two actors on one of the nodes
        (RolloutPoolConfig(actors=8), nodes(3, gpus=8), 8, {"nodes": 2}, 8),  # a node of their own
        (RolloutPoolConfig(actors=4, placement="shared"), nodes(1, gpus=8), 8, {}, 8),
    ],
)
def test_ranks_take_what_the_pool_leaves(pool, found, gpus, cluster, expected):
    assert ranks(pool, found, gpus, **cluster) == expected


@pytest.mark.parametrize(
    ("pool", "found", "gpus", "cluster"),
    [
        (RolloutPoolConfig(actors=1), nodes(1, cpus=1), 0, {}),  # the agent has the only CPU
        (RolloutPoolConfig(actors=-1, placement="shared"), nodes(1, cpus=8, gpus=8), 8, {}),  # the agent has one CPU
        (RolloutPoolConfig(actors=8), nodes(1, cpus=16, gpus=8), 8, {}),  # no GPU is left for a rank
        (RolloutPoolConfig(actors=1), nodes(1, gpus=8), 8, {"ranks_per_node": 8}),
        (RolloutPoolConfig(actors=2, tp=4), nodes(1, gpus=8), 8, {"ranks_per_node": 2}),
    ],
)
def test_no_room_is_refused_in_one_line_with_the_way_out(pool, found, gpus, cluster):
    with pytest.raises(ConfigError, match=r"^rlhf\.pool\.actors=\d+: [^\n]*rlhf\.pool\.actors=0 generates[^\n]*$"):
        ranks(pool, found, gpus, **cluster)


def test_as_many_actors_as_ranks_have_gpus_for_only_where_they_are_shared():
    shared = RolloutPoolConfig(actors=-1, placement="shared", tp=2)
    assert [actors_in_all(shared, nodes=3, gpus=gpus) for gpus in (8, 1, 0)] == [12, 3, 3]
    with pytest.raises(ConfigError, match=r"^rlhf\.pool\.actors=-1: expected"):
        RolloutPoolConfig(actors=-1)


def test_cores_are_divided_among_ranks_and_actors_only_where_they_work_at_the_same_time():
    disjoint, shared = RolloutPoolConfig(actors=2), RolloutPoolConfig(actors=2, placement="shared")
    assert core_users(disjoint, nodes=1, ranks=2, gpus=0) == 4
    assert core_users(disjoint, nodes=2, ranks=2, gpus=0) == 3
    assert core_users(disjoint, nodes=1, ranks=2, gpus=2) == 0
    assert core_users(shared, nodes=1, ranks=2, gpus=0) == 0
    node = nodes(1, cpus=8)[0]
    assert site_of(disjoint, ["10.0.0.0"], 2, "cpu").cores(node, cores_of_pool=8) == 2
    assert site_of(shared, ["10.0.0.0"], 2, "cpu").cores(node, cores_of_pool=8) == 8


def test_actors_go_where_the_gang_has_reserved_nothing():
    found, reserved = nodes(2, cpus=4, gpus=8), {"id0": Reserved(cpus=1, gpus=8), "id1": Reserved(cpus=1, gpus=6)}
    site = site_of(RolloutPoolConfig(actors=4), ["10.0.0.0", "10.0.0.1"], 8, "cuda")
    places = missing_places(site.nodes(found, reserved), {}, pool_size=4, most_nodes=9, gpus=1)
    assert [node.id for node in places] == ["id1", "id1"]
    assert Site().nodes(found, reserved) == found  # a pool that is alone waits for all of it


def test_actors_that_share_gpus_go_to_the_gangs_nodes_each_to_others():
    found, reserved = nodes(3, cpus=4, gpus=4), {"id1": Reserved(cpus=1, gpus=4)}
    site = site_of(RolloutPoolConfig(actors=3, placement="shared"), ["10.0.0.1"], 4, "cuda")
    usable = site.nodes(found, reserved)
    assert [node.id for node in usable] == ["id1"]
    assert len(missing_places(usable, {}, pool_size=3, most_nodes=9, gpus=0)) == 3  # the CPUs that are left
    assert [site.devices(found[1], 1, ordinal) for ordinal in range(5)] == [(3,), (2,), (1,), (0,), (3,)]
    assert [site.devices(found[1], 2, ordinal) for ordinal in range(2)] == [(2, 3), (0, 1)]
    assert Site().devices(found[1], 1, 0) == ()


@pytest.mark.parametrize(
    ("wanted", "most_nodes", "gpus", "taken", "expected"),
    [
        (AS_MANY, 9, 1, {}, {"a": 2, "b": 4}),
        (AS_MANY, 9, 2, {}, {"a": 1, "b": 2}),
        (AS_MANY, 9, 3, {}, {"b": 1}),
        (AS_MANY, 9, 5, {}, {}),
        (AS_MANY, 9, 0, {}, {"a": 1, "b": 1, "c": 1}),
        (AS_MANY, 9, 1, {"a": 2, "b": 1}, {"b": 3}),
        (3, 9, 1, {}, {"a": 2, "b": 1}),
        (3, 9, 0, {"c": 2}, {"a": 1}),
        (5, 1, 0, {}, {"a": 4}),  # no more than cores
        (AS_MANY, 1, 1, {"b": 3}, {"b": 1}),  # nodes in use first
        (AS_MANY, 2, 0, {"c": 1}, {"a": 1}),
    ],
)
def test_actors_are_spread_over_nodes(wanted, most_nodes, gpus, taken, expected):
    found = [Node("a", "1", 4, 2), Node("b", "2", 8, 4), Node("c", "3", 4, 0)]
    places = missing_places(found, taken, wanted, most_nodes, gpus)
    assert Counter(node.id for node in places) == expected
