"""The Ray cluster that a launch works on: a private one on this machine, or one that runs already.

Ray without a token lets anyone who reaches its port run code, so there is always one. Ray is imported inside
functions: a launch that needs no cluster does not pay for it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dist_lm.cluster.ray_join import joined_ray
from dist_lm.cluster.ray_private import private_ray
from dist_lm.config.cluster import ClusterConfig


@dataclass(frozen=True)
class Node:
    """A living node of the cluster."""

    id: str
    address: str
    cpus: int
    gpus: int


@dataclass(frozen=True)
class RayCluster:
    """A connection to Ray; `ray` calls of this process go there while it is open."""

    address: str  # host:port of the head
    config: ClusterConfig

    def nodes(self) -> list[Node]:
        """The nodes that are alive, in the order of their addresses."""
        import ray

        alive = [node for node in ray.nodes() if node["Alive"]]
        nodes = [
            Node(
                id=node["NodeID"],
                address=node["NodeManagerAddress"],
                cpus=int(node["Resources"].get("CPU", 0)),
                gpus=int(node["Resources"].get("GPU", 0)),
            )
            for node in alive
        ]
        return sorted(nodes, key=lambda node: (node.address, node.id))


@contextmanager
def connect(config: ClusterConfig) -> Iterator[RayCluster]:
    """Start a private Ray here (`cluster=local`) or join one (`cluster=ray`), for the time of the block.

    One at a time in a process. The environment is as before when the block is left.

    Raises:
        ClusterError: nothing answers at cluster.address within cluster.connect_timeout_s, or it refuses us.
    """
    with private_ray(config) if config.name == "local" else joined_ray(config) as address:
        yield RayCluster(address, config)
