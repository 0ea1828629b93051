"""A gang over two Ray nodes, both on this machine at loopback addresses of their own."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dist_lm.cluster.gang import Gang
from dist_lm.cluster.ray_cluster import RayCluster, connect
from dist_lm.config.cluster import ClusterConfig
from dist_lm.errors import UserError
from dist_lm.storage.run_directory import RunDirectory
from tests.cluster.loopback_ray import LoopbackRay, loopback_ray
from tests.cluster.waiting import eventually, living, ready_ranks, recruited, wait_for_end

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.cluster,
    pytest.mark.skipif(sys.platform != "linux", reason="other loopback addresses exist on Linux only"),
]


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackRay]:
    with loopback_ray(tmp_path_factory.mktemp("ray"), nodes=2) as ray:
        yield ray


@contextmanager
def joined(config: ClusterConfig) -> Iterator[RayCluster]:
    with connect(config) as cluster:
        eventually("both nodes are up", lambda: len(cluster.nodes()) == 2)
        yield cluster


def start(cluster: RayCluster, run: RunDirectory, behaviour: str) -> Gang:
    return Gang.start(
        recruited(cluster, run, nodes=2),
        run,
        ranks_per_node=1,
        module="dummy_rank",
        arguments=(str(run.path), behaviour),
        env={"PYTHONPATH": str(Path(__file__).parent)},
    )


def test_two_nodes(ray: LoopbackRay, tmp_path: Path) -> None:
    with joined(ray.config(nodes=2)) as cluster:
        run = RunDirectory(tmp_path / "raise")
        run.create()
        with start(cluster, run, "raise") as gang:
            failure = wait_for_end(gang).failure
        assert failure is not None
        assert (failure.rank, failure.node, failure.type) == (1, 1, "ValueError")
        for node in range(2):
            assert f"rank {node} says hello" in run.node_log(node).read_text()
        assert living([rank["pid"] for rank in ready_ranks(run.path, 2)]) == []

        with pytest.raises(UserError, match=r"cluster\.nodes=3: not free within \d+ s"):
            recruited(cluster, run, nodes=3, timeout_s=1.0)

        run = RunDirectory(tmp_path / "lost")
        run.create()
        with start(cluster, run, "miss a peer") as gang:
            pids = [rank["pid"] for rank in ready_ranks(run.path, 2)]
            ray.lose(1)
            failure = wait_for_end(gang).failure
        assert failure is not None
        assert (failure.node, failure.rank, failure.type) == (1, None, "node lost")
        assert "\n" not in str(failure)
        eventually("ranks are gone", lambda: living(pids) == [])
