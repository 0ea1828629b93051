"""What can happen to a job: one function each, on a real Slurm."""

import psutil

from tests.slurm.real_slurm import RealSlurm
from tests.slurm.training_job import TrainingJob

RANK, TORCHRUN, DRIVER = "-m dist_lm.train ", "dist_lm.cluster.torchrun", "dist_lm.launch"


def warn_of_the_time_limit(slurm: RealSlurm, job: TrainingJob) -> None:
    slurm.run("scancel", "--batch", "--signal=USR1", str(job.id))


def requeue(slurm: RealSlurm, job: TrainingJob) -> None:
    slurm.run("scontrol", "requeue", str(job.id))


def kill_the_driver(slurm: RealSlurm, job: TrainingJob) -> None:
    one(slurm.find(DRIVER)).kill()


def kill_the_raylet_of_the_head(slurm: RealSlurm, job: TrainingJob) -> None:
    kill_raylet(slurm, slurm.head(job.id))


def kill_the_raylet_of_a_worker(slurm: RealSlurm, job: TrainingJob) -> None:
    kill_raylet(slurm, slurm.worker(job.id))


def kill_the_head_node(slurm: RealSlurm, job: TrainingJob) -> None:
    slurm.kill_node(slurm.head(job.id))


def kill_a_worker_node(slurm: RealSlurm, job: TrainingJob) -> None:
    slurm.kill_node(slurm.worker(job.id))


def kill_a_rank(slurm: RealSlurm, job: TrainingJob) -> None:
    a_rank(slurm, job).kill()


def kill_a_torchrun(slurm: RealSlurm, job: TrainingJob) -> None:
    one(slurm.find(TORCHRUN, slurm.worker(job.id))).kill()


def kill_an_agent(slurm: RealSlurm, job: TrainingJob) -> None:
    agent = one(slurm.find(TORCHRUN, slurm.worker(job.id))).parent()
    assert agent is not None
    agent.kill()


def a_rank(slurm: RealSlurm, job: TrainingJob) -> psutil.Process:
    return one([found for found in slurm.find(RANK, slurm.worker(job.id)) if TORCHRUN not in words(found)])


def kill_raylet(slurm: RealSlurm, node: str) -> None:
    raylet = slurm.raylet(node)
    assert raylet is not None
    raylet.kill()


def one(found: list[psutil.Process]) -> psutil.Process:
    assert len(found) == 1, found
    return found[0]


def words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
