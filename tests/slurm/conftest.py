"""One Slurm for all tests of a session; every test finds it idle. And a job that nothing disturbs, to compare with."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_lm.storage.run_directory import WorkDirectory
from tests.slurm.real_slurm import RealSlurm, missing
from tests.slurm.training_job import TrainingJob
from tests.training_run import linked


@pytest.fixture(scope="session")
def slurm_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealSlurm]:
    """Munge, slurmctld and three slurmd."""
    if reason := missing():
        pytest.skip(reason)
    slurm = RealSlurm(tmp_path_factory.mktemp("slurm"), tmp_path_factory.getbasetemp())
    yield slurm
    slurm.close()


@pytest.fixture
def slurm(slurm_session: RealSlurm) -> Iterator[RealSlurm]:
    """The session's Slurm with no job and every node idle."""
    slurm_session.recover()
    yield slurm_session
    slurm_session.recover()


@pytest.fixture
def fresh(tiny_work: WorkDirectory, tmp_path: Path) -> WorkDirectory:
    """A work directory with a tokenizer and corpora, alone in its directory."""
    directory = tmp_path / "alone" / "work"
    directory.mkdir(parents=True)
    return linked(tiny_work, directory)


@pytest.fixture(scope="session")
def undisturbed(
    slurm_session: RealSlurm, tiny_work: WorkDirectory, tmp_path_factory: pytest.TempPathFactory
) -> TrainingJob:
    """A job of two nodes that ran to its end."""
    slurm_session.recover()
    directory = tmp_path_factory.mktemp("undisturbed") / "work"
    directory.mkdir()
    job = TrainingJob(slurm_session, linked(tiny_work, directory))
    job.finish()
    return job
