"""How far a reader walks: the number of package files in which a function runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dist_lm
from dist_lm.storage.run_directory import WorkDirectory
from tests.conftest import TINY, TINY_MODEL
from tests.patience import patient
from tests.training_run import linked, write_untrained

pytestmark = [pytest.mark.cluster, pytest.mark.heavy]

ROOT = Path(dist_lm.__file__).parent
DEADLINE_S = patient(600)
TO_THE_LOSS, ONE_ITERATION = 82, 117  # 65 % of 127 and 180, measured before packages were merged
RLHF = (
    "stage=rlhf",
    *TINY_MODEL,
    "stage.steps=1",
    "rlhf.prompts_from=PROMPTS",
    "rlhf.prompts=4",
    "rlhf.max_new_tokens=8",
    "rlhf.minibatches=1",
    "rlhf.held_out_prompts=0",
    "rlhf.pool.actors=1",
    "rlhf.pool.placement=disjoint",
    "rlhf.pool.cache_tokens=4096",
)


def walked(work: WorkDirectory, out: Path, *overrides: str) -> tuple[set[str], set[str]]:
    """(files that ran a function before the first loss, all files that did) of a launch."""
    out.mkdir()
    environment = os.environ | {
        "WALKED_ROOT": f"{ROOT}{os.sep}",
        "WALKED_OUT": str(out),
        "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent / "walk"), str(ROOT.parent))),
    }
    command = [sys.executable, "-m", "dist_lm.launch", f"work_dir={work.path}", "cluster.ranks_per_node=1"]
    done = subprocess.run(
        [*command, *overrides], env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = sorted(
        (float(seconds), name)
        for path in out.glob("*.txt")
        for seconds, name in (line.split(" ", 1) for line in path.read_text().splitlines())
    )
    loss = next((seconds for seconds, name in lines if name == "LOSS"), 0.0)
    files = [(seconds, name) for seconds, name in lines if name != "LOSS"]
    return {name for seconds, name in files if seconds <= loss}, {name for _, name in files}


def test_from_the_command_to_the_first_loss(tiny_work, tmp_path):
    work = linked(tiny_work, tmp_path / "own")
    start = write_untrained(work, "language", seed=1)
    settings = ("stage.global_batch=4", "stage.micro_batch=2", "stage.steps=1", "stage.sampling.samples_per_prompt=0")
    found, _ = walked(work, tmp_path / "walk", "stage=code", *TINY, f"stage.init_from={start.path}", *settings)
    assert len(found) <= TO_THE_LOSS, " ".join(sorted(found))
    assert {"launch.py", "train.py", "training/trainer.py", "model/transformer.py"} <= found


@pytest.mark.bars
def test_one_iteration_of_rlhf(tiny_work, tmp_path):
    work = linked(tiny_work, tmp_path / "own")
    start = write_untrained(work, "tools", seed=1)
    reward = write_untrained(work, "reward", seed=2)
    reward.result.write_text(json.dumps({"normaliser": {"mean": 0.0, "std": 1.0}}))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Add 1 and 2\nList files\nSay hello\nCount words\n")
    settings = [one.replace("PROMPTS", str(prompts)) for one in RLHF]
    starts = (f"stage.init_from={start.path}", f"rlhf.reward_model={reward.path}")
    _, found = walked(work, tmp_path / "walk", *starts, *settings)
    assert len(found) <= ONE_ITERATION, " ".join(sorted(found))
    assert {"rlhf/learner.py", "rlhf/algorithms/ppo.py", "generation/engine.py"} <= found
