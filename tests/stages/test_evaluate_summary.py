"""What stage evaluate prints fits a terminal."""

import io
import json

from dist_lm.prepare.compose import compose_config
from dist_lm.stages.evaluate.stage import STAGE
from dist_lm.stages.stage import run_of
from dist_lm.tracking.console import Console


def figure(value: float) -> dict:
    return {"value": value, "low": value - 0.01, "high": value + 0.01, "items": 1234}


def test_tables_of_figures_have_at_most_100_columns(tmp_path):
    sources = [
        f"bits_per_byte, /data/of/some/department/corpora/shared/2026/part_{n}/held_out.jsonl.zst" for n in (1, 2)
    ]
    tasks = {
        "own_python": {"figures": {"pass@1": figure(0.5)}, "groups": {}},
        "bits_per_byte": {"figures": {name: figure(0.9) for name in sources}, "groups": {}},
    }
    models = [{"model": f"code/a_run_with_a_name_of_its_own_{n}/step_00000400", "tasks": tasks} for n in (1, 2)]
    config = compose_config(["stage=evaluate", f"work_dir={tmp_path}"])
    run = run_of(config)
    run.create()
    run.result.write_text(json.dumps({"models": models, "comparisons": []}))
    output = io.StringIO()
    STAGE.summarize(config, Console(output))
    lines = output.getvalue().splitlines()
    tables = [line for line in lines if not line.startswith("answers: ")]
    assert max(map(len, tables)) <= 100
    # Sources are told apart, although their names are shortened.
    assert any("part_1/held_out.jsonl.zst" in line for line in tables)
    assert any("part_2/held_out.jsonl.zst" in line for line in tables)
    assert STAGE.figures(json.loads(run.result.read_text())) == "2 models, 2 tasks; own_python pass@1 0.500, 0.500"
