"""Ranks for the tests of a file: started when first asked for, gone at its end."""

from collections.abc import Iterator

import pytest

from tests.parallel.ranks import RankGroups


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankGroups]:
    groups = RankGroups(tmp_path_factory.mktemp("ranks"))
    yield groups
    groups.close()
