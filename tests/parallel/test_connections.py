"""Connections of a rank, and the limit of open files that they count against."""

import resource

import pytest
import torch.distributed as dist

from dist_lm.errors import ConfigError
from dist_lm.parallel import rendezvous
from dist_lm.parallel.guarded_gloo import _tcp_sockets, guarded
from dist_lm.parallel.layout import Layout
from dist_lm.parallel.mesh import World, build_mesh, data_mesh
from dist_lm.parallel.messages import all_gather
from dist_lm.parallel.rendezvous import OTHER_FILES, allow_connections, allow_store, connections_of
from tests.parallel.ranks import RankGroups


def counted_by(world: World, sizes: tuple[int, int, int]) -> list[int]:
    """The connections of each rank with the groups of a run."""
    data_mesh(build_mesh(Layout(*sizes), world.device))
    with guarded():
        of_checkpoints = dist.new_group(backend="gloo")
    assert isinstance(of_checkpoints, dist.ProcessGroup)

    n_connections = 0
    for _, tcp_socket in _tcp_sockets():
        with tcp_socket:
            try:
                tcp_socket.getpeername()
                n_connections += 1
            except OSError:  # it listens
                continue
    return all_gather(n_connections, int, of_checkpoints)


@pytest.mark.cluster
@pytest.mark.parametrize("sizes", [(2, 2, 1), (1, 4, 1), (1, 2, 2)], ids=str)
def test_a_rank_has_the_connections_that_are_reckoned(ranks: RankGroups, sizes):
    """Finds a group of ranks that the limit of open files does not allow for."""
    assert ranks.run(4, counted_by, sizes) == [connections_of(Layout(*sizes))] * 4


@pytest.mark.parametrize(
    ("allow", "needed"),
    [
        (lambda: allow_connections(Layout(64, 8, 1)), 1_092 + OTHER_FILES),
        (lambda: allow_store(512), 2_048 + OTHER_FILES),
    ],
    ids=["rank", "store"],
)
def test_the_limit_is_raised_as_far_as_connections_need(monkeypatch, allow, needed):
    """Finds a run of 512 ranks that ends at the usual limit of 1,024 open files."""
    limits = [(1024, 500_000)]
    monkeypatch.setattr(rendezvous.resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(rendezvous.resource, "setrlimit", lambda _, limit: limits.append(limit))

    allow_connections(Layout(1, 8, 1))
    allow_store(8)
    assert len(limits) == 1
    allow()
    assert limits[-1] == (needed, 500_000)

    limits.append((1024, resource.RLIM_INFINITY))
    allow()
    assert limits[-1] == (needed, resource.RLIM_INFINITY)
    limits.append((1024, 1024))
    with pytest.raises(ConfigError, match=f"512.*: at most 1,024 here, expected {needed:,}"):
        allow()
