"""A batch job of this project that trains a tiny model, seen from the outside."""

import json
from typing import Any

from dist_lm.cluster.events import read_events
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tracking.metrics import read_metrics
from tests.cluster.waiting import eventually
from tests.conftest import TINY
from tests.slurm.batch_job import BatchJob
from tests.slurm.real_slurm import RealSlurm

STEPS = 240
ARGUMENTS = (
    *TINY,
    "stage=language",
    "model=nano",
    f"stage.steps={STEPS}",
    "stage.global_batch=4",
    "stage.micro_batch=2",
    "stage.warmup_steps=5",
    "stage.checkpoint_every=10",
    "stage.eval_every=0",
    "stage.sampling.samples_per_prompt=1",
    "stage.sampling.max_new_tokens=4",
    "cluster.ranks_per_node=1",
    "cluster.connect_timeout_s=120",
)
TIMED = ("time", "perf/", "checkpoint/")


class TrainingJob(BatchJob):
    """One job and its run."""

    def __init__(
        self, slurm: RealSlurm, work: WorkDirectory, *arguments: str, nodes: int = 2, options: tuple[str, ...] = ()
    ) -> None:
        """Submit it; `options` are sbatch's, `arguments` are added to those of a tiny model and win over them."""
        given = {argument.split("=")[0] for argument in arguments}
        run_id = next((argument.split("=")[1] for argument in arguments if argument.startswith("run_id=")), "default")
        self.run: RunDirectory = work.run("language", run_id)
        kept = (argument for argument in ARGUMENTS if argument.split("=")[0] not in given)
        super().__init__(slurm, work, "slurm/train_large.sh", *kept, *arguments, nodes=nodes, options=options)

    def step(self) -> int:
        """The last step in the metrics; 0: none."""
        if not self.run.metrics.exists():
            return 0
        return max((line["step"] for line in read_metrics(self.run.metrics)), default=0)

    def seconds_to_first_step(self) -> float:
        """From sbatch to the first step in the metrics."""
        return next(iter(read_metrics(self.run.metrics)))["time"] - self.submitted

    def wait_for_step(self, step: int, seconds: float = 480) -> None:
        def reached() -> bool:
            assert self.state() in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"), self.everything()
            return self.step() >= step

        eventually(f"step {step}", reached, seconds)

    def result(self) -> dict[str, Any]:
        """result.json."""
        return json.loads(self.run.result.read_text())

    def numbers(self) -> dict[int, dict[str, float]]:
        """Everything in the metrics that is not a time, by step; every step is there once."""
        lines = [line for line in read_metrics(self.run.metrics) if "train/loss" in line]
        steps = [line["step"] for line in lines]
        assert steps == list(range(1, len(steps) + 1)), steps
        return {
            line["step"]: {key: value for key, value in line.items() if not key.startswith(TIMED)} for line in lines
        }

    def events(self, name: str) -> list[dict[str, Any]]:
        """The events of that name that the launcher has noted."""
        return [event for event in read_events(self.run.events) if event["event"] == name]

    def wait_for_a_step_after(self, at: float, seconds: float = 480) -> float:
        """Wait for a step taken after `at` (seconds since 1970) by a gang started after it; when it was."""

        def first() -> float | None:
            started = [event["time"] for event in self.events("started") if event["time"] > at]
            times = [line["time"] for line in read_metrics(self.run.metrics) if started and line["time"] > started[-1]]
            return min(times, default=None)

        found = eventually("a step after the disturbance", first, seconds)
        assert found is not None
        return found

    def newest_checkpoint(self) -> str:
        """Its name; empty without one."""
        latest = self.run.checkpoints / "LATEST"
        return latest.read_text() if latest.exists() else ""


def check_same(job: TrainingJob, reference: TrainingJob) -> None:
    """The same losses, tokens and result as a job that nothing disturbed, to the last bit."""
    assert job.numbers() == reference.numbers()
    found, expected = job.result()["metrics"], reference.result()["metrics"]
    assert found["val/loss"] == expected["val/loss"]
