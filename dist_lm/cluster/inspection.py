"""Inspection of nodes before ranks start: each node's facts are compared with the driver's, GPUs are tried, and all
links are timed."""

import secrets
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_lm.cluster.gpu_probe import START_S, named_by
from dist_lm.cluster.node_facts import GIB, NodeFacts, examine
from dist_lm.cluster.ray_cluster import ClusterError, Node, last_line

ANSWER_S = 60.0  # a node reads all sources of dist_lm, perhaps from a busy network file system
ROUND_S = 30.0  # one round of links
SUM_S = 60.0  # an all-reduce, with NCCL's start
FAILURES_ENOUGH = 2

Links = Mapping[tuple[int, int], float | str]
"""By (sending node, receiving node): bytes per second, or why nothing arrived."""


@dataclass(frozen=True)
class Demands:
    """Requirements of a gang on its nodes."""

    gpus: int  # at least
    free_bytes: int  # in the run directory: a checkpoint and its successor
    temporary_bytes: int  # for temporary files
    clock_skew_s: float  # largest difference to the driver's clock
    link_ratio: float  # a link below this share of the median rate is slow
    tried: int = 0  # GPUs of a node that are tried
    burn_s: float = 0.0  # seconds of matrix products on each, then they sum a tensor; 0: only NVML is read
    device: str = "cuda"  # cpu tries the same without GPUs


@dataclass(frozen=True)
class Trip:
    """When a question was sent to a node and answered, by the driver's clock, in seconds since 1970."""

    sent: float
    answered: float


@dataclass(frozen=True)
class Inspection:
    """Results by node of the gang (0, 1, ...)."""

    hosts: Sequence[str]
    unfit: dict[int, str]  # nodes that must not be used, with the reason
    slow: dict[int, str]  # nodes to replace if others are free, with the reason
    rates: Sequence[float]  # bytes per second of all links
    notes: tuple[str, ...] = ()  # parts that could not be inspected


def inspect(
    agents: Sequence[Any],
    nodes: Sequence[Node],
    directory: Path,
    demands: Demands,
    link_bytes: int,
    keep_going: Callable[[], bool],
) -> Inspection | None:
    """Inspects nodes through their agents: facts, GPUs, links. A file in the run directory exists meanwhile.

    Args:
        directory: the run directory, which every node must see.
        link_bytes: sent over every link; 0: links are not measured.
        keep_going: asked between rounds of links; if it returns False the result is None.

    Raises:
        ClusterError: an all-reduce over all nodes gives no result, though each node's own does.
        OSError: the run directory cannot be written.
    """
    # A fresh file tells the driver's directory from another disk's directory of the same name.
    mark = directory / f".seen-{secrets.token_hex(8)}"
    mark.touch()
    try:
        driver = examine(directory, mark.name)
        sent = time.time()
        answers = _ask([agent.examine.remote(directory, mark.name) for agent in agents], ANSWER_S)
    finally:
        mark.unlink(missing_ok=True)

    unfit: dict[int, str] = {}
    hosts: list[str] = []
    for node, (answer, answered_at) in enumerate(answers):
        if not isinstance(answer, NodeFacts):
            hosts.append(nodes[node].address)
            unfit[node] = str(answer)
            continue
        hosts.append(answer.host)
        reasons = complaints(answer, driver, demands, Trip(sent, answered_at), str(directory))
        if reasons:
            unfit[node] = "; ".join(reasons)

    # An unfit node runs no ranks in any case, and a trial of it might have to wait for its time-out.
    fit = [node for node in range(len(hosts)) if node not in unfit]
    addresses = [node.address for node in nodes]
    notes: tuple[str, ...] = ()
    throttled: dict[int, str] = {}
    if demands.tried and fit and keep_going():
        faults, throttled, notes = _try_gpus(agents, addresses, hosts, fit, demands)
        unfit |= faults
        fit = [node for node in fit if node not in faults]

    links: Links = {}
    if link_bytes and len(fit) > 1:
        links = _measure_links(agents, addresses, fit, link_bytes, keep_going)
    if not keep_going():
        return None
    unfit |= unreachable(links)
    rates = [rate for rate in links.values() if not isinstance(rate, str)]
    return Inspection(hosts, unfit, throttled | slow(links, demands.link_ratio), rates, notes)


