"""An algorithm of RLHF is added by one file and its entry in the registry: composed, refused elsewhere, trained."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dist_lm
from dist_lm.prepare.conf_folders import conf_directory
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tracking.metrics import read_metrics
from tests.cluster.test_rlhf_run import SETTINGS
from tests.training_run import linked, write_untrained

pytestmark = pytest.mark.cluster

DEADLINE_S = 240
ALGORITHM = """
from __future__ import annotations

from dataclasses import dataclass

from dist_lm.rlhf.algorithm import POSITIVE, Algorithm, AlgorithmKeys, Prepared, key


@dataclass
class ReinforceKeys(AlgorithmKeys):
    samples: int = 2
    baseline_weight: float = key(1.0, POSITIVE)  # a key that no other algorithm has


class Reinforce(Algorithm):
    Keys = ReinforceKeys
    keys: ReinforceKeys

    def prepare(self, experience, kl_coefficient):
        advantage_B = experience.score_B - self.keys.baseline_weight * experience.score_B.mean()
        columns = {"old": experience.logprob_BT, "advantage": advantage_B[:, None] * experience.mask_BT}
        return Prepared(columns, experience.mask_BT.sum(1))

    def policy_loss(self, tokens):
        from dist_lm.training.objective import LossSum

        total = -(tokens.logprob_N * tokens.columns["advantage"]).sum()
        moved = (tokens.columns["old"] - tokens.logprob_N).detach().sum()
        count = tokens.logprob_N.new_ones(tokens.logprob_N.shape).sum()
        return LossSum(total, count, {"policy_loss": total.detach(), "approx_kl": moved})
"""
IMPORT = "from dist_lm.rlhf.algorithms.reinforce import Reinforce\n"
ENTRY = '    "reinforce": Reinforce,\n'


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with dist_lm and the algorithm in it."""
    folder = tmp_path_factory.mktemp("program")
    package = Path(dist_lm.__file__).parent
    shutil.copytree(package, folder / "dist_lm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(conf_directory(), folder / "conf")
    algorithms = folder / "dist_lm" / "rlhf" / "algorithms"
    (algorithms / "reinforce.py").write_text(ALGORITHM)
    registry = algorithms / "registry.py"
    before, opening, entries = registry.read_text().partition("\nALGORITHMS: dict[str, type[Algorithm]] = {\n")
    registry.write_text(f"{before}{IMPORT}{opening}{ENTRY}{entries}")
    return folder


def run_in(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(program), str(Path(__file__).parents[2])])}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=program, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


def test_its_keys_are_its_own_and_torch_is_not_needed_to_read_them(program: Path):
    code = """
import sys
from dist_lm.errors import ConfigError
from dist_lm.rlhf.config import RlhfConfig
own = RlhfConfig(algorithm="reinforce", baseline_weight=0.5)
print(own.baseline_weight, RlhfConfig(algorithm="reinforce").samples, RlhfConfig(algorithm="grpo").baseline_weight)
for keys in ({"algorithm": "grpo", "baseline_weight": 0.5}, {"algorithm": "reinforce", "clip": 0.2}):
    try:
        RlhfConfig(**keys)
    except ConfigError as error:
        print(error)
try:
    RlhfConfig(algorithm="reinforce", baseline_weight=-1.0)
except ConfigError as error:
    print(error)
print("torch" in sys.modules)
"""
    done = run_in(program, "-c", code)
    assert done.returncode == 0, done.stderr
    values, other, unread, bounds, torch_is_loaded = done.stdout.splitlines()
    assert values == "0.5 2 None"
    assert "rlhf.baseline_weight=0.5: expected null: rlhf.algorithm=grpo does not read it" in other
    assert "read by reinforce" in other
    assert "rlhf.clip=0.2: expected null: rlhf.algorithm=reinforce does not read it" in unread
    assert "rlhf.baseline_weight=-1.0: expected a positive number" in bounds
    assert torch_is_loaded == "False"


@pytest.mark.bars  # test_added_stage.py launches a stage of another package
def test_it_is_trained_by_a_launch(program: Path, tiny_work: WorkDirectory, tmp_path: Path):
    work = linked(tiny_work, tmp_path / "own")
    start = write_untrained(work, "tools", 0)
    done = run_in(
        program,
        *("-m", "dist_lm.launch", *SETTINGS, f"work_dir={work.path}", f"stage.init_from={start.path}"),
        *("rlhf.algorithm=reinforce", "rlhf.baseline_weight=0.5", "rlhf.value_lr=null", "rlhf.epochs=1"),
        *("stage.steps=2", "rlhf.pool.actors=0", "rlhf.held_out_prompts=0", "cluster.ranks_per_node=1"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = work.run("rlhf", "default")
    assert json.loads(run.result.read_text())["steps"] == 2
    assert "baseline_weight: 0.5" in run.config.read_text()
    lines = [line for line in read_metrics(run.metrics) if "rlhf/policy_loss" in line]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["rlhf/policy_grad_norm"] > 0
