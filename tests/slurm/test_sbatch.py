"""Batch jobs on a real Slurm: what they leave, what they refuse, and what they survive with the same numbers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_lm.run_directory import WorkDirectory
from tests.slurm.real_slurm import RealSlurm
from tests.slurm.training_job import TrainingJob
from tests.training_run import linked

pytestmark = [pytest.mark.slurm, pytest.mark.heavy, pytest.mark.timeout(420)]


@pytest.fixture
def fresh(tiny_work: WorkDirectory, tmp_path: Path) -> Iterator[WorkDirectory]:
    """A work directory with a tokenizer and corpora, alone in its directory."""
    (tmp_path / "alone" / "work").mkdir(parents=True)
    return linked(tiny_work, tmp_path / "alone" / "work")


@pytest.fixture(scope="module")
def undisturbed(
    slurm_session: RealSlurm, tiny_work: WorkDirectory, tmp_path_factory: pytest.TempPathFactory
) -> TrainingJob:
    """A job of two nodes that ran to its end."""
    slurm_session.recover()
    directory = tmp_path_factory.mktemp("undisturbed") / "work"
    directory.mkdir()
    job = TrainingJob(slurm_session, linked(tiny_work, directory))
    job.wait_for_step(1)
    fields = slurm_session.job(job.id)
    print(f"sbatch to first step: see {fields['SubmitTime']}")
    job.finish()
    return job


def test_two_nodes(undisturbed: TrainingJob) -> None:
    assert undisturbed.starts() == 1
    assert undisturbed.result()["metrics"]["val/loss"] > 0