def complaints(facts: NodeFacts, driver: NodeFacts, demands: Demands, trip: Trip, directory: str) -> list[str]:
    """Returns why a node must not run ranks, a text for each reason; empty if it may.

    Args:
        driver: facts of the machine that starts the gang.
        trip: when the facts were asked for and came, by which the clocks are compared.
        directory: the run directory.
    """
    reasons = []
    if not facts.sees_directory:
        reasons.append(
            f"work_dir: does not see {directory} as the launcher does; it must be on a file system that all nodes share"
        )
    if facts.code != driver.code:
        reasons.append(
            f"its dist_lm has other sources ({facts.code}, this launch has {driver.code}); if a file was edited since "
            "the launch began, launch again"
        )
    for name, version in driver.packages.items():
        if facts.packages.get(name) != version:
            reasons.append(f"{name} {facts.packages.get(name, 'is missing')} instead of {version}")
    if facts.gpus < demands.gpus:
        reasons.append(f"{facts.gpus} GPUs, {demands.gpus} are needed")
    for path, free in facts.free_bytes.items():
        needed = demands.free_bytes if path == directory else demands.temporary_bytes
        if free < needed:
            reasons.append(
                f"{path}: {free / GIB:.1f} GiB free, {needed / GIB:.1f} GiB are needed (cluster.min_free_gib)"
            )

    # The node read its clock at some time between question and answer.
    earliest, latest = trip.sent - demands.clock_skew_s, trip.answered + demands.clock_skew_s
    if not earliest <= facts.time <= latest:
        skew = facts.time - (trip.sent + trip.answered) / 2
        reasons.append(f"its clock is {skew:+.1f} s off (cluster.max_clock_skew_s={demands.clock_skew_s:g})")
    return reasons


def unreachable(links: Links) -> dict[int, str]:
    """Returns the fewest nodes whose removal leaves only working links, with the reason for each (greedy);
    empty if all work."""
    broken = {pair: reason for pair, reason in links.items() if isinstance(reason, str)}
    removed: dict[int, str] = {}
    while broken:
        nodes = sorted({node for pair in broken for node in pair})
        # Among equal nodes the later one goes: the ranks meet at node 0.
        worst = max(nodes, key=lambda node: (sum(node in pair for pair in broken), node))
        peers = {node for pair in broken if worst in pair for node in pair} - {worst}
        reason = next(reason for pair, reason in broken.items() if worst in pair)
        removed[worst] = f"no connection with {len(peers)} other nodes ({reason})"
        broken = {pair: reason for pair, reason in broken.items() if worst not in pair}
    return removed


def is_hopeless(node: int, links: Links) -> bool:
    """Returns whether a node has no working link yet but `FAILURES_ENOUGH` broken ones to nodes with working links.

    Its remaining links need no measurement, each of which would take a timeout.
    """
    reached = {end for pair, result in links.items() if not isinstance(result, str) for end in pair}
    peers = {end for pair in links if node in pair for end in pair} - {node}
    return node not in reached and len(peers & reached) >= FAILURES_ENOUGH


def slow(links: Links, ratio: float) -> dict[int, str]:
    """Returns nodes whose median rate, sending or receiving, is below `ratio` of the median of all links, with the
    reason.

    Links that do not work are passed over. Empty with fewer than three nodes, which share their links.
    """
    rates = {pair: rate for pair, rate in links.items() if not isinstance(rate, str)}
    nodes = sorted({node for pair in rates for node in pair})
    if len(nodes) < 3:
        # Two nodes share their links, so neither can be blamed.
        return {}

    median = statistics.median(rates.values())
    slow_nodes = {}
    for node in nodes:
        for end, direction in ((0, "sends"), (1, "receives")):
            # A node that nobody reaches may send all the same: it has no links in the other direction.
            rates_of_node = [rate for pair, rate in rates.items() if pair[end] == node]
            if rates_of_node and (node_rate := statistics.median(rates_of_node)) < ratio * median:
                slow_nodes[node] = f"{direction} {node_rate / 1e6:,.0f} MB/s, the median is {median / 1e6:,.0f}"
    return slow_nodes


def rounds(nodes: int) -> list[Sequence[tuple[int, int]]]:
    """Every ordered pair of nodes once, in rounds in which each node sends to one node and receives from one."""
    return [[(node, (node + distance) % nodes) for node in range(nodes)] for distance in range(1, nodes)]


def _try_gpus(
    agents: Sequence[Any], addresses: Sequence[str], hosts: Sequence[str], nodes: Sequence[int], demands: Demands
) -> tuple[dict[int, str], dict[int, str], tuple[str, ...]]:
    """Tries the GPUs of `nodes`: each alone, then all GPUs of a node in an all-reduce, then all healthy nodes in one.

    With `demands.burn_s` = 0 nothing is computed: only the health is read. The processes of the trials end before it
    returns or raises.

    Args:
        agents, addresses, hosts: of all nodes, by their numbers.
        nodes: numbers of the nodes to try.

    Returns:
        Number of a node -> why it is faulty; number of a node -> why it is throttled; notes on nodes whose health could
        not be read. The reasons name the GPU. A node may be both faulty and throttled.

    Raises:
        ClusterError: an all-reduce over several nodes has no result on any rank, although the nodes passed alone.
    """
    count, burn_s = demands.tried, demands.burn_s
    faults: dict[int, str] = {}
    throttled: dict[int, str] = {}
    unread: dict[str, list[str]] = {}  # reason -> hosts
    try:
        checks = [agents[node].check_gpus.remote(demands.device, count, burn_s, addresses[node]) for node in nodes]
        for node, (health, _) in zip(nodes, _ask(checks, START_S + burn_s + ROUND_S), strict=True):
            if isinstance(health, str):
                faults[node] = f"GPUs: {health}"
                continue
            if health.faults:
                faults[node] = "; ".join(health.faults)
            if health.throttled:
                throttled[node] = "; ".join(health.throttled)
            if health.unread:
                unread.setdefault(health.unread, []).append(hosts[node])

        # First the GPUs of each node sum a tensor, then those of all nodes: so a fault is blamed on the right node.
        fit = [node for node in nodes if node not in faults]
        if burn_s and count > 1:
            faults |= _sum_up(agents, addresses, [[node] for node in fit], count)
            fit = [node for node in fit if node not in faults]
        if burn_s and len(fit) > 1:
            faults |= _sum_up(agents, addresses, [fit], count)
    finally:
        _ask([agents[node].end_probes.remote() for node in nodes], ROUND_S)

    notes = [
        f"the health of GPUs is not read on {len(unread_hosts)} nodes ({unread_hosts[0]}, ...): {reason}"
        for reason, unread_hosts in unread.items()
    ]
    return faults, throttled, tuple(notes)


