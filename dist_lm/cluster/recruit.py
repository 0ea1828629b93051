"""Finding nodes fit to run ranks: placed, looked at, and without the bad ones where there are others."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from dist_lm.cluster.inspection import inspect
from dist_lm.cluster.node_checks import Demands
from dist_lm.cluster.placement import AgentStartError, NoNodesError, Placement, place
from dist_lm.cluster.ray_cluster import Node, RayCluster
from dist_lm.cluster.ray_environment import ClusterError

STARTS = 3  # how often agents are started before their failure is believed


@dataclass(frozen=True)
class Crew:
    """Nodes that are ready to run ranks; agents wait on them."""

    placement: Placement
    hosts: tuple[str, ...]
    link_rates: tuple[float, ...]  # bytes per second
    left_out: frozenset[str] = frozenset()  # unfit nodes, by Ray's id


def recruit(
    cluster: RayCluster,
    nodes: int,
    *,
    gpus_per_node: int,
    directory: Path,
    demands: Demands,
    timeout_s: float,
    avoid: Collection[str] = (),
    wanted: Callable[[], bool] = lambda: True,
    warn: Callable[[str], None] = lambda text: None,
) -> Crew | None:
    """`nodes` nodes that pass inspection. A bad one is named, and left out when another can take its place.

    Args:
        directory: of the run.
        avoid: addresses of nodes that are taken only where there are not enough others.
        wanted: asked while waiting; None is returned once it says no.
        warn: told about nodes that are left out.

    Raises:
        NoNodesError: not so many nodes within `timeout_s`.
        ClusterError: so many nodes are there, but not so many are fit.
    """
    deadline = time.monotonic() + timeout_s
    left_out: dict[str, str] = {}  # by Ray's id of the node: what is wrong with it
    starts = 0
    while True:
        alive = cluster.nodes()
        without = {node.id for node in alive if node.id in left_out}
        avoided = {node.id for node in alive if node.address in avoid}
        if len(alive) - len(without | avoided) >= nodes:
            without |= avoided
        left_s = max(1.0, deadline - time.monotonic())
        try:
            placement = place(cluster, nodes, gpus_per_node, without=without, timeout_s=left_s, wanted=wanted)
        except NoNodesError as error:
            if len(alive) >= nodes and left_out:
                raise ClusterError(f"cluster.nodes={nodes}: {'; '.join(left_out.values())}") from error
            raise
        except AgentStartError as error:
            starts += 1  # the first time the node may have died just then, which Ray will notice
            if starts == STARTS or time.monotonic() > deadline:
                raise
            warn(f"{error}; trying again")
            continue
        if placement is None:
            return None
        try:
            found = inspect(placement, directory, demands, cluster.config.link_check_mib << 20)
        except BaseException:
            placement.release()
            raise
        named = {i: _name(found.hosts[i], node) for i, node in enumerate(placement.nodes)}
        spare = len(alive) - len(left_out) - nodes
        bad = dict(found.unfit)
        for node, reason in found.slow.items():
            if len(bad) < spare:
                bad[node] = reason
            else:
                warn(f"node {named[node]} {reason}")
        if not bad:
            return Crew(placement, tuple(found.hosts), tuple(found.rates), frozenset(left_out))
        placement.release()
        for node, reason in bad.items():
            left_out[placement.nodes[node].id] = f"node {named[node]}: {reason}"
        if len(bad) > spare:
            raise ClusterError(f"cluster.nodes={nodes}: {'; '.join(left_out.values())}")
        for node, reason in bad.items():
            warn(f"node {named[node]} is left out: {reason}")


def _name(host: str, node: Node) -> str:
    return host if host == node.address else f"{host} ({node.address})"
