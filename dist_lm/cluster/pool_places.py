"""Where the actors of a pool go: how many on each node. Values only."""

from collections import Counter
from collections.abc import Mapping, Sequence

from dist_lm.cluster.ray_cluster import Node

AS_MANY = -1  # as many as its GPUs are enough for, or without GPUs one a node


def missing_places(
    nodes: Sequence[Node], taken: Mapping[str, int], wanted: int, most_nodes: int, gpus: int
) -> list[Node]:
    """Nodes for the actors that are not there yet, each the one with the fewest of those that have room.

    Args:
        nodes: alive.
        taken: actors by the id of their node.
        wanted: actors of the pool, or `AS_MANY`.
        most_nodes: that the pool may use.
        gpus: that an actor takes, all of one node; 0: it takes cores.
    """
    used = [node for node in nodes if taken.get(node.id)]
    able = [node for node in nodes if not taken.get(node.id) and _room(node, wanted, gpus)]
    chosen = [*used, *able[: max(0, most_nodes - len(used))]]
    count = Counter({node.id: taken.get(node.id, 0) for node in chosen})
    total = sum(_room(node, wanted, gpus) for node in chosen) if wanted == AS_MANY else wanted
    places = []
    while sum(count.values()) < total:
        free = [node for node in chosen if count[node.id] < _room(node, wanted, gpus)]
        if not free:
            break
        node = min(free, key=lambda node: count[node.id])
        count[node.id] += 1
        places.append(node)
    return places


def cores_of(node: Node, wanted: int, most_nodes: int, gpus: int) -> int:
    """CPU cores that an actor on `node` computes with."""
    if wanted == AS_MANY:
        return max(1, node.cpus // (node.gpus // gpus if gpus else 1))
    a_node = -(-wanted // most_nodes)
    return max(1, node.cpus // max(1, min(a_node, node.gpus // gpus if gpus else node.cpus)))


def _room(node: Node, wanted: int, gpus: int) -> int:
    if gpus:
        return node.gpus // gpus
    return min(1, node.cpus) if wanted == AS_MANY else node.cpus
