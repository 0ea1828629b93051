"""Connections of a rank, and the limit of open files that they count against."""

import resource

import pytest
import torch.distributed as dist

from dist_lm.errors import ConfigError
from dist_lm.parallel import connections
from dist_lm.parallel.connections import OTHER_FILES, allow_connections, connections_of
from dist_lm.parallel.guarded_gloo import _tcp_sockets, guarded
from dist_lm.parallel.layout import Layout
from dist_lm.parallel.mesh import World, build_mesh, data_mesh
from dist_lm.parallel.messages import all_gather
from tests.parallel.ranks import RankGroups

AT_512 = Layout(64, 8, 1)


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


def test_the_limit_is_raised_as_far_as_connections_need(monkeypatch):
    """Finds a run of 512 ranks that ends at the usual limit of 1,024 open files."""
    limits = [(1024, 500_000)]
    monkeypatch.setattr(connections.resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(connections.resource, "setrlimit", lambda _, limit: limits.append(limit))

    allow_connections(Layout(1, 8, 1))
    assert len(limits) == 1
    allow_connections(AT_512)
    assert limits[-1] == (connections_of(AT_512) + OTHER_FILES, 500_000)
    assert connections_of(AT_512) > 1024

    limits.append((1024, resource.RLIM_INFINITY))
    allow_connections(AT_512)
    assert limits[-1] == (connections_of(AT_512) + OTHER_FILES, resource.RLIM_INFINITY)


def test_a_hard_limit_below_the_connections_is_refused(monkeypatch):
    """Finds a run that starts and then fails with 'too many open files' in the middle of gloo."""
    monkeypatch.setattr(connections.resource, "getrlimit", lambda _: (1024, 1024))
    with pytest.raises(ConfigError, match=r"512 ranks: .* at most 1,024 open files, expected 1,604"):
        allow_connections(AT_512)
