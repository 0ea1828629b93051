"""A package that is installed beside dist_lm adds a stage: found, composed, planned, trained, summed up."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tracking.metrics import read_metrics
from tests.conftest import TINY
from tests.patience import patient
from tests.training_run import linked

pytestmark = pytest.mark.cluster

DEADLINE_S = patient(240)
STAGE = """
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from dist_lm.config.root import Config
from dist_lm.config.stage import StageConfig
from dist_lm.stages.text import TextStage


@dataclass
class ProseStageConfig(StageConfig):
    word: str = "none"


@dataclass
class ProseConfig(Config):
    stage: ProseStageConfig = MISSING


class Prose(TextStage):
    name = "prose"
    schema = ProseConfig
    conf = Path(__file__).parent / "conf"

    def own_entries(self, result):
        yield "word", result["word"]

    def result(self, config, run, metrics):
        return super().result(config, run, metrics) | {"word": config.stage.word}


STAGE = Prose()
"""
YAML = "name: prose\ncorpus: language\ninit_from: none\nsteps: 2\nword: hello\n"
FILES = {
    "prose_stage/__init__.py": STAGE,
    "prose_stage/conf/stage/prose.yaml": YAML,
    "prose_stage-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: prose-stage\nVersion: 1.0\n",
    "prose_stage-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "prose_stage-1.0.dist-info/entry_points.txt": "[dist_lm.stages]\nprose = prose_stage:STAGE\n",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the package is installed."""
    folder = tmp_path_factory.mktemp("added")
    wheel = folder / "prose_stage-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in FILES.items():
            archive.writestr(name, text)
        record = "".join(f"{name},,\n" for name in [*FILES, "prose_stage-1.0.dist-info/RECORD"])
        archive.writestr("prose_stage-1.0.dist-info/RECORD", record)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--target",
        str(folder / "site"),
    ]
    subprocess.run([*pip, str(wheel)], check=True, timeout=DEADLINE_S)
    places = [str(folder / "site"), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))}


def launch(work: WorkDirectory, environment: dict[str, str], *overrides: str) -> subprocess.CompletedProcess[str]:
    settings = (
        *TINY,
        f"work_dir={work.path}",
        "stage.global_batch=4",
        "stage.micro_batch=2",
        "cluster.ranks_per_node=1",
    )
    command = [sys.executable, "-m", "dist_lm.launch", "stage=prose", *settings, *overrides]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


@pytest.mark.bars  # test_added_stage_contract.py holds it to each method
def test_a_stage_of_another_package_is_trained(tiny_work, installed, tmp_path):
    own = linked(tiny_work, tmp_path / "own")
    done = launch(own, installed, "stage.word=good")
    assert done.returncode == 0, done.stdout + done.stderr
    run = own.run("prose", "default")
    result = json.loads(run.result.read_text())
    assert (result["steps"], result["word"]) == (2, "good")
    assert [line["step"] for line in read_metrics(run.metrics) if "train/loss" in line] == [1, 2]
    assert "stage=prose is done" in done.stdout
    assert "word" in done.stdout
    assert "\nprose " in launch(own, installed, "stage.word=good").stdout  # it is there
    refused = launch(own, installed, "stage.word=bad")
    assert refused.returncode == 2
    assert "stage.word=bad (was good)" in refused.stderr


@pytest.mark.heavy
def test_its_keys_are_its_own(tiny_work, installed, tmp_path):
    refused = launch(linked(tiny_work, tmp_path / "own"), installed, "stage.sampling.top_k=1")
    assert refused.returncode == 2
    assert "stage.sampling.top_k=1: no such key" in refused.stderr


@pytest.mark.heavy
def test_without_the_package_there_is_no_such_stage(tiny_work, tmp_path):
    refused = launch(linked(tiny_work, tmp_path / "own"), dict(os.environ))
    assert refused.returncode == 2
    assert "stage=prose: expected one of" in refused.stderr
