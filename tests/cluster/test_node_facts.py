"""Measurements of a node: links between nodes, and usage under names of the metrics registry."""

import socket

from dist_lm.cluster import node_facts
from dist_lm.cluster.node_facts import GpuUsage, LinkServer, NodeUsage, UsageMeter, send, usage_metrics
from dist_lm.tracking.registry import metric_of


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
