"""Batch jobs on a real Slurm: that they finish, what they refuse, whom they let in, and that nothing is left."""

import secrets
import sys
from pathlib import Path

import pytest

from dist_lm.storage.run_directory import WorkDirectory
from tests.cluster.waiting import eventually
from tests.slurm.disturbances import a_rank
from tests.slurm.real_slurm import RealSlurm
from tests.slurm.training_job import STEPS, TrainingJob, check_same

pytestmark = [pytest.mark.slurm, pytest.mark.heavy, pytest.mark.timeout(2400)]

GONE_S = 25  # after scancel; less than the 30 s that Slurm itself waits by default
JOINER = """
import os, sys, ray
ray.init(address=sys.argv[1], _node_ip_address="127.0.1.1", log_to_driver=False)
print("was let in")
"""


def test_two_nodes(undisturbed: TrainingJob) -> None:
    print(f"two nodes: {undisturbed.seconds_to_first_step():.1f} s from sbatch to the first step")
    assert undisturbed.starts() == 1
    assert len(undisturbed.numbers()) == STEPS
    names = {path.name for path in undisturbed.directory.iterdir()}
    assert names == {"batch.log", "node_n1.log", "node_n2.log"}


def test_one_node(slurm: RealSlurm, fresh: WorkDirectory) -> None:
    job = TrainingJob(slurm, fresh, "stage.steps=10", nodes=1)
    job.finish()
    print(f"one node: {job.seconds_to_first_step():.1f} s from sbatch to the first step")
    assert len(job.numbers()) == 10


def test_a_mistake_fails_the_job_at_once(slurm: RealSlurm, fresh: WorkDirectory) -> None:
    job = TrainingJob(slurm, fresh, "stage.stepz=3", nodes=1)
    job.finish("FAILED")
    assert slurm.job(job.id)["ExitCode"] == "2:0"
    assert "stage.stepz" in job.log
    assert job.starts() == 1


def test_a_work_directory_that_cannot_be_written_is_named_where_the_job_was_submitted(
    slurm: RealSlurm, tmp_path: Path
) -> None:
    job = slurm.submit("slurm/train_large.sh", "work_dir=/srv/work", directory=tmp_path)  # / is read-only
    assert slurm.wait(job) == "FAILED"
    assert "error: work_dir=/srv/work: this job cannot write to" in (tmp_path / f"slurm-{job}.out").read_text()


def test_scancel_leaves_nothing_and_strangers_are_not_let_in(
    slurm: RealSlurm, fresh: WorkDirectory, undisturbed: TrainingJob, tmp_path: Path
) -> None:
    job = TrainingJob(slurm, fresh, "cluster.hang_min_s=600")
    job.wait_for_step(15)
    rank = a_rank(slurm, job)
    rank.suspend()  # or the job would be done before the strangers have knocked
    token = job.directory / "token"
    assert token.stat().st_mode & 0o777 == 0o600
    wrong = tmp_path / "token"
    wrong.touch(mode=0o600)
    wrong.write_text(secrets.token_hex(32))
    address = f"127.0.1.1:{6400 + job.id % 3000}"

    def join(**environ: str) -> str:
        command = [sys.executable, "-c", JOINER, address]
        settings = slurm.environ | {"RAY_NUM_REDIS_GET_RETRIES": "1"} | environ
        return slurm.namespace.run(*command, environ=settings, check=False)

    assert "was let in" in join(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
    for refused in (join(RAY_AUTH_MODE="disabled"), join(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(wrong))):
        assert "was let in" not in refused
        assert "AuthenticationError" in refused

    rank.resume()
    slurm.run("scancel", str(job.id))
    eventually("the job is gone", lambda: not slurm.job_processes(), GONE_S)
    job.finish("CANCELLED")

    again = TrainingJob(slurm, fresh)
    again.finish()
    check_same(again, undisturbed)
