"""A launch that nothing disturbs, to compare others with; a Ray that launches may share; a pool in this process."""

from collections.abc import Iterator

import pytest

from dist_lm.cluster import gang, inspection
from dist_lm.cluster.ray_cluster import RayCluster
from dist_lm.config.cluster import ClusterConfig
from dist_lm.launcher import pool_run
from dist_lm.storage.run_directory import WorkDirectory
from tests.cluster.launched import CODE_STEPS, finish, start, train_language
from tests.cluster.loopback_ray import LoopbackRay, loopback_ray
from tests.cluster.pool_of_one import Alone
from tests.patience import patient
from tests.training_run import linked, write_untrained


@pytest.fixture(scope="session", autouse=True)
def patience() -> Iterator[None]:
    """What the launcher allows its agents and nodes, for the machine that these tests run on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gang, "START_S", patient(gang.START_S))
        patch.setattr(inspection, "ANSWER_S", patient(inspection.ANSWER_S))
        patch.setattr(inspection, "SUM_S", patient(inspection.SUM_S))
        yield


@pytest.fixture(scope="session")
def undisturbed(tiny_work, tmp_path_factory) -> WorkDirectory:
    work = linked(tiny_work, tmp_path_factory.mktemp("undisturbed"))
    train_language(work)
    code, out, err = finish(start(work, CODE_STEPS))
    assert code == 0, err
    assert "language there" in " ".join(out.split()), "it was built again"
    return work


@pytest.fixture(scope="session")
def shared_ray(tmp_path_factory) -> Iterator[LoopbackRay]:
    """One node, for launches that leave Ray as they found it."""
    with loopback_ray(tmp_path_factory.mktemp("shared_ray"), nodes=1) as ray:
        yield ray


@pytest.fixture(scope="module")
def trained(tiny_work: WorkDirectory, tmp_path_factory: pytest.TempPathFactory) -> WorkDirectory:
    """A work directory with checkpoints of both stages."""
    work = linked(tiny_work, tmp_path_factory.mktemp("trained"))
    for seed, stage in enumerate(("language", "code")):
        write_untrained(work, stage, seed)
    return work


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> RayCluster:
    """None: engines work in this process."""
    monkeypatch.setattr(pool_run, "Pool", Alone)
    monkeypatch.setattr(RayCluster, "nodes", lambda self: [])
    return RayCluster("nowhere", ClusterConfig(name="local"))
