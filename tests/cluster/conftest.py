"""A launch that nothing disturbs, to compare others with."""

import pytest

from dist_lm.storage.run_directory import WorkDirectory
from tests.cluster.launched import CODE_STEPS, finish, start
from tests.training_run import linked


@pytest.fixture(scope="session")
def undisturbed(tiny_work, tmp_path_factory) -> WorkDirectory:
    work = linked(tiny_work, tmp_path_factory.mktemp("undisturbed"))
    code, _, err = finish(start(work, CODE_STEPS))
    assert code == 0, err
    return work
