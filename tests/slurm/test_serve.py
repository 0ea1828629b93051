"""Batch jobs that serve a model: `slurm/serve.sh`."""

import json
import re
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from dist_lm.config.root import save_config
from dist_lm.prepare.compose import compose_config
from dist_lm.storage.run_directory import WorkDirectory
from tests.cluster.waiting import eventually
from tests.conftest import TINY
from tests.patience import patient
from tests.slurm.real_slurm import RealSlurm
from tests.training_run import write_untrained

pytestmark = [pytest.mark.slurm, pytest.mark.bars, pytest.mark.timeout(2400)]

PORT = 8000
PROMPTS = [f"def f_{number}(x):\n" for number in range(8)]
CLIENT = """
import json, sys, httpx

url, body = sys.argv[1:]
answer = httpx.get(url, timeout=60) if body == "null" else httpx.post(url, json=json.loads(body), timeout=600)
print(answer.raise_for_status().text)
"""


@dataclass(frozen=True)
class ServingJob:
    """A job that serves a run, and a client on its first node."""

    slurm: RealSlurm
    work: WorkDirectory
    id: int

    @property
    def log(self) -> str:
        path = self.work.path / f"slurm-{self.id}.out"
        return path.read_text() if path.exists() else ""

    def ask(self, path: str, body: dict[str, Any] | None = None) -> str:
        """Returns the answer's text; without a body the request is a GET."""
        url = f"http://127.0.0.1:{PORT}/{path}"
        return self.slurm.run(sys.executable, "-c", CLIENT, url, json.dumps(body), seconds=patient(600))

    def engines(self) -> int:
        (count,) = re.findall(r"^dist_lm_engines_up\S* (\d+)", self.ask("metrics"), re.MULTILINE)
        return int(count)

    def answers(self) -> list[list[int]]:
        """Returns the token ids of the likeliest answers."""
        body = {"prompt": PROMPTS, "temperature": 0, "max_tokens": 20, "return_token_ids": True}
        choices = json.loads(self.ask("v1/completions", body))["choices"]
        return [choice["token_ids"] for choice in sorted(choices, key=lambda choice: choice["index"])]

    def end(self) -> None:
        """Cancels the job; no process of it is left."""
        self.slurm.run("scancel", str(self.id))
        assert self.slurm.wait(self.id) == "CANCELLED", self.log
        eventually("no process is left", lambda: not self.slurm.job_processes())


def serve(slurm: RealSlurm, work: WorkDirectory, nodes: int) -> ServingJob:
    options = (f"--nodes={nodes}", "--time=60")
    arguments = (str(work.run("code", "default").path), "--device", "cpu", "--port", str(PORT))
    job = ServingJob(slurm, work, slurm.submit("slurm/serve.sh", *arguments, options=options, directory=work.path))

    def listens() -> bool:
        assert slurm.state(job.id) in ("PENDING", "CONFIGURING", "RUNNING"), job.log
        return f"http://127.0.0.1:{PORT}/v1" in job.log

    eventually(f"the server of job {job.id} listens", listens, 240)
    return job


def test_any_number_of_nodes_gives_the_same_answers_through_the_loss_of_one(
    slurm: RealSlurm, fresh: WorkDirectory
) -> None:
    """Finds a server that uses one node of a job, or answers otherwise or not at all once a node is lost."""
    run = write_untrained(fresh, "code", 0)
    save_config(compose_config(["stage=code", *TINY, f"work_dir={fresh.path}"]), run.config)
    alone = serve(slurm, fresh, nodes=1)
    expected = alone.answers()
    assert all(expected)
    alone.end()

    job = serve(slurm, fresh, nodes=2)
    eventually("both nodes have an engine", lambda: job.engines() == 2)
    assert job.answers() == expected

    slurm.kill_node(slurm.worker(job.id))
    eventually("the lost engine is missed", lambda: job.engines() == 1)
    assert job.answers() == expected
    job.end()
