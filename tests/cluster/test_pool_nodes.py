"""A pool on a Ray of several nodes, which come and go."""

import sys
from dataclasses import replace

import pytest

from dist_lm.cluster.pool import ActorsLostError, Pool
from dist_lm.cluster.ray_cluster import connect
from tests.cluster.loopback_ray import loopback_ray
from tests.cluster.small_pool import SPEC, requests, sorted_results, weights_of
from tests.cluster.waiting import eventually

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.cluster,
    pytest.mark.skipif(sys.platform != "linux", reason="other loopback addresses exist on Linux only"),
]


@pytest.mark.bars
def test_a_pool_shrinks_grows_and_gives_up_in_one_line(tmp_path):
    with loopback_ray(tmp_path, nodes=2) as ray, connect(ray.config(nodes=3, node_wait_s=1)) as cluster:
        eventually("two nodes", lambda: len(cluster.nodes()) == 2)
        said: list[str] = []
        with Pool.start(cluster, SPEC, weights_of(0), warn=said.append) as pool:
            assert {member.node.address for member in pool.members} == {"127.0.0.2", "127.0.0.3"}
            expected = sorted_results(pool.generate(requests(400)), requests(400))
            came = []
            for result in pool.generate(requests(400)):
                came.append(result)
                if len(came) == 50:
                    ray.lose(1)
                if len(came) == 200:
                    ray.start(2)
            assert sorted_results(came, requests(400)) == expected
            for _ in pool.generate(requests(100_000)):
                if {member.node.address for member in pool.members} == {"127.0.0.2", "127.0.0.4"}:
                    break
            else:
                pytest.fail("the new node was not taken in")
            assert any("127.0.0.3" in text for text in said)
        impatient = replace(cluster, config=replace(cluster.config, start_timeout_s=1))
        with (
            pytest.raises(ActorsLostError, match=r"^cluster: no place for a generation actor within 1 s: [^\n]*$"),
            Pool.start(
                impatient,
                replace(SPEC, device="cuda"),
                weights_of(0),
            ),
        ):
            pass
