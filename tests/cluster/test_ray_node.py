"""A Ray node in the foreground: what it refuses, that it comes back, and that nothing of it is left."""

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from dist_lm.cluster.ray_cluster import ClusterError
from dist_lm.cluster.ray_node import HeadAddress, own_address
from dist_lm.cluster.ray_processes import PREFIX
from dist_lm.storage import process
from tests.cluster.loopback_ray import held_port, loopback_ray
from tests.cluster.waiting import eventually

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.cluster,
    pytest.mark.skipif(sys.platform != "linux", reason="other loopback addresses exist on Linux only"),
]

HEAD, WORKER = "127.0.1.8", "127.0.1.9"


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A short directory for the nodes' own; everything in it is theirs."""
    directory = Path("/tmp") / f"dlt-{secrets.token_hex(2)}"
    directory.mkdir(mode=0o700)
    yield directory
    assert list(directory.iterdir()) == []
    directory.rmdir()


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    return path


class Node:
    """A ray_node that a test has started."""

    def __init__(self, *arguments: str, temporary: Path, token: Path | None) -> None:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environ |= {"TMPDIR": str(temporary)} | ({"RAY_AUTH_TOKEN_PATH": str(token)} if token else {})
        self.program = subprocess.Popen(
            [sys.executable, "-m", "dist_lm.cluster.ray_node", *arguments, "--cpus=1"],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, seconds: float = 120) -> tuple[int, str]:
        output = self.program.communicate(timeout=seconds)[0]
        return self.program.returncode, output

    def stop(self) -> tuple[int, str]:
        self.program.terminate()
        return self.finish()

    def below(self) -> list[psutil.Process]:
        return psutil.Process(self.program.pid).children(recursive=True)

    def named(self, name: str) -> psutil.Process | None:
        for found in self.below():
            with suppress(psutil.NoSuchProcess):
                if found.name() == name and process.is_alive(found):
                    return found
        return None


@contextmanager
def running(*arguments: str, temporary: Path, token: Path | None) -> Iterator[Node]:
    node = Node(*arguments, temporary=temporary, token=token)
    try:
        yield node
    finally:
        if node.program.poll() is None:
            node.stop()


@pytest.fixture
def head() -> Iterator[HeadAddress]:
    """A free address for a head, with a port below those that Ray gives to its workers."""
    with held_port(HEAD, range(9000, 10000)) as port:
        yield HeadAddress(HEAD, port)


