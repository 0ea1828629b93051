"""Finding nodes fit to run ranks: placed, looked at, and without the bad ones where there are others."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from dist_lm.cluster.inspection import Inspection, inspect
from dist_lm.cluster.node_checks import Demands
from dist_lm.cluster.placement import AgentStartError, NoNodesError, Placement, place
from dist_lm.cluster.ray_cluster import Node, RayCluster
from dist_lm.cluster.ray_environment import ClusterError

SPARE_S = 10.0  # how long others are waited for in place of a slow node
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
    slow_ones: set[str] = set()  # of them, those that will do if there are no others
    tolerated: set[str] = set()  # those of which that has turned out
    starts = 0
    while True:
        alive = cluster.nodes()
        without = {node.id for node in alive if node.id in left_out}
        avoided = {node.id for node in alive if node.address in avoid}
        if len(alive) - len(without | avoided) >= nodes:
            without |= avoided
        left_s = max(1.0, deadline - time.monotonic())
        if slow_ones:
            left_s = min(left_s, SPARE_S)
        try:
            placement = place(cluster, nodes, gpus_per_node, without=without, timeout_s=left_s, wanted=wanted)
        except NoNodesError as error:
            if slow_ones:  # the others are busy: better slow than not at all
                tolerated |= slow_ones
                left_out = {id_: reason for id_, reason in left_out.items() if id_ not in slow_ones}
                slow_ones = set()
                continue
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
            found = inspect(placement, directory, demands, cluster.config.link_check_mib << 20, wanted)
        except BaseException:
            placement.release()
            raise
        if found is None:
            placement.release()
            return None
        named = {i: _name(found.hosts[i], node) for i, node in enumerate(placement.nodes)}
        ids = {i: node.id for i, node in enumerate(placement.nodes)}
        spare = len(alive) - len(left_out) - nodes
        bad, kept = sift(found, spare, {i for i, id_ in ids.items() if id_ in tolerated})
        for node, reason in kept.items():
            warn(f"node {named[node]} {reason}")
        if not bad:
            return Crew(placement, tuple(found.hosts), tuple(found.rates), frozenset(left_out))
        placement.release()
        for node, reason in bad.items():
            left_out[ids[node]] = f"node {named[node]}: {reason}"
            if node not in found.unfit:
                slow_ones.add(ids[node])
        if len(bad) > spare:
            raise ClusterError(f"cluster.nodes={nodes}: {'; '.join(left_out.values())}")
        for node, reason in bad.items():
            warn(f"node {named[node]} is left out: {reason}")


def sift(found: Inspection, spare: int, tolerated: Collection[int]) -> tuple[dict[int, str], dict[int, str]]:
    """(nodes to leave out, slow ones to keep) by place in the gang, and why.

    Args:
        spare: nodes that could take their places, at most.
        tolerated: slow nodes that are kept in any case.
    """
    bad, kept = dict(found.unfit), {}
    for node, reason in found.slow.items():
        if node in bad:
            continue
        if len(bad) < spare and node not in tolerated:
            bad[node] = reason
        else:
            kept[node] = reason
    return bad, kept


def _name(host: str, node: Node) -> str:
    return host if host == node.address else f"{host} ({node.address})"
