"""Batch jobs that answer prompts: `slurm/generate.sh`."""

import json
import signal
from pathlib import Path

import pytest

from dist_lm.storage.run_directory import WorkDirectory
from tests.cluster.waiting import eventually
from tests.conftest import TINY_MODEL
from tests.slurm.batch_job import BatchJob
from tests.slurm.real_slurm import RealSlurm
from tests.training_run import write_untrained

pytestmark = [pytest.mark.slurm, pytest.mark.heavy, pytest.mark.timeout(2400)]

PROMPTS = 1_500  # with SETTINGS 20 s of work for one actor: a job still works when it is disturbed
SETTINGS = (
    *TINY_MODEL,
    "model=nano",
    "stage.n=2",
    "stage.max_new_tokens=160",
    "stage.prompts_per_shard=50",
    "cluster.connect_timeout_s=120",
)


class GenerationJob(BatchJob):
    """One job and the run of stage `generate` that it works on."""

    def __init__(self, slurm: RealSlurm, work: WorkDirectory, prompts: Path, run_id: str, nodes: int = 2) -> None:
        self.run = work.run("generate", run_id)
        given = (*SETTINGS, f"stage.prompts={prompts}", f"run_id={run_id}")
        super().__init__(slurm, work, "slurm/generate.sh", *given, nodes=nodes)

    def parts(self) -> dict[str, bytes]:
        """The files of answers that are whole, by name."""
        return {path.name: path.read_bytes() for path in sorted(self.run.samples.glob("part-*"))}

    def wait_for_parts(self, count: int) -> None:
        eventually(f"{count} parts", lambda: self.run.samples.exists() and len(self.parts()) >= count, 480)


@pytest.fixture
def trained(fresh: WorkDirectory) -> WorkDirectory:
    write_untrained(fresh, "code", 0)
    return fresh


@pytest.fixture
def prompts(trained: WorkDirectory) -> Path:
    path = trained.path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"def f_{i}(x):\n", "id": f"p{i}"}) + "\n" for i in range(PROMPTS)))
    return path


@pytest.mark.bars  # test_generation_run.py kills it without a Slurm
def test_two_nodes_answer_every_prompt_and_through_failures_with_the_same_bytes(
    slurm: RealSlurm, trained: WorkDirectory, prompts: Path
) -> None:
    clean = GenerationJob(slurm, trained, prompts, "clean")
    clean.finish()
    assert clean.starts() == 1
    answers = [json.loads(line) for part in clean.parts().values() for line in part.splitlines()]
    assert [(one["id"], one["index"]) for one in answers] == [(f"p{i}", n) for i in range(PROMPTS) for n in range(2)]
    assert {path.name for path in clean.directory.iterdir()} == {"batch.log", "node_n1.log", "node_n2.log"}

    disturbed = GenerationJob(slurm, trained, prompts, "disturbed")
    disturbed.wait_for_parts(2)
    actors = slurm.find("ray::PoolActor")
    assert actors, "no actor works"
    actors[0].send_signal(signal.SIGKILL)
    disturbed.wait_for_parts(4)
    slurm.run("scancel", str(disturbed.id))
    disturbed.finish("CANCELLED")
    assert len(disturbed.parts()) < len(clean.parts())
    again = GenerationJob(slurm, trained, prompts, "disturbed", nodes=1)
    again.finish()
    assert again.parts() == clean.parts()
    assert again.run.result.exists()