def living(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [found for found in processes if found.is_running() and process.is_alive(found)]


def workers_in(directory: Path) -> set[str]:
    return {found.name for found in directory.glob(f"{PREFIX}*")}


def test_a_head_and_a_worker_that_comes_back(temporary: Path, token: Path, head: HeadAddress) -> None:
    with running("head", f"--address={head}", temporary=temporary, token=token) as first:
        eventually("the head answers", lambda: head.error() is None)
        (directory,) = temporary.iterdir()
        assert directory.stat().st_mode & 0o777 == 0o700

        taken = Node("head", f"--address={head}", temporary=temporary, token=token).finish()
        assert taken[0] == 2
        assert f"error: --address={head}: cannot listen on port {head.port}" in taken[1]

        with running("worker", f"--head={head}", f"--ip={WORKER}", temporary=temporary, token=token) as second:
            raylet = eventually("the worker is up", lambda: second.named("raylet"))
            raylet.kill()
            again = eventually("it is up again", lambda: (new := second.named("raylet")) != raylet and new)
            assert again.pid != raylet.pid
            first.program.send_signal(signal.SIGUSR1)  # a scheduler's, to every process: not for Ray
            everything = first.below() + second.below()
            assert len(everything) > 6
            code, output = first.stop()
            assert code == 0, output
            code, output = second.finish()
            assert code == 1
            assert "the head is gone" in output
    eventually("nothing is left", lambda: living(everything) == [])


def test_the_next_node_clears_away_one_that_was_killed(temporary: Path, token: Path, head: HeadAddress) -> None:
    with running("head", f"--address={head}", temporary=temporary, token=token) as first:
        eventually("the head answers", lambda: head.error() is None)
        eventually("its raylet is up", lambda: first.named("raylet"))
        killed, processes = workers_in(temporary), first.below()
        first.program.kill()
        first.finish()
        eventually("Ray's own servers follow", lambda: head.error() is not None)
        with running("head", f"--address={head}", temporary=temporary, token=token) as second:
            eventually("the head answers again", lambda: head.error() is None)
            assert living(processes) == []
            assert killed.isdisjoint(workers_in(temporary))
            code, output = second.stop()
            assert code == 0
            assert f"removed {temporary}/{killed.pop()}" in output


def test_a_dead_raylet_ends_the_head(temporary: Path, token: Path, head: HeadAddress) -> None:
    with running("head", f"--address={head}", temporary=temporary, token=token) as node:
        eventually("the head is up", lambda: head.error() is None and node.named("raylet")).kill()
        code, output = node.finish()
    assert code == 1
    assert "raylet died" in output or "`ray start` left with exit code 1" in output


def test_a_head_that_is_asked_to_stop_was_well_whatever_a_scheduler_ends_first(
    temporary: Path, token: Path, head: HeadAddress, tmp_path: Path
) -> None:
    file = tmp_path / "stop"
    with running("head", f"--address={head}", f"--stop-file={file}", temporary=temporary, token=token) as node:
        eventually("the head answers, though Ray may not be up yet", lambda: head.error() is None)
        everything = node.below()
        file.touch()
        eventually("the head has seen the file", lambda: not file.exists())
        for part in everything:
            with suppress(psutil.NoSuchProcess):
                part.terminate()
        code, output = node.stop()
    assert code == 0, output


@pytest.mark.parametrize("way", ["a signal", "a file"])
def test_a_head_that_is_stopped_just_after_its_raylet_died_does_not_say_that_all_was_well(
    temporary: Path, token: Path, head: HeadAddress, tmp_path: Path, way: str
) -> None:
    file = tmp_path / "stop"
    with running("head", f"--address={head}", f"--stop-file={file}", temporary=temporary, token=token) as node:
        eventually("the head is up", lambda: head.error() is None and node.named("raylet"))
        eventually("Ray has settled", lambda: len(node.below()) > 4)
        raylet = node.named("raylet")
        assert raylet is not None
        raylet.kill()
        eventually("it is dead", lambda: not process.is_alive(raylet))
        if way == "a file":
            file.touch()
            code, _ = node.finish()
        else:
            code, _ = node.stop()
    assert code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("worker", f"--head={HEAD}:9", f"--ip={WORKER}", "--wait-s=0.5"), f"--head={HEAD}:9: no Ray head answers"),
        (("head", "--address=127.0.0.1:6400"), "--address=127.0.0.1:6400: Ray replaces 127.0.0.1"),
        (("head", "--address=nowhere"), "--address=nowhere: expected IP:PORT"),
        (("worker", f"--head={HEAD}:9", "--interface=nic9"), "--interface=nic9: no IPv4 address; this machine has"),
    ],
)
def test_what_a_person_can_mend_is_one_line(
    temporary: Path, token: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, output = Node(*arguments, temporary=temporary, token=token).finish()
    assert code == 2
    assert output.count("\n") == 1
    assert message in output


def test_no_token_no_node(temporary: Path, token: Path) -> None:
    head = f"--address={HEAD}:9999"
    code, output = Node("head", head, temporary=temporary, token=None).finish()
    assert (code, "RAY_AUTH_TOKEN_PATH: not set" in output) == (2, True)
    token.chmod(0o644)
    code, output = Node("head", head, temporary=temporary, token=token).finish()
    assert (code, "chmod 600" in output, token.read_text() in output) == (2, True, False)


def test_own_address() -> None:
    assert own_address(HeadAddress("127.0.1.1", 6400), {"SLURMD_NODENAME": "localhost"}).startswith("127.")
    with pytest.raises(ClusterError, match="node no-such-name: no address"):
        own_address(HeadAddress("127.0.1.1", 6400), {"SLURMD_NODENAME": "no-such-name"})


def test_runs_of_these_tests_side_by_side_take_different_ports() -> None:
    ports = range(9000, 10000)
    with held_port(HEAD, ports) as first:
        with held_port(HEAD, ports) as second:
            assert first != second
        with held_port(HEAD, ports) as again:
            assert again == second


def test_a_cluster_for_tests_whose_head_ends_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(AssertionError, match=r"the head at 127\.0\.0\.2:\d+ ended with 1"), loopback_ray(tmp_path, 1):
        pass
