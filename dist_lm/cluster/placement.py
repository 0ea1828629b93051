"""One agent on each of N different nodes of a Ray cluster."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_lm.cluster.agent import NodeAgent
from dist_lm.cluster.ray_cluster import RayCluster
from dist_lm.cluster.ray_environment import ClusterError


@dataclass(frozen=True)
class Placement:
    """Agents in the order of their nodes' addresses, and these."""

    group: Any
    agents: Sequence[Any]
    addresses: Sequence[str]

    def release(self) -> None:
        """End the agents and give the nodes back."""
        import ray
        from ray.util import remove_placement_group

        for agent in self.agents:
            ray.kill(agent)
        remove_placement_group(self.group)


def place(cluster: RayCluster, nodes: int, gpus_per_node: int, directory: Path) -> Placement:
    """Reserve `nodes` nodes and start an agent on each.

    A bundle takes one CPU: ranks share the cores of their node, and Ray's count only keeps two gangs apart.

    Args:
        gpus_per_node: GPUs reserved on each node.
        directory: every node must see it.

    Raises:
        ClusterError: not so many nodes within cluster.start_timeout_s, or one that does not see `directory`.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util import placement_group, placement_group_table
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    bundle = {"CPU": 1.0} | ({"GPU": float(gpus_per_node)} if gpus_per_node else {})
    group = placement_group([bundle] * nodes, strategy="STRICT_SPREAD")
    remote = ray.remote(num_cpus=1, num_gpus=gpus_per_node, max_restarts=0, max_task_retries=0)(NodeAgent)
    agents = [
        remote.options(
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=node
            )
        ).remote()
        for node in range(nodes)
    ]
    placement = Placement(group, agents, ())
    try:
        deadline = time.monotonic() + cluster.config.start_timeout_s
        sees = ray.get(
            [agent.sees.remote(directory) for agent in agents], timeout=max(1.0, deadline - time.monotonic())
        )
        places = placement_group_table(group)["bundles_to_node_id"]
        order = {node.id: (index, node.address) for index, node in enumerate(cluster.nodes())}
        addresses = [order[places[bundle]][1] for bundle in range(nodes)]
        by_address = sorted(range(nodes), key=lambda bundle: order[places[bundle]][0])
    except GetTimeoutError:
        placement.release()
        found = cluster.nodes()
        raise ClusterError(
            f"cluster.nodes={nodes}: not free within cluster.start_timeout_s="
            f"{cluster.config.start_timeout_s:g}: the Ray cluster at {cluster.address} has {len(found)} "
            f"nodes and {sum(node.gpus for node in found)} GPUs; each node must have {bundle} free"
        ) from None
    except RayError as error:
        placement.release()
        reason = str(error).strip().splitlines()[-1]
        raise ClusterError(
            f"cluster: an agent did not start on a node of {cluster.address} ({reason}); every node needs the same "
            "dist_lm and packages as this one"
        ) from error
    except BaseException:
        placement.release()
        raise
    blind = [address for address, seen in zip(addresses, sees, strict=True) if not seen]
    if blind:
        placement.release()
        raise ClusterError(
            f"work_dir: node {blind[0]} does not see {directory}; it must lie on a file system that all nodes share"
        )
    return Placement(group, [agents[i] for i in by_address], [addresses[i] for i in by_address])
