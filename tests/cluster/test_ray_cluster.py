"""Connecting to Ray: who is let in, refusals in one line, and what is left afterwards."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dist_lm.cluster.ray_cluster import RANK_ACCESS, ClusterError, RayAccess, access_variables, connect, own_access
from dist_lm.config.cluster import ClusterConfig
from tests.cluster.waiting import eventually
from tests.patience import patient

pytestmark = pytest.mark.cluster

STRANGER = """
import sys, ray
from dist_lm.cluster.ray_cluster import keep_loopback
keep_loopback()
ray.init(address=sys.argv[1], _node_ip_address="127.0.0.1", log_to_driver=False)
print("was let in")
"""
JOINER = """
import sys
from dist_lm.cluster.ray_cluster import connect
from dist_lm.config.cluster import ClusterConfig
config = ClusterConfig(name="ray", address=sys.argv[1], token_path=sys.argv[2])
try:
    with connect(config) as cluster:
        print("was let in to", len(cluster.nodes()), "node")
except ValueError as error:
    print(type(error).__name__, error)
"""


def run_beside(program: str, *arguments: str, **environ: str) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=clean | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.heavy
def test_a_private_ray_lets_only_us_in_and_goes_without_a_trace(tmp_path: Path) -> None:
    environ, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    earlier = set(psutil.Process().children(recursive=True))  # of other tests
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    wrong.chmod(0o600)
    with connect(ClusterConfig(name="local", connect_timeout_s=patient(30))) as cluster:
        assert len(cluster.nodes()) == 1
        assert cluster.config.ranks_of_node(min(node.gpus for node in cluster.nodes())) >= 1
        assert signal.getsignal(signal.SIGTERM) is handler
        token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        assert token.stat().st_mode & 0o777 == 0o600
        assert token.parent.stat().st_mode & 0o777 == 0o700
        processes = set(psutil.Process().children(recursive=True)) - earlier
        assert len(processes) > 3
        others = [
            run_beside(STRANGER, cluster.address, RAY_NUM_REDIS_GET_RETRIES="1", RAY_AUTH_MODE="disabled"),
            run_beside(JOINER, cluster.address, str(wrong)),
            run_beside(JOINER, cluster.address, str(token)),
        ]
        stranger, refused, joined = (other.communicate(timeout=patient(240))[0] for other in others)
        assert "was let in" not in stranger
        assert "AuthenticationError" in stranger
        assert f"ClusterError cluster.address={cluster.address}: the Ray head refuses our token" in refused
        assert "was let in to 1 node" in joined
    assert dict(os.environ) == environ
    assert not token.parent.exists()
    eventually("Ray is gone", lambda: not any(process.is_running() for process in processes))


def test_a_dead_address_is_named_within_the_time_given() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # taken, but nobody listens
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        config = ClusterConfig(name="ray", address=address, connect_timeout_s=0.3)
        with (
            pytest.raises(ClusterError, match=f"cluster.address={address}: no Ray head answers there") as refused,
            connect(config),
        ):
            pass
    assert "\n" not in str(refused.value)


@pytest.mark.heavy
def test_something_else_at_the_address_does_not_hang(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0" * 64)
    token.chmod(0o600)
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, says nothing
        address = f"127.0.0.1:{server.getsockname()[1]}"
        program = JOINER.replace("token_path=", "connect_timeout_s=2.0, token_path=")
        output = run_beside(program, address, str(token)).communicate(timeout=patient(240))[0]
    assert f"ClusterError cluster.address={address}" in output


@pytest.mark.parametrize(("mode", "reason"), [(0o644, "chmod 600"), (None, "no such file")])
def test_a_bad_token_file_is_refused(tmp_path: Path, mode: int | None, reason: str) -> None:
    token = tmp_path / "token"
    if mode is not None:
        token.write_text("secret")
        token.chmod(mode)
    with socket.create_server(("127.0.0.1", 0)) as server:
        config = ClusterConfig(name="ray", address=f"127.0.0.1:{server.getsockname()[1]}", token_path=str(token))
        with (
            pytest.raises(ClusterError, match=f"token_path={token}.*{reason}") as refused,
            connect(config),
        ):
            pass
    assert "secret" not in str(refused.value)


def test_local_is_one_machine() -> None:
    with (
        pytest.raises(ClusterError, match=r"cluster\.nodes=2"),
        connect(ClusterConfig(name="local", nodes=2)),
    ):
        pass


def test_a_rank_reads_what_its_agent_wrote():
    environ = access_variables({"RAY_AUTH_TOKEN_PATH": "/run/token", "HOME": "/root"}, "10.0.0.1:6379", ["10.0.0.1"])
    assert environ.keys() == {RANK_ACCESS}
    assert own_access(environ) == RayAccess("10.0.0.1:6379", "/run/token", None, ("10.0.0.1",))
    assert own_access({"HOME": "/root"}) is None


def test_a_token_itself_is_handed_over_only_where_there_is_no_file():
    both = {"RAY_AUTH_TOKEN_PATH": "/run/token", "RAY_AUTH_TOKEN": "sesame"}
    assert "sesame" not in json.dumps(access_variables(both, "a:1", []))
    access = own_access(access_variables({"RAY_AUTH_TOKEN": "sesame"}, "a:1", []))
    assert access is not None
    assert (access.token_path, access.token) == (None, "sesame")
