"""Stage `evaluate` as a command: killed and started again it gives the same answers and figures."""

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

from tests.cluster.launched import finish, wait_until
from tests.conftest import TINY
from tests.training_run import linked, write_untrained

pytestmark = [pytest.mark.cluster, pytest.mark.heavy, pytest.mark.timeout(600)]
SETTINGS = (
    *(one for one in TINY if not one.startswith("stage.")),
    "stage=evaluate",
    *("stage.temperature=1", "stage.max_new_tokens=16", "stage.questions_per_part=5", "stage.tasks=[own_bash,own_sql]"),
)


def test_a_killed_run_gives_the_same_result(tiny_work, tmp_path):
    work = linked(tiny_work, tmp_path / "work")
    models = [write_untrained(work, stage, seed).path for seed, stage in enumerate(("language", "code"))]

    def start(run_id: str) -> subprocess.Popen:
        chosen = f"stage.models=[{','.join(map(str, models))}]"
        return subprocess.Popen(
            [sys.executable, "-m", "dist_lm.launch", *SETTINGS, chosen, f"work_dir={work.path}", f"run_id={run_id}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    code, out, err = finish(start("whole"))
    assert code == 0, err
    assert "own_bash: code/default/step_00000005 - language/default/step_00000005" in " ".join(out.split())
    run = work.run("evaluate", "killed")
    process = start("killed")
    wait_until(lambda: len(list(run.samples.glob("*/*.jsonl"))) > 20, process, "files of the second model")
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    finish(process)
    assert psutil.wait_procs(family, timeout=60)[1] == []
    code, _, err = finish(start("killed"))
    assert code == 0, err
    whole = work.run("evaluate", "whole")
    names = sorted(path.relative_to(whole.samples) for path in whole.samples.rglob("*.jsonl"))
    assert len(names) == 2 * 2 * 10 + 1
    for name in names:
        assert (run.samples / name).read_bytes() == (whole.samples / name).read_bytes(), name
    results = [json.loads(one.result.read_text()) for one in (whole, run)]
    assert results[0]["models"] == results[1]["models"]
    assert results[0]["comparisons"] == results[1]["comparisons"]
