"""Nodes looked at before ranks are started: what each says about itself, and whether they reach each other."""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_lm.cluster.node_checks import Demands, Trip, complaints, is_hopeless, rounds, slow, unreachable
from dist_lm.cluster.node_facts import NodeFacts, examine
from dist_lm.cluster.placement import Placement
from dist_lm.cluster.ray_errors import last_line

ANSWER_S = 60.0  # reading all sources from a busy network file system takes a while
ROUND_S = 30.0


@dataclass(frozen=True)
class Inspection:
    """What was found, by place in the gang."""

    hosts: Sequence[str]
    unfit: dict[int, str]  # must not be used, and why
    slow: dict[int, str]  # should not be used where there is another
    rates: Sequence[float]  # of all links, bytes per second


def inspect(
    placement: Placement, directory: Path, demands: Demands, link_bytes: int, wanted: Callable[[], bool]
) -> Inspection | None:
    """Look at the nodes of a placement.

    Args:
        directory: of the run; every node must see it.
        link_bytes: sent over every link; 0: links are not tried.
        wanted: asked between links; None is returned once it says no.
    """
    mark = directory / f".seen-{secrets.token_hex(8)}"
    mark.touch()
    try:
        driver = examine(directory, mark.name)
        sent = time.time()
        answers = _ask([agent.examine.remote(directory, mark.name) for agent in placement.agents], ANSWER_S)
    finally:
        mark.unlink(missing_ok=True)
    unfit, hosts = {}, []
    for node, (answer, at) in enumerate(answers):
        if isinstance(answer, NodeFacts):
            hosts.append(answer.host)
            found = complaints(answer, driver, demands, Trip(sent, at), str(directory))
            if found:
                unfit[node] = "; ".join(found)
        else:
            hosts.append(placement.nodes[node].address)
            unfit[node] = str(answer)
    fit = [node for node in range(len(hosts)) if node not in unfit]
    links = _try_links(placement, fit, link_bytes, wanted) if link_bytes else {}
    if not wanted():
        return None
    unfit |= unreachable(links)
    rates = [rate for rate in links.values() if not isinstance(rate, str)]
    return Inspection(hosts, unfit, slow(links, demands.link_ratio), rates)


def _try_links(
    placement: Placement, nodes: Sequence[int], n_bytes: int, wanted: Callable[[], bool]
) -> dict[tuple[int, int], float | str]:
    if len(nodes) < 2:
        return {}
    agents, addresses = placement.agents, [node.address for node in placement.nodes]
    servers = _ask([agents[node].listen.remote(addresses[node]) for node in nodes], ROUND_S)
    links: dict[tuple[int, int], float | str] = {}
    for pairs in rounds(len(nodes)):
        if not wanted():
            break
        questions, asked = [], []
        hopeless = {node for node in nodes if is_hopeless(node, links)}
        for source, target in pairs:
            here, there = nodes[source], nodes[target]
            if here in hopeless or there in hopeless:
                continue
            server, _ = servers[target]
            if isinstance(server, str):
                links[here, there] = f"{addresses[there]} cannot be listened at: {server}"
                continue
            asked.append((here, there))
            questions.append(agents[here].try_link.remote(addresses[there], *server, n_bytes))
        links |= {pair: answer for pair, (answer, _) in zip(asked, _ask(questions, ROUND_S), strict=True)}
    return links


def _ask(questions: Sequence[Any], timeout_s: float) -> list[tuple[Any, float]]:
    """(answer, when it was there in seconds since 1970) of every question; text where there is none: why."""
    import ray
    from ray.exceptions import RayError

    answers: dict[Any, tuple[Any, float]] = {}
    left, deadline = list(questions), time.monotonic() + timeout_s
    while left and (seconds := deadline - time.monotonic()) > 0:
        done, left = ray.wait(left, num_returns=1, timeout=seconds)
        for question in done:
            try:
                answers[question] = ray.get(question), time.time()
            except RayError as error:
                answers[question] = last_line(error), time.time()
    return [answers.get(question, (f"no answer within {timeout_s:g} s", time.time())) for question in questions]
