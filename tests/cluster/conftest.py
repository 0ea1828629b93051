"""A launch that nothing disturbs, to compare others with, and a Ray that launches may share."""

from collections.abc import Iterator

import pytest

from dist_lm.storage.run_directory import WorkDirectory
from tests.cluster.launched import CODE_STEPS, finish, start
from tests.cluster.loopback_ray import LoopbackRay, loopback_ray
from tests.training_run import linked


@pytest.fixture(scope="session")
def undisturbed(tiny_work, tmp_path_factory) -> WorkDirectory:
    work = linked(tiny_work, tmp_path_factory.mktemp("undisturbed"))
    code, _, err = finish(start(work, CODE_STEPS))
    assert code == 0, err
    return work


@pytest.fixture(scope="session")
def shared_ray(tmp_path_factory) -> Iterator[LoopbackRay]:
    """One node, for launches that leave Ray as they found it."""
    with loopback_ray(tmp_path_factory.mktemp("shared_ray"), nodes=1) as ray:
        yield ray
