"""The page of metrics is made from the registry (tests/test_documentation.py compares docs/metrics.md with it)."""

import pytest

from dist_lm.errors import ConfigError
from dist_lm.tracking.metrics_page import page
from dist_lm.tracking.registry import METRICS


def test_every_metric_is_on_the_page_once():
    rows = [line.split("`")[1] for line in page().splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted(metric.name for metric in METRICS)


def test_a_stage_has_its_own_page_and_an_unknown_one_is_refused():
    rows = [line for line in page("reward").splitlines() if line.startswith("| `")]
    assert any("reward/kendall_tau" in row for row in rows)
    assert not any("code/" in row or "rlhf/" in row for row in rows)
    with pytest.raises(ConfigError, match=r"--stage shards: expected one of language, code"):
        page("shards")
