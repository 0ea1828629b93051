"""How ranks join: how long a collective may wait."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dist_lm.prepare.compose import compose_config
from dist_lm.stages.training import program
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.training.heartbeat import Unheard
from tests.conftest import TINY


class JoinedError(Exception):
    pass


@pytest.mark.parametrize(
    ("overrides", "least_s"),
    [
        ((), 6 * 3600.0),
        (("cluster.hang_otherwise_s=60",), 6 * 3600.0),  # a hang of an evaluation is no limit of generation
        (("cluster.hang_otherwise_s=90000",), 90000.0),  # a hang is found before the timeout
        (("cluster.hang_min_s=90000",), 90000.0),
    ],
)
def test_ranks_wait_for_the_first_one_longer_than_it_generates(
    monkeypatch, tmp_path, overrides: tuple[str, ...], least_s: float
):
    waits: list[float] = []

    @contextmanager
    def joined(device: str, timeout_s: float) -> Iterator[None]:
        waits.append(timeout_s)
        raise JoinedError
        yield

    monkeypatch.setattr(program, "process_group", joined)
    config = compose_config(["stage=language", *TINY, "parallel.dp_replicate=1", "parallel.dp_shard=1", *overrides])
    start = program.joined(RunDirectory(tmp_path), config, Unheard())
    with pytest.raises(JoinedError), start:
        pass
    assert waits[0] > least_s