def _sum_up(
    agents: Sequence[Any], addresses: Sequence[str], groups: Sequence[Sequence[int]], count: int
) -> dict[int, str]:
    """Makes an all-reduce over the GPUs of each group of nodes; returns the reason for each node that makes it wrong or
    is silent.

    Args:
        count: GPUs per node.

    Raises:
        ClusterError: a group of several nodes gives no answer at all.
    """
    # The ranks of a group meet at its first node.
    ports = _ask([agents[group[0]].reserve_port.remote() for group in groups], ROUND_S)
    questions = [
        agents[node].sum_up.remote(count * index, count * len(group), addresses[group[0]], port, SUM_S)
        for group, (port, _) in zip(groups, ports, strict=True)
        for index, node in enumerate(group)
    ]
    answers = iter(_ask(questions, SUM_S + ROUND_S))

    faults: dict[int, str] = {}
    for group in groups:
        answer_of: dict[int, Any] = {}  # rank within the group -> answer
        for index, (answer, _) in zip(range(len(group)), answers, strict=False):
            local_answers = [answer] * count if isinstance(answer, str) else answer
            answer_of |= {count * index + local: local_answer for local, local_answer in enumerate(local_answers)}

        silent = {rank: f"all-reduce: {answer}" for rank, answer in answer_of.items() if isinstance(answer, str)}
        if len(silent) == len(answer_of) and len(group) > 1:
            raise ClusterError(f"an all-reduce over {len(group)} nodes gives no result, though that of each node does")
        wrong = {rank: answer["wrong"] for rank, answer in answer_of.items() if rank not in silent}
        for rank, reason in sorted((silent | named_by(wrong)).items()):
            index, local = divmod(rank, count)
            faults.setdefault(group[index], f"GPU {local}: {reason}")
    return faults


def _measure_links(
    agents: Sequence[Any], addresses: Sequence[str], nodes: Sequence[int], n_bytes: int, keep_going: Callable[[], bool]
) -> Links:
    """Returns the links between `nodes`. In a round no node sends twice or receives twice, so that links do not share a
    NIC.

    It takes as many rounds as there are other nodes. After a False of `keep_going` the later links are missing, and so
    are those of nodes that `is_hopeless` gives up. The agents listen until their `launch` or `stop`.
    """
    servers = _ask([agents[node].listen.remote(addresses[node]) for node in nodes], ROUND_S)
    links: dict[tuple[int, int], float | str] = {}
    for index_pairs in rounds(len(nodes)):
        if not keep_going():
            break

        # Each link of a node that nobody reaches would take a whole timeout.
        hopeless = {node for node in nodes if is_hopeless(node, links)}
        pairs: list[tuple[int, int]] = []
        questions = []
        for source_index, target_index in index_pairs:
            source, target = nodes[source_index], nodes[target_index]
            if source in hopeless or target in hopeless:
                continue

            server, _ = servers[target_index]
            if isinstance(server, str):
                links[source, target] = f"cannot listen at {addresses[target]}: {server}"
                continue
            pairs.append((source, target))
            questions.append(agents[source].measure_link.remote(addresses[target], *server, n_bytes))
        links |= {pair: answer for pair, (answer, _) in zip(pairs, _ask(questions, ROUND_S), strict=True)}
    return links


def _ask(questions: Sequence[Any], timeout_s: float) -> list[tuple[Any, float]]:
    """Returns (answer, time of arrival in seconds since 1970) of every question; a text says why there is no answer.

    All questions together have `timeout_s`.
    """
    import ray
    from ray.exceptions import RayError

    # Each answer is noted as it comes, because its time tells how far a node's clock is off.
    answers: dict[Any, tuple[Any, float]] = {}
    deadline = time.monotonic() + timeout_s
    unanswered = list(questions)
    while unanswered and (seconds := deadline - time.monotonic()) > 0:
        answered, unanswered = ray.wait(unanswered, num_returns=1, timeout=seconds)
        for question in answered:
            try:
                answers[question] = ray.get(question), time.time()
            except RayError as error:
                answers[question] = last_line(error), time.time()
    return [answers.get(question, (f"no answer within {timeout_s:g} s", time.time())) for question in questions]
