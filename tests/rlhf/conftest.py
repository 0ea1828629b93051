"""Process groups for tests that take whole iterations: of one rank in this process, of several in others."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from tests.parallel.ranks import RankGroups


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankGroups]:
    groups = RankGroups(tmp_path_factory.mktemp("ranks"))
    yield groups
    groups.close()
