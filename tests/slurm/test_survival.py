"""What a batch job survives, with the numbers of one that nothing disturbed, to the last bit."""

import os
import random
import time
from collections.abc import Callable

import pytest

from dist_lm.storage.process import is_alive
from dist_lm.storage.run_directory import WorkDirectory
from tests.cluster.waiting import eventually
from tests.slurm import disturbances as happens
from tests.slurm.real_slurm import NODES, RealSlurm
from tests.slurm.training_job import TrainingJob, check_same

pytestmark = [pytest.mark.slurm, pytest.mark.heavy, pytest.mark.timeout(2400)]

KILLS = 20
# kills that the job itself survives, without Slurm's help
CHAOS = (
    happens.kill_a_rank,
    happens.kill_a_torchrun,
    happens.kill_an_agent,
    happens.kill_the_raylet_of_a_worker,
    happens.kill_the_raylet_of_the_head,
    happens.kill_the_driver,
)
EVERY = "stage.checkpoint_every=20"
Disturbance = Callable[[RealSlurm, TrainingJob], None]


def survive(slurm: RealSlurm, job: TrainingJob, disturb: Disturbance) -> None:
    """Until the job has gone on after it, and has something to go on from after the next one."""
    at, reached = time.time(), job.step()
    disturb(slurm, job)
    print(f"step {reached:3}: {disturb.__name__}, {job.wait_for_a_step_after(at) - at:.1f} s to the next step")
    checkpoint = job.newest_checkpoint()
    eventually("a new checkpoint", lambda: job.newest_checkpoint() != checkpoint)
    assert not job.run.result.exists(), "it was over before all of it had happened"


@pytest.mark.parametrize(
    "disturbances",
    [
        pytest.param(  # tests/cluster kills each of them without a Slurm
            (happens.kill_a_rank, happens.kill_a_torchrun, happens.kill_an_agent, happens.kill_the_driver),
            id="processes",
            marks=pytest.mark.bars,
        ),
        pytest.param(  # tests/cluster/test_nodes_lost_and_found.py loses one without a Slurm
            (happens.kill_the_raylet_of_a_worker, happens.kill_the_raylet_of_the_head, happens.kill_a_worker_node),
            id="nodes",
            marks=pytest.mark.bars,
        ),
    ],
)
def test_the_job_goes_on_after(
    slurm: RealSlurm, fresh: WorkDirectory, undisturbed: TrainingJob, disturbances: tuple[Disturbance, ...]
) -> None:
    job = TrainingJob(slurm, fresh)
    job.wait_for_step(15)
    for disturb in disturbances:
        survive(slurm, job, disturb)
    job.finish()
    assert slurm.job(job.id)["Restarts"] == "0"
    check_same(job, undisturbed)


def start_again(slurm: RealSlurm, job: TrainingJob, disturb: Disturbance, life: int) -> None:
    """Until the job trains in its next life, which is number `life`, from 0."""
    at, before = time.time(), slurm.job_processes()
    disturb(slurm, job)
    slurm.wait_for_restart(job.id, life)
    eventually("the life before is over", lambda: not any(map(is_alive, before)))
    reached = job.step()
    job.wait_for_a_step_after(at)
    repeated = reached - job.events("started")[-1]["step"]
    print(f"{disturb.__name__}: {repeated} steps repeated")
    assert repeated <= (0 if disturb is happens.warn_of_the_time_limit else 20)


@pytest.mark.parametrize(
    "disturbances",
    [
        pytest.param((happens.warn_of_the_time_limit, happens.requeue), id="the whole job"),
        pytest.param((happens.kill_the_head_node,), id="its head", marks=pytest.mark.bars),  # Slurm may drain its nodes
    ],
)
def test_slurm_starts_the_job_again_after(
    slurm: RealSlurm, fresh: WorkDirectory, undisturbed: TrainingJob, disturbances: tuple[Disturbance, ...]
) -> None:
    # a checkpoint beside training may be in flight when all is killed: then the one before it counts
    job = TrainingJob(slurm, fresh, EVERY, "stage.checkpoint_async=false")
    job.wait_for_step(25)
    for life, disturb in enumerate(disturbances, 1):
        start_again(slurm, job, disturb, life)
    job.finish()
    check_same(job, undisturbed)


@pytest.mark.bars  # test_nodes_lost_and_found.py replaces one without a Slurm
def test_a_replacement_joins_for_a_node_that_dies(slurm: RealSlurm, fresh: WorkDirectory) -> None:
    job = TrainingJob(slurm, fresh, "stage.steps=20")
    job.wait_for_log("starting Ray at")
    (spare,) = set(NODES) - set(slurm.nodes(job.id))
    slurm.kill_node(slurm.worker(job.id))  # before it has joined: the driver waits for a second node
    job.wait_for_log("as a replacement")
    job.finish()
    assert " joins 127.0.1." in (job.directory / f"node_{spare}.log").read_text()
    assert len(job.numbers()) == 20


@pytest.mark.bars
def test_the_only_node_dies(slurm: RealSlurm, fresh: WorkDirectory) -> None:
    job = TrainingJob(slurm, fresh, "stage.steps=60", "stage.checkpoint_every=10", nodes=1)
    job.wait_for_step(15)
    slurm.kill_node(slurm.head(job.id))
    job.finish()
    assert slurm.job(job.id)["Restarts"] == "1"
    assert len(job.numbers()) == 60


@pytest.mark.bars  # Slurm counts time limits in minutes
def test_a_real_time_limit(slurm: RealSlurm, fresh: WorkDirectory) -> None:
    job = TrainingJob(slurm, fresh, "stage.steps=2000", options=("--time=2", "--signal=B:USR1@75"))
    job.wait_for_log("received USR1")
    slurm.wait_for_restart(job.id, 1)
    reached = job.step()
    job.wait_for_a_step_after(time.time())
    assert job.events("started")[-1]["step"] == reached
    slurm.run("scancel", str(job.id))
    job.finish("CANCELLED")


@pytest.mark.bars
def test_twenty_random_kills(slurm: RealSlurm, fresh: WorkDirectory) -> None:
    seed = int(os.environ.get("DIST_LM_CHAOS_SEED") or random.randrange(1_000_000))
    print(f"DIST_LM_CHAOS_SEED={seed}")
    chooser = random.Random(seed)
    # long steps: it must not be over before all kills
    settings = ("stage.steps=300", "stage.checkpoint_every=5", "stage.global_batch=16")
    job = TrainingJob(slurm, fresh, *settings)
    job.wait_for_step(1)
    for _ in range(KILLS):
        survive(slurm, job, chooser.choice(CHAOS))
    job.finish()
    reference = TrainingJob(slurm, fresh, *settings, "run_id=reference")
    reference.finish()
    check_same(job, reference)
