"""The registry: unique names, families, unknown names refused; docs/metrics.md is generated from it."""

import re

import pytest

from dist_lm.errors import ConfigError
from dist_lm.stages.registry import OWN
from dist_lm.tracking.metrics_page import page
from dist_lm.tracking.registry import UnknownMetricError, all_metrics, metric_of, metrics_of


def test_every_name_is_there_once_and_is_of_stages_that_there_are():
    names = [metric.name for metric in all_metrics()]
    assert len(set(names)) == len(names)
    for metric in all_metrics():
        assert set(metric.stages) <= {*OWN}, metric.name
        assert metric.stages, metric.name
        assert metric.group, metric.name
        assert metric.meaning.endswith("."), metric.name
        assert metric.name.count("{") == bool(metric.slot), metric.name


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("val/loss", "val/loss"),
        ("val/loss_python", "val/loss_{corpus}"),
        ("val/bits_per_byte_a corpus", "val/bits_per_byte_{corpus}"),
        ("reward/accuracy", "reward/accuracy"),
        ("reward/accuracy_k12", "reward/accuracy_k{completions}"),
        ("reward/accuracy_kto", "reward/accuracy_{source}"),
        ("tools/parallel_exact", "tools/parallel_exact"),
        ("tools/irrelevance_irrelevant", "tools/irrelevance_{kind}"),
        ("train/grad_norm_head", "train/grad_norm_{group}"),
        ("eval/own_python/pass@1", "eval/{task}/pass@1"),
    ],
)
def test_a_name_has_its_metric(name, found):
    assert metric_of(name).name == found


@pytest.mark.parametrize(
    ("name", "nearest"), [("perf/tokens_per_sec", "perf/tokens_per_s"), ("val/loss_", "val/loss"), ("loss", "val/loss")]
)
def test_an_unknown_name_is_refused_with_the_nearest(name, nearest):
    with pytest.raises(UnknownMetricError, match=rf"metric {name}: .* nearest is {nearest};"):
        metric_of(name)


def test_contracts_do_not_drift():
    """Other programs read these names (docs/architecture.md)."""
    of_text = [
        "train/loss",
        "train/grad_norm",
        "train/lr",
        "train/tokens",
        "val/loss",
        "val/bits_per_byte",
        "perf/tokens_per_s",
        "perf/mfu",
        "perf/step_s",
        "perf/data_wait_s",
        "perf/memory_gib",
        "checkpoint/stall_s",
    ]
    assert set(of_text) <= {metric.name for metric in metrics_of("language")}
    for stage, name in (
        ("code", "code/parses_python"),
        ("tools", "tools/call_exact"),
        ("preference", "preference/accuracy"),
        ("reward", "reward/accuracy"),
        ("reward", "reward/kendall_tau"),
        ("rlhf", "rlhf/reward_mean"),
        ("rlhf", "rlhf/kl"),
        ("rlhf", "rollout/tokens_per_s"),
    ):
        assert metric_of(name) in metrics_of(stage)


def test_every_metric_is_on_the_page_once():
    cells = [line.split(" | ")[0] for line in page().splitlines() if line.startswith("| `")]
    names = [name for cell in cells for name in re.findall("`([^`]+)`", cell)]
    assert sorted(names) == sorted(metric.name for metric in all_metrics())


def test_a_stage_has_its_own_page_and_an_unknown_one_is_refused():
    rows = [line for line in page("reward").splitlines() if line.startswith("| `")]
    assert any("reward/kendall_tau" in row for row in rows)
    assert not any("code/" in row or "rlhf/" in row for row in rows)
    with pytest.raises(ConfigError, match=r"--stage shards: expected one of language, code"):
        page("shards")
