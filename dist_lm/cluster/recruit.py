"""Recruitment of nodes for a gang: reserve them, start an agent on each, inspect them, and replace unfit ones."""

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_lm.cluster.agent import NodeAgent
from dist_lm.cluster.inspection import Demands, Inspection, inspect
from dist_lm.cluster.ray_cluster import ClusterError, Node, RayCluster, bundle_of, last_line

log = logging.getLogger(__name__)

SLICE_S = 0.5  # between two calls of `keep_going`
SPARE_S = 10.0  # wait for a node in place of a slow one
STARTS = 3  # attempts at starting agents


class NoNodesError(ClusterError):
    """The cluster does not have that many free nodes now."""


class AgentStartError(ClusterError):
    """An agent did not start on its node, which lacks packages or has just died."""


@dataclass(frozen=True)
class Placement:
    """A reservation with one agent on each node, ordered by the nodes' addresses."""

    group: Any
    agents: Sequence[Any]
    nodes: Sequence[Node]

    def release(self) -> None:
        """Ends the agents and frees the nodes; an agent that cannot be ended is only logged."""
        import ray
        from ray.exceptions import RayError
        from ray.util import remove_placement_group

        for agent in self.agents:
            try:
                ray.kill(agent)
            except RayError as error:  # removing the group ends it too
                log.warning("could not end an agent: %s", error)
        remove_placement_group(self.group)


@dataclass(frozen=True)
class Crew:
    """Nodes that are ready to run ranks, with an agent on each."""

    placement: Placement
    hosts: tuple[str, ...]
    link_rates: tuple[float, ...]  # bytes per second
    left_out: frozenset[str] = frozenset()  # Ray's ids of unfit nodes


def able_nodes(cluster: RayCluster, gpus_per_node: int) -> list[Node]:
    """Returns the living nodes that have GPUs for a gang's ranks; a head often has none."""
    return [node for node in cluster.nodes() if node.gpus >= gpus_per_node]


def recruit(
    cluster: RayCluster,
    nodes: int,
    *,
    gpus_per_node: int,
    directory: Path,
    demands: Demands,
    timeout_s: float,
    avoid: Collection[str] = (),
    keep_going: Callable[[], bool] = lambda: True,
    warn: Callable[[str], None] = lambda text: None,
    note: Callable[[str], None] = lambda text: None,
) -> Crew | None:
    """Finds `nodes` nodes that pass inspection; the caller releases them. None if `keep_going` returned False.

    An unfit node is named, and left out if another can replace it. A slow one is kept if no other is free.

    Args:
        directory: the run directory.
        avoid: addresses of nodes to use only if there are not enough others.
        keep_going: asked while waiting.
        warn: receives a line for each node that is left out or is slow and kept, and for each failed start.
        note: receives what could not be inspected.

    Raises:
        NoNodesError: fewer free nodes within `timeout_s`.
        AgentStartError: agents did not start several times.
        ClusterError: enough nodes, but too few that are fit, or an all-reduce over all of them gives no result.
        OSError: the run directory cannot be written.
    """
    deadline = time.monotonic() + timeout_s
    left_out: dict[str, str] = {}  # reason by Ray's node id
    slow_ids: set[str] = set()  # nodes in `left_out` that are slow but usable
    tolerated_ids: set[str] = set()  # slow nodes that are used because no other is free
    failed_starts = 0
    while True:
        # Avoided nodes are left out only while there are enough others.
        alive = able_nodes(cluster, gpus_per_node)
        excluded_ids = {node.id for node in alive if node.id in left_out}
        avoided_ids = {node.id for node in alive if node.address in avoid}
        if len(alive) - len(excluded_ids | avoided_ids) >= nodes:
            excluded_ids |= avoided_ids

        # Nobody waits long for a better node than a slow one.
        wait_s = max(1.0, deadline - time.monotonic())
        if slow_ids:
            wait_s = min(wait_s, SPARE_S)
        try:
            placement = place(
                cluster, nodes, gpus_per_node, without=excluded_ids, timeout_s=wait_s, keep_going=keep_going
            )
        except NoNodesError as error:
            if slow_ids:
                tolerated_ids |= slow_ids
                left_out = {node_id: reason for node_id, reason in left_out.items() if node_id not in slow_ids}
                slow_ids = set()
                continue
            if len(alive) >= nodes and left_out:
                raise ClusterError(f"cluster.nodes={nodes}: {'; '.join(left_out.values())}") from error
            raise
        except AgentStartError as error:
            # The node may just have died, which Ray notices after a while.
            failed_starts += 1
            if failed_starts == STARTS or time.monotonic() > deadline:
                raise
            warn(f"{error}; trying again")
            continue
        if placement is None:
            return None

        link_bytes = cluster.config.link_check_mib << 20
        try:
            inspection = inspect(placement.agents, placement.nodes, directory, demands, link_bytes, keep_going)
        except BaseException:
            placement.release()
            raise
        if inspection is None:
            placement.release()
            return None
        for text in inspection.notes:
            note(text)

        name_of = {i: _name(inspection.hosts[i], node) for i, node in enumerate(placement.nodes)}
        id_of = {i: node.id for i, node in enumerate(placement.nodes)}
        n_spare = len(alive) - len(left_out) - nodes
        tolerated = {i for i, node_id in id_of.items() if node_id in tolerated_ids}
        rejected, accepted_slow = sift(inspection, n_spare, tolerated)
        for node, reason in accepted_slow.items():
            warn(f"node {name_of[node]} {reason}")
        if not rejected:
            return Crew(placement, tuple(inspection.hosts), tuple(inspection.rates), frozenset(left_out))

        # Try again with other nodes in place of the rejected ones.
        placement.release()
        for node, reason in rejected.items():
            left_out[id_of[node]] = f"node {name_of[node]}: {reason}"
            if node not in inspection.unfit:
                slow_ids.add(id_of[node])
        if len(rejected) > n_spare:
            raise ClusterError(f"cluster.nodes={nodes}: {'; '.join(left_out.values())}")
        for node, reason in rejected.items():
            warn(f"node {name_of[node]} is left out: {reason}")


