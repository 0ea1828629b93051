"""Trial work before ranks start: wrong numbers, deaths and hangs name the GPU, and its node is left out."""

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch

from dist_lm.cluster import agent as agent_module
from dist_lm.cluster import inspection
from dist_lm.cluster.agent import NodeAgent
from dist_lm.cluster.gpu_health import Health
from dist_lm.cluster.gpu_probe import SIZE, Probes, burn, named_by
from dist_lm.cluster.inspection import Demands, inspect
from dist_lm.cluster.node_facts import examine
from dist_lm.cluster.ray_cluster import ClusterError, Node, connect
from dist_lm.cluster.recruit import recruit
from dist_lm.config.cluster import ClusterConfig
from dist_lm.storage.process import reserve_port, title
from dist_lm.storage.run_directory import RunDirectory
from tests.cluster.waiting import eventually, living
from tests.patience import patient

CPU = torch.device("cpu")
LOOPBACK = "127.0.0.1"
BURN = {"do": "burn", "seconds": 0.0}


# --- one GPU ---


def test_products_of_a_sound_device_are_right():
    assert burn(CPU, 0.05, SIZE["cpu"]) == ""


@pytest.mark.parametrize("at", [(0, 0), (17, 63)])
def test_one_wrong_entry_of_one_product_is_found(at):
    products = []

    def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        products.append(a @ b)
        if len(products) == 5:
            products[-1][at] += 1
        return products[-1]

    assert burn(CPU, 0.0, SIZE["cpu"], multiply) == "1 of 16 matrix products are wrong"


def test_whoever_sends_or_receives_wrong_numbers_is_named():
    assert named_by({rank: [] for rank in range(4)}) == {}
    assert named_by({0: [2], 1: [2], 2: [], 3: [2]}) == {2: "sends wrong numbers in an all-reduce"}
    assert named_by({0: [], 1: [0, 3], 2: [], 3: []}) == {1: "receives wrong numbers in an all-reduce"}


# --- the processes of a node ---


@pytest.fixture
def probes() -> Iterator[Probes]:
    own = Probes("cpu", 2, LOOPBACK)
    yield own
    pids = own.pids
    own.close()
    eventually("no process is left", lambda: not living(pids))


@pytest.mark.heavy
@pytest.mark.cluster
def test_processes_answer_and_those_that_hang_or_end_are_told_apart(probes):
    looks = []
    assert probes.ask([BURN] * 2, patient(120), lambda: looks.append(1)) == [{"fault": ""}] * 2
    assert looks
    with reserve_port() as reserved:
        inside_the_node = {"store": probes.new_store()}
        over_all_nodes = {"address": LOOPBACK, "port": reserved.getsockname()[1]}
        for meeting in inside_the_node, over_all_nodes:
            request = {"do": "all_reduce", "world": 2} | meeting
            assert probes.ask([request | {"rank": rank} for rank in range(2)], patient(60)) == [{"wrong": []}] * 2
    os.kill(probes.pids[1], signal.SIGSTOP)
    soon = round(patient(3))  # the other process must answer in this time
    assert probes.ask([BURN] * 2, soon) == [{"fault": ""}, f"no answer within {soon} s"]
    os.kill(probes.pids[1], signal.SIGKILL)
    assert probes.ask([BURN] * 2, patient(30))[1] == "its process ended with exit code -9"


@pytest.mark.cluster
@pytest.mark.heavy
def test_agents_try_their_node_before_ranks_start(tmp_path):
    run = RunDirectory(tmp_path / "runs" / "code" / "test")
    run.create()
    demands = Demands(0, 1, 1, clock_skew_s=60.0, link_ratio=0.0, tried=2, burn_s=0.1, device="cpu")
    with connect(ClusterConfig(name="local", connect_timeout_s=patient(30))) as cluster:
        crew = recruit(cluster, 1, gpus_per_node=0, directory=run.path, demands=demands, timeout_s=60.0)
        assert crew is not None
        below = psutil.Process().children(recursive=True)
        assert not [one.pid for one in below if "dist_lm.cluster.gpu_probe" in title(one)]
        crew.placement.release()


def test_the_agent_names_the_gpu_and_adds_what_nvml_says(monkeypatch):
    class TwoFaults:
        def __init__(self, device: str, count: int, address: str) -> None:
            assert (device, count, address) == ("cuda", 3, LOOPBACK)

        def ask(self, requests: Any, timeout_s: float, look: Any) -> list[Any]:
            look()
            return [{"fault": ""}, {"fault": "4 of 16 matrix products are wrong"}, "no answer within 122 s"]

        def close(self) -> None:
            pass

    monkeypatch.setattr(agent_module.node_facts, "shown_gpus", lambda: ("4", "5", "6", "7"))
    monkeypatch.setattr(agent_module.node_facts, "open_nvml", lambda: "NVML: Driver Not Loaded")
    monkeypatch.setattr(agent_module, "Probes", TwoFaults)
    health = NodeAgent().check_gpus("cuda", 3, 2.0, LOOPBACK)
    assert health.faults == ("GPU 5: 4 of 16 matrix products are wrong", "GPU 6: no answer within 122 s")
    assert health.unread == "NVML: Driver Not Loaded"


