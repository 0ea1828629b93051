"""One Slurm for all tests of a session; every test finds it idle."""

from collections.abc import Iterator

import pytest

from tests.slurm.real_slurm import RealSlurm, missing


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