def sift(inspection: Inspection, spare: int, tolerated: Collection[int]) -> tuple[dict[int, str], dict[int, str]]:
    """Returns (nodes to leave out, slow nodes to keep), each with the reason, by node of the gang.

    Unfit nodes are left out in any case, slow ones only if others can replace them.

    Args:
        spare: largest number of nodes that could replace others.
        tolerated: slow nodes to keep in any case.
    """
    rejected = dict(inspection.unfit)
    accepted_slow: dict[int, str] = {}
    for node, reason in inspection.slow.items():
        if node in rejected:
            continue
        if len(rejected) < spare and node not in tolerated:
            rejected[node] = reason
        else:
            accepted_slow[node] = reason
    return rejected, accepted_slow


def place(
    cluster: RayCluster,
    nodes: int,
    gpus_per_node: int,
    *,
    without: Collection[str],
    timeout_s: float,
    keep_going: Callable[[], bool],
) -> Placement | None:
    """Reserves `nodes` nodes and starts an agent on each.

    A bundle takes one CPU only: the ranks use all cores of their node, and the CPU just keeps two gangs apart.

    Args:
        gpus_per_node: GPUs to reserve on each node.
        without: ids of nodes that must not be used.
        timeout_s: until the nodes are free; the agents may take cluster.start_timeout_s more to start.
        keep_going: asked while waiting; if it returns False the result is None.

    Raises:
        NoNodesError: fewer free nodes within `timeout_s`.
        AgentStartError: an agent did not start on its node.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util import placement_group, placement_group_table
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    # Ray places the agents by itself as soon as the nodes are free, one on each node.
    bundle = bundle_of(gpus_per_node)
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
        reserved = _wait([group.ready()], timeout_s, keep_going)
        if reserved is False:
            raise NoNodesError(_shortage(cluster, nodes, bundle, len(without), timeout_s))
        ready = [agent.ready.remote() for agent in agents]
        started = reserved and _wait(ready, cluster.config.start_timeout_s, keep_going)
        if started is None:
            placement.release()
            return None
        if not started:
            raise AgentStartError(
                f"cluster: agents did not start within cluster.start_timeout_s={cluster.config.start_timeout_s:g} s"
            )
        ray.get(ready)

        # Nodes are numbered by address, so that a restart on the same nodes has the same ranks on each.
        id_of_bundle = placement_group_table(group)["bundles_to_node_id"]
        node_of = {node.id: node for node in cluster.nodes()}
        by_address = sorted(range(nodes), key=lambda i: (node_of[id_of_bundle[i]].address, id_of_bundle[i]))
    except (RayError, KeyError) as error:  # KeyError: a node has just died
        placement.release()
        raise AgentStartError(
            f"cluster: an agent did not start on a node of {cluster.address} ({last_line(error)}); every node needs "
            "the same dist_lm and packages as this one"
        ) from error
    except BaseException:
        placement.release()
        raise
    return Placement(group, [agents[i] for i in by_address], [node_of[id_of_bundle[i]] for i in by_address])


def _wait(references: Sequence[Any], timeout_s: float, keep_going: Callable[[], bool]) -> bool | None:
    """Returns whether all `references` are ready within `timeout_s`; None if `keep_going` returned False."""
    import ray

    deadline = time.monotonic() + timeout_s
    while len(ray.wait(list(references), num_returns=len(references), timeout=SLICE_S)[0]) < len(references):
        if not keep_going():
            return None
        if time.monotonic() > deadline:
            return False
    return True


def _shortage(cluster: RayCluster, nodes: int, bundle: dict[str, float], rejected: int, timeout_s: float) -> str:
    alive = cluster.nodes()
    left_out = f", {rejected} nodes left out" if rejected else ""
    return (
        f"cluster.nodes={nodes}: not free within {timeout_s:.0f} s: the Ray cluster at {cluster.address} has "
        f"{len(alive)} nodes{left_out} and {sum(node.gpus for node in alive)} GPUs; each node must have {bundle} free"
    )


def _name(host: str, node: Node) -> str:
    return host if host == node.address else f"{host} ({node.address})"
