"""What is wrong with a node, from what it says about itself: pure comparisons."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dist_lm.cluster.node_facts import NodeFacts


@dataclass(frozen=True)
class Demands:
    """What a node must have to run ranks of a gang."""

    gpus: int  # at least
    free_bytes: int  # in the run directory: a checkpoint and its successor
    temporary_bytes: int  # for temporary files
    clock_skew_s: float  # most that its clock may differ from the driver's
    link_ratio: float  # a link slower than this share of the usual one is slow


@dataclass(frozen=True)
class Trip:
    """When a question to a node was sent and answered, by the driver's clock, in seconds since 1970."""

    sent: float
    answered: float


def complaints(facts: NodeFacts, driver: NodeFacts, demands: Demands, trip: Trip, directory: str) -> list[str]:
    """Why ranks must not be started on a node; empty if they may.

    Args:
        driver: the facts of the machine that starts the gang.
        directory: of the run.
    """
    found = []
    if not facts.sees_directory:
        found.append(
            f"work_dir: does not see {directory} as the launcher does: it must lie on a file system that all share"
        )
    if facts.code != driver.code:
        found.append(
            f"its dist_lm has other sources ({facts.code}, those of this launch {driver.code}; a file edited since "
            "it began needs a new launch)"
        )
    for name, version in driver.packages.items():
        if facts.packages.get(name) != version:
            found.append(f"{name} {facts.packages.get(name, 'is missing')} instead of {version}")
    if facts.gpus < demands.gpus:
        found.append(f"{facts.gpus} GPUs, {demands.gpus} are needed")
    for path, free in facts.free_bytes.items():
        needed = demands.free_bytes if path == directory else demands.temporary_bytes
        if free < needed:
            found.append(
                f"{path}: {free / 2**30:.1f} GiB free, {needed / 2**30:.1f} GiB are needed (cluster.min_free_gib)"
            )
    early, late = trip.sent - demands.clock_skew_s, trip.answered + demands.clock_skew_s
    if not early <= facts.time <= late:
        skew = facts.time - (trip.sent + trip.answered) / 2
        found.append(f"its clock is {skew:+.1f} s off (cluster.max_clock_skew_s={demands.clock_skew_s:g})")
    return found


def unreachable(links: Mapping[tuple[int, int], float | str]) -> dict[int, str]:
    """The fewest nodes without which all others reach each other, and why.

    Args:
        links: by (from, to): bytes per second, or why nothing came through.
    """
    broken = {pair: reason for pair, reason in links.items() if isinstance(reason, str)}
    found: dict[int, str] = {}
    while broken:
        nodes = sorted({node for pair in broken for node in pair})
        # on a tie the later one: node 0 is where the others meet
        worst = max(nodes, key=lambda node: (sum(node in pair for pair in broken), node))
        peers = sorted({other for pair in broken if worst in pair for other in pair} - {worst})
        reason = next(reason for pair, reason in broken.items() if worst in pair)
        found[worst] = f"no connection with {len(peers)} other nodes ({reason})"
        broken = {pair: reason for pair, reason in broken.items() if worst not in pair}
    return found


FAILURES_ENOUGH = 2


def is_hopeless(node: int, links: Mapping[tuple[int, int], float | str]) -> bool:
    """Whether nothing has come through to or from a node, with several others that do reach somebody.

    Such a node need not be tried with all the rest, which takes a timeout each.

    Args:
        links: that have been tried; see `unreachable`.
    """
    reached = {end for pair, result in links.items() if not isinstance(result, str) for end in pair}
    peers = {other for pair in links if node in pair for other in pair} - {node}
    return node not in reached and len(peers & reached) >= FAILURES_ENOUGH


def slow(links: Mapping[tuple[int, int], float | str], ratio: float) -> dict[int, str]:
    """Nodes whose links, in one direction, are slower than `ratio` of what is usual between the nodes."""
    rates = {pair: rate for pair, rate in links.items() if not isinstance(rate, str)}
    if len({node for pair in rates for node in pair}) < 3:
        return {}  # of two nodes neither is the slow one
    usual = statistics.median(rates.values())
    found = {}
    for node in sorted({node for pair in rates for node in pair}):
        for end, direction in ((0, "sends"), (1, "receives")):
            own = statistics.median(rate for pair, rate in rates.items() if pair[end] == node)
            if own < ratio * usual:
                found[node] = f"{direction} {own / 1e6:,.0f} MB/s where {usual / 1e6:,.0f} is usual"
    return found


def rounds(nodes: int) -> list[Sequence[tuple[int, int]]]:
    """Every ordered pair of nodes once, in rounds in which each sends to one and receives from one."""
    return [[(node, (node + distance) % nodes) for node in range(nodes)] for distance in range(1, nodes)]
