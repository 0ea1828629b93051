"""A gang over two Ray nodes, both on this machine at loopback addresses of their own."""

import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from dist_lm.cluster.gang import Gang
from dist_lm.cluster.process import end
from dist_lm.cluster.ray_cluster import RayCluster, connect
from dist_lm.cluster.ray_reaper import users_of
from dist_lm.config import ClusterConfig
from dist_lm.errors import UserError
from dist_lm.run_directory import RunDirectory
from tests.cluster.waiting import eventually, living, ready_ranks, recruited

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.cluster,
    pytest.mark.timeout(180),
    pytest.mark.skipif(sys.platform != "linux", reason="other loopback addresses exist on Linux only"),
]


def answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def gcs_port(host: str) -> int:
    """A free port below those that Ray gives to its workers."""
    return next(port for port in range(6400, 10000) if not answers(host, port))


@pytest.fixture(scope="module")
def nodes(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[ClusterConfig, subprocess.Popen[bytes]]]:
    """How to join a cluster of two nodes, and the process that holds the second one."""
    temporary = Path("/tmp") / f"dlt-{secrets.token_hex(3)}"
    temporary.mkdir(mode=0o700)
    token = temporary / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environ = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    port = gcs_port("127.0.0.2")
    address = f"127.0.0.2:{port}"

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=2", *arguments],
            env=environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    started = [
        start(
            "--head",
            f"--port={port}",
            "--node-ip-address=127.0.0.2",
            "--include-dashboard=false",
            f"--temp-dir={temporary}/ray",
        )
    ]
    try:
        eventually("the head is up", lambda: answers("127.0.0.2", port))
        started.append(start(f"--address={address}", "--node-ip-address=127.0.0.3"))
        config = ClusterConfig(name="ray", nodes=2, address=address, token_path=str(token))
        yield config, started[1]
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(timeout=30)
        assert end(lambda: users_of(temporary, os.getpid()), grace_s=1.0) == []
        subprocess.run(["rm", "-r", str(temporary)], check=True)


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


def test_two_nodes(nodes, tmp_path: Path) -> None:
    config, second = nodes
    with joined(config) as cluster:
        run = RunDirectory(tmp_path / "raise")
        run.create()
        with start(cluster, run, "raise") as gang:
            failure = gang.wait().failure
        assert failure is not None
        assert (failure.rank, failure.node, failure.type) == (1, 1, "ValueError")
        for node in range(2):
            assert f"rank {node} says hello" in run.node_log(node).read_text()
        assert living([rank["pid"] for rank in ready_ranks(run.path, 2)]) == []

        with pytest.raises(UserError, match=r"cluster\.nodes=3: not free within 1 s"):
            recruited(cluster, run, nodes=3, timeout_s=1.0)

        run = RunDirectory(tmp_path / "lost")
        run.create()
        with start(cluster, run, "miss a peer") as gang:
            pids = [rank["pid"] for rank in ready_ranks(run.path, 2)]
            raylet = next(child for child in psutil.Process(second.pid).children() if child.name() == "raylet")
            os.kill(raylet.pid, signal.SIGKILL)
            failure = gang.wait().failure
        assert failure is not None
        assert (failure.node, failure.rank, failure.type) == (1, None, "node lost")
        assert "\n" not in str(failure)
        eventually("ranks are gone", lambda: living(pids) == [])
