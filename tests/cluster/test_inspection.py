"""What is wrong with a node: found by comparison, named in words."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_lm.cluster.inspection import Demands, Trip, complaints, is_hopeless, rounds, slow, unreachable
from dist_lm.cluster.node_facts import NodeFacts, examine

GIB = 1 << 30
DEMANDS = Demands(gpus=8, free_bytes=10 * GIB, temporary_bytes=GIB, clock_skew_s=5.0, link_ratio=0.25)
TRIP = Trip(sent=1000.0, answered=1002.0)
GOOD = NodeFacts(
    host="n1",
    time=1001.0,
    sees_directory=True,
    free_bytes={"/run": 20 * GIB, "/tmp": 2 * GIB},
    gpus=8,
    code="abc",
    packages={"python": "3.11.2", "torch": "2.13.0"},
)


def found(facts: NodeFacts) -> str:
    return "; ".join(complaints(facts, GOOD, DEMANDS, TRIP, "/run"))


def test_a_good_node_passes():
    assert found(GOOD) == ""
    assert found(replace(GOOD, time=1006.9)) == ""  # the answer was two seconds on its way


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sees_directory": False}, "does not see /run"),
        ({"code": "abd"}, "other sources (abd, this launch has abc);"),
        ({"packages": {"python": "3.11.2", "torch": "2.12.0"}}, "torch 2.12.0 instead of 2.13.0"),
        ({"packages": {"python": "3.11.2"}}, "torch is missing instead of 2.13.0"),
        ({"gpus": 7}, "7 GPUs, 8 are needed"),
        ({"free_bytes": {"/run": 9 * GIB, "/tmp": 2 * GIB}}, "/run: 9.0 GiB free, 10.0 GiB are needed"),
        ({"free_bytes": {"/run": 20 * GIB, "/tmp": GIB // 2}}, "/tmp: 0.5 GiB free, 1.0 GiB are needed"),
        ({"time": 1061.0}, "its clock is +60.0 s off (cluster.max_clock_skew_s=5)"),
        ({"time": 900.0}, "its clock is -101.0 s off"),
    ],
)
def test_what_is_wrong_is_named(changes, words):
    assert words in found(replace(GOOD, **changes))


def test_this_machine_is_like_itself(tmp_path):
    (tmp_path / ".seen").touch()
    here = examine(tmp_path, ".seen")
    trip = Trip(here.time, here.time)
    demands = replace(DEMANDS, gpus=here.gpus, free_bytes=1, temporary_bytes=1)
    assert complaints(here, here, demands, trip, str(tmp_path)) == []
    assert {"python", "torch", "ray"} <= here.packages.keys()


@given(st.integers(2, 9), st.sets(st.integers(0, 8)))
def test_nodes_that_nobody_reaches_are_found_and_no_others(nodes, bad):
    bad = {node for node in bad if node < nodes}
    good = set(range(nodes)) - bad
    links = {(a, b): "refused" if {a, b} & bad else 1e9 for turn in rounds(nodes) for a, b in turn}
    assert len(links) == nodes * (nodes - 1)
    named = unreachable(links)
    assert all(
        not (pair[0] in good - named.keys() and pair[1] in good - named.keys()) or rate == 1e9
        for pair, rate in links.items()
    )
    if len(good) > 1:
        assert named.keys() == bad
    assert all("refused" in reason for reason in named.values())


@given(st.integers(5, 12), st.sets(st.integers(0, 11), max_size=2))
def test_a_node_that_never_answers_is_tried_with_a_few_others_only(nodes, black_holes):
    black_holes = {node for node in black_holes if node < nodes}
    links: dict = {}
    tried = 0
    for turn in rounds(nodes):
        hopeless = {node for node in range(nodes) if is_hopeless(node, links)}
        assert hopeless <= black_holes
        pairs = [pair for pair in turn if not hopeless & set(pair)]
        links |= {pair: "timed out" if black_holes & set(pair) else 1e9 for pair in pairs}
        tried += any(black_holes & set(pair) for pair in pairs)
    assert tried <= 1 + len(black_holes)
    assert unreachable(links).keys() == black_holes


def test_one_broken_direction_is_enough_to_leave_one_node_out():
    links: dict = {(a, b): 1e9 for a in range(3) for b in range(3) if a != b}
    links[1, 2] = "timed out"
    assert list(unreachable(links)) == [2]


def test_a_node_with_a_slow_link_is_named_with_its_direction():
    links = {(a, b): 1e8 if b == 2 else 1e9 for a in range(4) for b in range(4) if a != b}
    assert slow(links, 0.25) == {2: "receives 100 MB/s, the median is 1,000"}
    assert slow(links, 0.01) == {}
    assert slow({(0, 1): 1e9, (1, 0): 1e3}, 0.25) == {}


def test_a_node_that_only_sends_is_named_as_unreachable_and_ends_no_inspection():
    # It would find a median over no links: a firewall on node 2 lets nothing in, and its own links work.
    links = {(a, b): 1e9 for a in range(3) for b in range(3) if a != b} | {(n, 2): "refused" for n in (0, 1)}

    assert [*unreachable(links)] == [2]
    assert slow(links, 0.25) == {}
    assert slow(links | {(2, 0): 1e8, (2, 1): 1e8}, 0.25) == {2: "sends 100 MB/s, the median is 550"}
