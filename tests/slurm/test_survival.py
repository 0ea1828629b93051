"""What a batch job survives, with the numbers of one that nothing disturbed, to the last bit."""

import signal
from collections.abc import Callable

import pytest

from dist_lm.cluster.process import is_alive
from dist_lm.run_directory import WorkDirectory
from tests.cluster.waiting import eventually
from tests.slurm.real_slurm import RealSlurm
from tests.slurm.training_job import TrainingJob, check_same

pytestmark = [pytest.mark.slurm, pytest.mark.heavy, pytest.mark.timeout(600)]


def warn_of_the_time_limit(slurm: RealSlurm, job: TrainingJob) -> None:
    slurm.run("scancel", "--batch", "--signal=USR1", str(job.id))


def requeue(slurm: RealSlurm, job: TrainingJob) -> None:
    slurm.run("scontrol", "requeue", str(job.id))


def kill_the_driver(slurm: RealSlurm, job: TrainingJob) -> None:
    (driver,) = slurm.find("dist_lm.launch")
    driver.kill()


def kill_the_raylet_of_the_head(slurm: RealSlurm, job: TrainingJob) -> None:
    raylet = slurm.raylet("n1")
    assert raylet is not None
    raylet.kill()


def kill_the_head_node(slurm: RealSlurm, job: TrainingJob) -> None:
    slurm.kill_node("n1")


def kill_a_worker_node(slurm: RealSlurm, job: TrainingJob) -> None:
    slurm.kill_node("n2")


def kill_the_raylet_of_a_worker(slurm: RealSlurm, job: TrainingJob) -> None:
    raylet = slurm.raylet("n2")
    assert raylet is not None
    raylet.kill()


def kill_a_rank(slurm: RealSlurm, job: TrainingJob) -> None:
    slurm.find("dist_lm.train", "n2")[-1].kill()


@pytest.mark.parametrize(
    ("disturb", "restarts"),
    [
        (warn_of_the_time_limit, 1),
        (requeue, 1),
        (kill_the_driver, 0),
        (kill_the_raylet_of_the_head, 0),
        (kill_the_head_node, 1),
        (kill_a_worker_node, 0),
        (kill_the_raylet_of_a_worker, 0),
        (kill_a_rank, 0),
    ],
)
def test_the_same_numbers_after(
    slurm: RealSlurm,
    fresh: WorkDirectory,
    undisturbed: TrainingJob,
    disturb: Callable[[RealSlurm, TrainingJob], None],
    restarts: int,
) -> None:
    """`restarts`: by Slurm."""
    job = TrainingJob(slurm, fresh)
    job.wait_for_step(25)
    before = slurm.job_processes()
    disturb(slurm, job)
    if restarts:
        eventually("Slurm takes it back", lambda: slurm.job(job.id)["Restarts"] == str(restarts), 90)
        eventually("its first life is over", lambda: not any(map(is_alive, before)), 30)
    job.finish()
    check_same(job, undisturbed)


def test_a_real_time_limit(slurm: RealSlurm, fresh: WorkDirectory) -> None:
    job = TrainingJob(slurm, fresh, "stage.steps=400", options=("--time=2", "--signal=B:USR1@75"))
    job.finish(seconds=500)
    assert f"received {signal.SIGUSR1.name[3:]}" in job.log
    assert int(slurm.job(job.id)["Restarts"]) >= 1
    assert len(job.numbers()) == 400
