"""Stage `evaluate` as a command: killed and started again it gives the same answers and figures."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dist_lm.storage.process import cores, title
from dist_lm.storage.run_directory import WorkDirectory
from tests.cluster.launched import assert_gone, ending, finish, wait_until
from tests.cluster.loopback_ray import loopback_ray
from tests.conftest import TINY_MODEL
from tests.training_run import linked, write_untrained

pytestmark = [pytest.mark.cluster, pytest.mark.heavy]
SETTINGS = (
    *TINY_MODEL,
    "stage=evaluate",
    *("stage.temperature=1", "stage.max_new_tokens=16", "stage.questions_per_part=5", "stage.tasks=[own_bash,own_sql]"),
)


def started(work: WorkDirectory, models: list[Path], run_id: str, *overrides: str) -> subprocess.Popen:
    chosen = (f"stage.models=[{','.join(map(str, models))}]", f"work_dir={work.path}", f"run_id={run_id}")
    return subprocess.Popen(
        [sys.executable, "-m", "dist_lm.launch", *SETTINGS, *chosen, *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.bars  # test_generation_run.py kills the same pool
def test_a_killed_run_gives_the_same_result(tiny_work, tmp_path):
    work = linked(tiny_work, tmp_path / "work")
    models = [write_untrained(work, stage, seed).path for seed, stage in enumerate(("language", "code"))]

    def start(run_id: str) -> subprocess.Popen:
        return started(work, models, run_id)

    code, out, err = finish(start("whole"))
    assert code == 0, err
    assert "own_bash: code/default/step_00000005 - language/default/step_00000005" in " ".join(out.split())
    run = work.run("evaluate", "killed")
    with ending(start("killed")) as process:
        wait_until(lambda: len(list(run.samples.glob("*/*.jsonl"))) > 20, process, "files of the second model")
        family = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        finish(process)
    assert_gone(family)
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


@pytest.mark.bars  # test_sandboxes.py runs programs on all nodes
def test_programs_run_on_every_node_with_the_same_verdicts(tiny_work, tmp_path):
    work = linked(tiny_work, tmp_path / "work")
    models = [write_untrained(work, "code", 1).path]
    slow = {"language": "sh", "prompt": "sleep 2\nf() {\n", "tests": "}\n[ $(f) = 1 ]", "stop_tokens": ["\n}"]}
    file = tmp_path / "slow.jsonl"  # 150 s of work for a node; the test stops it once it has seen enough
    file.write_text("".join(json.dumps({"name": f"slow_{n}"} | slow) + "\n" for n in range(75 * cores())))
    in_order = "stage.max_sequences=5"  # nearly: a file is done soon after its first question was asked
    asked = ("stage.tasks=[multipl_e]", f"eval.multipl_e={file}", in_order)

    samples = work.run("evaluate", "default").samples

    def files() -> set[Path]:
        return set(samples.rglob("*-*.jsonl"))

    def stop(process: subprocess.Popen) -> None:
        process.send_signal(signal.SIGINT)
        code, _, err = finish(process)
        assert code == 128 + signal.SIGINT, err

    with loopback_ray(tmp_path, nodes=2) as ray:
        there = psutil.Process(ray.process(1))
        with ending(started(work, models, "default", *asked, *ray.overrides(), "cluster.nodes=2")) as process:
            wait_until(
                lambda: any("bwrap" in title(one) for one in there.children(recursive=True)), process, "a sandbox there"
            )
            # both nodes hold 4 programs a core, handed out in order, so the next files have verdicts from there
            before = files()
            wait_until(lambda: len(files() - before) > cores(), process, "files with verdicts from there")
            stop(process)
    judged = {path: path.read_bytes() for path in files() - before}
    for path in judged:
        path.unlink()
    with ending(started(work, models, "default", *asked)) as process:  # these questions again, on one node
        wait_until(lambda: files() >= judged.keys(), process, "the same files from one node")
        stop(process)
    for path, content in judged.items():
        assert path.read_bytes() == content, path
