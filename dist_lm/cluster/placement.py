"""One agent on each of N different nodes of a Ray cluster."""

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from dist_lm.cluster.agent import NodeAgent
from dist_lm.cluster.ray_cluster import Node, RayCluster
from dist_lm.cluster.ray_environment import ClusterError
from dist_lm.cluster.ray_errors import last_line

log = logging.getLogger(__name__)

_SLICE_S = 0.5  # between looks at whether the caller still wants to wait


class NoNodesError(ClusterError):
    """The cluster has not so many free nodes now."""


class AgentStartError(ClusterError):
    """An agent did not start on its node: it lacks packages, or has just died."""


@dataclass(frozen=True)
class Placement:
    """Agents in the order of their nodes' addresses, and these nodes."""

    group: Any
    agents: Sequence[Any]
    nodes: Sequence[Node]

    def release(self) -> None:
        """End the agents and give the nodes back."""
        import ray
        from ray.exceptions import RayError
        from ray.util import remove_placement_group

        for agent in self.agents:
            try:
                ray.kill(agent)
            except RayError as error:  # the group's end ends it too
                log.warning("an agent could not be ended: %s", error)
        remove_placement_group(self.group)


def place(
    cluster: RayCluster,
    nodes: int,
    gpus_per_node: int,
    *,
    without: Collection[str],
    timeout_s: float,
    wanted: Callable[[], bool],
) -> Placement | None:
    """Reserve `nodes` nodes and start an agent on each.

    A bundle takes one CPU: ranks share the cores of their node, and Ray's count only keeps two gangs apart.

    Args:
        gpus_per_node: GPUs reserved on each node.
        without: ids of nodes that must not be used.
        timeout_s: until they are free; agents have cluster.start_timeout_s to start after that.
        wanted: asked while waiting; None is returned once it says no.

    Raises:
        NoNodesError: not so many nodes within `timeout_s`.
        AgentStartError: an agent did not start on one of them.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util import placement_group, placement_group_table
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    bundle = {"CPU": 1.0} | ({"GPU": float(gpus_per_node)} if gpus_per_node else {})
    selector = {"ray.io/node-id": f"!in({','.join(sorted(without))})"} if without else {}
    group = placement_group([bundle] * nodes, strategy="STRICT_SPREAD", bundle_label_selector=[selector] * nodes)
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
        reserved = _wait([group.ready()], timeout_s, wanted)
        if reserved is False:
            raise NoNodesError(_shortage(cluster, nodes, bundle, len(without), timeout_s))
        up = [agent.ready.remote() for agent in agents]
        started = reserved and _wait(up, cluster.config.start_timeout_s, wanted)
        if started is None:
            placement.release()
            return None
        if not started:
            raise AgentStartError(
                f"cluster: agents did not start within cluster.start_timeout_s={cluster.config.start_timeout_s:g} s"
            )
        ray.get(up)
        places = placement_group_table(group)["bundles_to_node_id"]
        known = {node.id: node for node in cluster.nodes()}
        by_address = sorted(range(nodes), key=lambda i: (known[places[i]].address, places[i]))
    except (RayError, KeyError) as error:  # KeyError: a node that has just died
        placement.release()
        reason = last_line(error)
        raise AgentStartError(
            f"cluster: an agent did not start on a node of {cluster.address} ({reason}); every node needs the same "
            "dist_lm and packages as this one"
        ) from error
    except BaseException:
        placement.release()
        raise
    return Placement(group, [agents[i] for i in by_address], [known[places[i]] for i in by_address])


def _wait(references: Sequence[Any], timeout_s: float, wanted: Callable[[], bool]) -> bool | None:
    """Whether all of `references` are there within `timeout_s`; None: they are not wanted any more."""
    import ray

    deadline = time.monotonic() + timeout_s
    while len(ray.wait(list(references), num_returns=len(references), timeout=_SLICE_S)[0]) < len(references):
        if not wanted():
            return None
        if time.monotonic() > deadline:
            return False
    return True


def _shortage(cluster: RayCluster, nodes: int, bundle: dict[str, float], rejected: int, timeout_s: float) -> str:
    found = cluster.nodes()
    out = f", {rejected} of them left out" if rejected else ""
    return (
        f"cluster.nodes={nodes}: not free within {timeout_s:.0f} s: the Ray cluster at {cluster.address} has "
        f"{len(found)} nodes{out} and {sum(node.gpus for node in found)} GPUs; each node must have {bundle} free"
    )
