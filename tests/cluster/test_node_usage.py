"""A node says how busy it is under names of the registry."""

from dist_lm.cluster import node_facts
from dist_lm.cluster.node_facts import GpuUsage, NodeUsage, UsageMeter, usage_metrics
from dist_lm.tracking.registry import metric_of


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