# --- nodes ---


class Remote:
    def __init__(self, call: Any) -> None:
        self.remote = call


class FakeAgent:
    """Two GPUs of a node; `answers` of its all-reduces are used up one by one."""

    def __init__(self, health: Health | str, *answers: Any) -> None:
        left, ended = list(answers), []
        self.examine = Remote(examine)
        self.check_gpus = Remote(lambda *_: health)
        self.reserve_port = Remote(lambda: 1)
        self.sum_up = Remote(lambda *_: left.pop(0) if left else [{"wrong": []}] * 2)
        self.end_probes = Remote(lambda: ended.append(True))
        self.ended = ended


DEMANDS = Demands(0, 0, 0, 60.0, 0.25, tried=2, burn_s=0.1)


def tried(monkeypatch, *agents: FakeAgent):
    monkeypatch.setattr(inspection, "_ask", lambda questions, timeout_s: [(answer, 0.0) for answer in questions])
    names = [f"n{node}" for node in range(len(agents))]
    try:
        return inspection._try_gpus(agents, names, names, range(len(agents)), DEMANDS)
    finally:
        assert all(agent.ended for agent in agents)


def test_a_node_with_a_faulty_gpu_is_left_out_and_a_throttled_one_is_slow(monkeypatch):
    faults, slow, notes = tried(
        monkeypatch,
        FakeAgent(Health()),
        FakeAgent(Health(faults=("GPU 1: XID error 79",))),
        FakeAgent(Health(throttled=("GPU 0: slowed down by its temperature",), unread="NVML: no")),
        FakeAgent("no answer within 150 s"),
    )
    assert faults == {1: "GPU 1: XID error 79", 3: "GPUs: no answer within 150 s"}
    assert slow == {2: "GPU 0: slowed down by its temperature"}
    assert notes == ("the health of GPUs is not read on 1 nodes (n2, ...): NVML: no",)


def test_an_inspection_tries_gpus(monkeypatch, tmp_path):
    monkeypatch.setattr(inspection, "_ask", lambda questions, timeout_s: [(one, time.time()) for one in questions])
    health = Health(("GPU 1: XID error 79",)), Health((), ("GPU 0: slowed down by its temperature",), "NVML: no")
    nodes = [Node(f"id{place}", f"n{place}", cpus=1, gpus=2) for place in range(2)]
    found = inspect([FakeAgent(one) for one in health], nodes, tmp_path, DEMANDS, link_bytes=0, keep_going=lambda: True)
    assert found is not None
    assert found.unfit == {0: "GPU 1: XID error 79"}
    assert found.slow == {1: "GPU 0: slowed down by its temperature"}
    assert len(found.notes) == 1


def test_an_all_reduce_inside_a_node_names_its_gpu(monkeypatch):
    wrong, silent = [{"wrong": [1]}, {"wrong": [1]}], [{"wrong": []}, "no answer within 60 s"]
    faults, _, _ = tried(monkeypatch, FakeAgent(Health(), wrong), FakeAgent(Health()), FakeAgent(Health(), silent))
    assert faults == {
        0: "GPU 1: sends wrong numbers in an all-reduce",
        2: "GPU 1: all-reduce: no answer within 60 s",
    }


def test_a_node_that_gives_no_answer_to_an_all_reduce_is_silent_on_all_of_its_gpus(monkeypatch):
    """Finds an inspection that fails at the answer of a lost node, which is a text and no list."""
    faults, _, _ = tried(monkeypatch, FakeAgent(Health(), "the node died"), FakeAgent(Health()), FakeAgent(Health()))
    assert faults == {0: "GPU 0: all-reduce: the node died"}


def test_an_all_reduce_over_all_nodes_names_whose_part_is_wrong(monkeypatch):
    fine, seen = [{"wrong": []}] * 2, [{"wrong": [3]}] * 2
    faults, _, _ = tried(monkeypatch, FakeAgent(Health(), fine, seen), FakeAgent(Health(), fine, seen))
    assert faults == {1: "GPU 1: sends wrong numbers in an all-reduce"}


def test_an_all_reduce_that_no_rank_ends_blames_no_node(monkeypatch):
    fine, hangs = [{"wrong": []}] * 2, ["no answer within 60 s"] * 2
    with pytest.raises(ClusterError, match="over 2 nodes gives no result"):
        tried(monkeypatch, FakeAgent(Health(), fine, hangs), FakeAgent(Health(), fine, hangs))
