"""A private Ray that dies or does not answer is told in one line that leads a user of `cluster=local` on."""

import json
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from dist_lm.cluster import ray_cluster
from dist_lm.cluster.ray_cluster import ClusterError, connect
from dist_lm.config.cluster import ClusterConfig
from tests.cluster.waiting import eventually
from tests.patience import patient

# Prints an address, at which a port answers if it is told so; then that Ray has died, if it is told so.
NODE = """
import json, socket, sys
_, answers, dies = sys.argv
server = socket.socket()
server.bind(("127.0.0.1", 0))
if answers == "answers":
    server.listen()
print(json.dumps({"address": f"127.0.0.1:{server.getsockname()[1]}", "token_path": None}), flush=True)
if dies == "dies":
    print(json.dumps({"death": "raylet died", "log": "/tmp/ray.log"}), flush=True)
sys.stdin.read()
"""
# The node of `cluster=local` itself, with a Ray that is none; with an argument, no log can be kept.
WITHOUT_RAY = """
import errno, sys
from dist_lm.cluster import ray_node
from dist_lm.cluster.ray_processes import RayProcesses

class Dying(RayProcesses):
    def __init__(self, directory, arguments, output):
        self._temporary = directory / "ray"
        logs = self._temporary / "session_latest" / "logs"
        logs.mkdir(parents=True)
        (logs / "raylet.err").write_text("C++ statistics\\n")

    def death(self):
        return "raylet died"

    def keep_logs(self):
        if sys.argv[1:]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().keep_logs()

ray_node.RayProcesses, ray_node.sweep = Dying, lambda: []
sys.exit(ray_node.run_private("127.0.0.1"))
"""


class SlowRay:
    """Ray's `init`, which answers when the test has ended."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def init(self, **_: object) -> None:
        self.ended.wait()

    def shutdown(self) -> None:
        pass


@pytest.fixture
def slow_ray(monkeypatch: pytest.MonkeyPatch):
    ray = SlowRay()
    monkeypatch.setattr(ray_cluster, "_import_ray", lambda: ray)
    monkeypatch.setattr(ray_cluster, "_check_token", lambda config: None)
    monkeypatch.setattr(ray_cluster, "_loopback_kept", lambda *_: nullcontext())
    yield ray
    ray.ended.set()


def node_of(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    start = subprocess.Popen
    command = [sys.executable, "-c", NODE, *words]
    monkeypatch.setattr(ray_cluster.subprocess, "Popen", lambda _, **pipes: start(command, **pipes))


@pytest.mark.parametrize("answers", ["answers", "is silent"])
def test_a_death_at_the_start_ends_the_wait_and_names_no_key_that_nobody_has_set(monkeypatch, slow_ray, answers):
    """It took the whole time limit, and then named cluster.address and cluster.token_path."""
    node_of(monkeypatch, answers, "dies")
    began = time.monotonic()
    with pytest.raises(ClusterError) as refused, connect(ClusterConfig(name="local", connect_timeout_s=600)):
        pass
    assert time.monotonic() - began < patient(60)
    message = str(refused.value)
    assert message.startswith("cluster=local: the Ray of this machine died while it started, as on a busy machine: ")
    assert "raylet died (Ray's own words: /tmp/ray.log): try again, or train without Ray: `torchrun -m" in message
    assert "cluster.address" not in message
    assert "\n" not in message


def test_a_ray_that_is_late_is_told_with_a_longer_limit(monkeypatch, slow_ray):
    node_of(monkeypatch, "answers", "lives")
    with (
        pytest.raises(ClusterError, match=r"^cluster=local: .* no connection within 0 s\. .*_timeout_s=0") as late,
        connect(ClusterConfig(name="local", connect_timeout_s=0.1)),
    ):
        pass
    assert "cluster.address" not in str(late.value)


def test_a_death_later_is_one_line(monkeypatch, slow_ray, capsys):
    slow_ray.ended.set()  # joins at once
    node_of(monkeypatch, "answers", "lives")
    in_thread, died = ray_cluster.in_thread, threading.Event()

    def line_later() -> bytes:
        died.wait()
        return b'{"death": "gcs_server died", "log": "/tmp/ray.log"}\n'

    monkeypatch.setattr(
        ray_cluster, "in_thread", lambda call, name: in_thread(line_later if name == "ray-death" else call, name)
    )
    with connect(ClusterConfig(name="local", connect_timeout_s=patient(30))):
        assert capsys.readouterr().err == ""
        died.set()
        told: list[str] = []
        eventually("the death is told", lambda: told.append(capsys.readouterr().err) or "".join(told).endswith("\n"))
    assert "".join(told) == "cluster=local: gcs_server died; Ray's own words: /tmp/ray.log\n"


def told_of_a_death(temporary: Path, *arguments: str) -> dict[str, str]:
    """What the node tells its launch when Ray has died. Nothing else is printed: its standard error is the user's
    terminal."""
    node = subprocess.Popen(
        [sys.executable, "-c", WITHOUT_RAY, *arguments],
        env={"TMPDIR": str(temporary), "PYTHONPATH": ":".join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    # The launch is there and hears of the death, although the node goes on until the launch has left.
    too_late = threading.Timer(patient(60), node.kill)
    too_late.start()
    assert node.stdout is not None
    lines = [node.stdout.readline() for _ in range(2)]
    rest, errors = node.communicate()
    too_late.cancel()
    assert (node.returncode, rest, errors) == (1, b"", b"")
    began, death = map(json.loads, lines)
    assert list(began) == ["address", "token_path"]
    assert death["death"] == "raylet died"
    return death


def test_the_node_tells_its_launch_of_a_death_and_keeps_what_ray_wrote_in_a_file(tmp_path: Path):
    """Finds 50 lines of statistics in a terminal."""
    death = told_of_a_death(tmp_path)
    log = Path(death["log"])
    assert log.stat().st_mode & 0o777 == 0o600
    assert log.read_text() == "the end of raylet.err:\nC++ statistics\n"
    assert [*tmp_path.iterdir()] == [log]


def test_the_node_tells_of_a_death_where_no_log_can_be_kept(tmp_path: Path):
    """Ray dies of a full disk, too: finds a node that then ends in a traceback, and a launch that hears of no death."""
    death = told_of_a_death(tmp_path, "disk is full")
    assert death["log"] == "not kept: No space left on device"
    assert not [*tmp_path.iterdir()]
