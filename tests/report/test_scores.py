"""The scores of stage `evaluate` in a report."""

import re

import pytest

from dist_lm.config.root import save_config
from dist_lm.evaluation.comparison import compared_tasks
from dist_lm.prepare.compose import compose_config
from dist_lm.report.page import write_report
from dist_lm.storage import durable
from dist_lm.storage.run_directory import WorkDirectory
from tests.report.made_runs import HOSTILE


def scored(model: str, values: list[float]) -> dict:
    mean = sum(values) / len(values)
    figures = {"pass@1": {"value": mean, "low": 0.1, "high": 0.9, "items": len(values)}}
    task = {"figures": figures, "groups": {"level 1": ("pass@1", mean, 2)}, "outcomes": {}}
    return {
        "model": model,
        "tasks": {"own_sql": task | {"ids": [str(n) for n in range(len(values))], "values": values}},
    }


@pytest.mark.heavy
def test_scores_and_comparisons_are_shown(tmp_path):
    run = WorkDirectory(tmp_path).run("evaluate", "both")
    run.create()
    save_config(compose_config(["stage=evaluate", f"work_dir={tmp_path}", "run_id=both"]), run.config)
    models = [scored("code/a/step_00000005", [0.0] * 8), scored(HOSTILE, [1.0] * 8)]
    compared = compared_tasks(*models)
    assert (compared[0]["difference"], compared[0]["p"]) == (1, 2 / 2**8)
    durable.write_json(run.result, {"stage": "evaluate", "models": models, "comparisons": compared})
    page = write_report([run.path], None, None)[0].read_text(encoding="utf-8")
    cells = re.findall(r"<td>(.*?)</td>", page)
    at = cells.index("code/a/step_00000005")
    assert cells[at : at + 6] == ["code/a/step_00000005", "own_sql", "pass@1", "0.000", "0.100 to 0.900", "8"]
    assert "p = 0.0078 (McNemar)" in page
    assert HOSTILE not in page
