"""Measurements of a node: links between nodes, and usage under names of the metrics registry."""

import os
import socket
from dataclasses import replace

import pytest
import torch

from dist_lm.cluster import node_facts, pool_actor
from dist_lm.cluster.node_facts import GpuUsage, LinkServer, NodeUsage, UsageMeter, send, usage_metrics, visible_gpus
from dist_lm.cluster.pool_actor import shown_devices
from dist_lm.errors import ConfigError, UserError
from dist_lm.parallel.mesh import choose_device
from dist_lm.tracking.registry import metric_of
from tests.cluster.small_pool import SPEC


def test_a_link_is_measured_and_strangers_are_hung_up_on():
    server = LinkServer("127.0.0.3")
    rate = send("127.0.0.3", server.port, server.secret, (3 << 20) + 17)
    assert isinstance(rate, float)
    assert rate > 1e6
    refused = send("127.0.0.3", server.port, bytes(32), 1 << 20)
    assert isinstance(refused, str)
    assert "127.0.0.3" in refused
    server.close()
    assert "127.0.0.3" in str(send("127.0.0.3", server.port, server.secret, 1))


def test_somebody_who_says_nothing_does_not_hold_others_up():
    server = LinkServer("127.0.0.3")
    with socket.create_connection(("127.0.0.3", server.port)):
        assert isinstance(send("127.0.0.3", server.port, server.secret, 1), float)
    server.close()


def test_a_meter_looks_now_and_then(monkeypatch) -> None:
    meter = UsageMeter()
    assert meter.read() is None
    monkeypatch.setattr(node_facts, "USAGE_EVERY_S", 0.0)
    usage = meter.read()
    assert usage is not None
    assert 0 <= usage.cpu_percent <= 100
    assert 0 < usage.memory_percent < 100
    assert usage.memory_gib > 0
    monkeypatch.setattr(node_facts, "USAGE_EVERY_S", 1e9)
    assert meter.read() is usage


def test_every_name_is_in_the_registry() -> None:
    usage = NodeUsage(50.0, 25.0, 4.0, (GpuUsage(0, 90.0, 70.0),))
    metrics = usage_metrics({"n1": usage, "n-2.site": usage})
    assert metrics["system/gpu_percent_n-2.site.0"] == 90.0
    assert len(metrics) == 10
    for name in metrics:
        assert metric_of(name).group == "system"


@pytest.mark.parametrize(
    ("given", "count", "expected"),
    [
        (None, 4, ("0", "1", "2", "3")),
        ("2,0", 4, ("2", "0")),
        (" 5, 6 ", 8, ("5", "6")),
        ("GPU-8932f937,GPU-0e8e3a1b", 8, ("GPU-8932f937", "GPU-0e8e3a1b")),
        ("MIG-GPU-a/1/0", 1, ("MIG-GPU-a/1/0",)),
        ("", 4, ()),
        ("-1", 4, ()),
        ("NoDevFiles", 4, ()),
        ("1,-1,2", 4, ("1",)),
        ("3,9,1", 4, ("3",)),
        (None, 0, ()),
        ("0,1", 0, ()),
    ],
)
def test_gpus_are_those_that_cuda_shows(given, count, expected):
    assert visible_gpus({} if given is None else {"CUDA_VISIBLE_DEVICES": given}, count) == expected


def test_a_machine_has_the_gpus_that_it_shows(monkeypatch):
    monkeypatch.setattr(node_facts.Path, "glob", lambda self, pattern: [f"/dev/nvidia{number}" for number in range(8)])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert node_facts.local_gpus() == 8
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    assert node_facts.local_gpus() == 2


@pytest.mark.parametrize(
    ("given", "devices", "expected"),
    [
        (None, (2, 3), "2,3"),
        ("4,5,6,7", (2, 3), "6,7"),
        ("GPU-a, GPU-b", (1,), "GPU-b"),
        ("7,1", (0,), "7"),
    ],
)
def test_an_actor_takes_gpus_among_those_that_its_node_shows(given, devices, expected):
    assert shown_devices({} if given is None else {"CUDA_VISIBLE_DEVICES": given}, devices) == expected


def test_an_actor_keeps_to_what_its_node_shows(monkeypatch):
    for module, name in ((pool_actor, "die_with_parent"), (torch, "set_num_threads")):
        monkeypatch.setattr(module, name, lambda *_: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    pool_actor.PoolActor(SPEC, 1, (2, 3))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6,7"


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), torch.float32), ((9, 0), torch.bfloat16)])
def test_an_actor_computes_in_what_its_own_gpu_has(monkeypatch, capability, expected):
    for module, name in ((pool_actor, "die_with_parent"), (torch, "set_num_threads"), (pool_actor, "gpu_of")):
        monkeypatch.setattr(module, name, lambda *_: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    built: list[torch.dtype] = []
    monkeypatch.setattr(pool_actor, "Engine", lambda *_, dtype, **__: built.append(dtype))
    pool_actor.PoolActor(replace(SPEC, device="cuda", dtype=torch.bfloat16), 1).load([], 0)
    assert built == [expected]


def test_an_actor_without_a_gpu_to_take_says_so():
    with pytest.raises(UserError, match=r"^CUDA_VISIBLE_DEVICES=4,5: shows 2 GPUs.*index 3"):
        shown_devices({"CUDA_VISIBLE_DEVICES": "4,5"}, (2, 3))


def test_the_device_of_a_rank_is_an_index_into_those_that_cuda_shows(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [choose_device("auto", rank) for rank in (0, 1)] == [torch.device("cuda", 0), torch.device("cuda", 1)]
    with pytest.raises(ConfigError, match="local rank 2 has no GPU, this node has 2"):
        choose_device("cuda", 2)
