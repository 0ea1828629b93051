"""The closing table of stage reward."""

import io

from dist_lm.stages.reward.stage import STAGE, print_agreement
from dist_lm.tracking.console import Console

AFTER = {
    "reward/accuracy": 0.75, "reward/kendall_tau": 0.5, "reward/top1": 0.6, "reward/calibration_error": 0.04,
    "reward/accuracy_k4": 0.7, "reward/accuracy_hh_rlhf": 0.8, "reward/scored": 1200.0,
}  # fmt: skip


def shown(result: dict) -> str:
    output = io.StringIO()
    print_agreement(result, Console(output, live=False))
    return output.getvalue()


def test_a_row_for_all_for_each_size_and_for_each_source() -> None:
    lines = shown({"metrics": AFTER, "before": {"reward/accuracy": 0.5}}).splitlines()
    rows = {line.split("  ")[0].strip(): line for line in lines}
    assert "0.500 -> 0.750" in rows["all"]
    assert "0.040" in rows["all"]
    assert "0.700" in rows["of 4"]
    assert "0.800" in rows["hh_rlhf"]


def test_other_stages_show_nothing() -> None:
    assert shown({"metrics": {"val/loss": 1.0}}) == ""
    assert list(STAGE.own_entries({"metrics": {}})) == []


def test_the_normaliser_is_a_line() -> None:
    (line,) = STAGE.own_entries({"metrics": AFTER, "normaliser": {"mean": 1.25, "std": 2.0}})
    assert line == ("scores", "mean 1.250, deviation 2.000 on 1,200 samples")
