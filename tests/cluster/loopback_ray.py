"""A Ray cluster of several nodes on this machine, each at a loopback address of its own."""

import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from dist_lm.config.cluster import ClusterConfig
from dist_lm.storage.process import end, marked
from tests.cluster.waiting import eventually
from tests.patience import patient


class LoopbackRay:
    """Nodes 127.0.0.2, 127.0.0.3, ...; the first is the head."""

    def __init__(self, directory: Path, port: int) -> None:
        self.address = f"127.0.0.2:{port}"
        self.token = directory / "token"
        self.token.touch(mode=0o600)
        self.token.write_text(secrets.token_hex(32))
        self._mark = secrets.token_hex(8)
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}

    def config(self, **changes: object) -> ClusterConfig:
        own = {"address": self.address, "token_path": str(self.token), "connect_timeout_s": patient(60)}
        return ClusterConfig(**({"name": "ray"} | own | changes))

    def overrides(self) -> list[str]:
        return [
            *("cluster=ray", f"cluster.address={self.address}", f"cluster.token_path={self.token}"),
            f"cluster.connect_timeout_s={patient(60):.0f}",
        ]

    def start(self, number: int, **environ: str) -> None:
        """Start node `number`, 0 is the head; `environ` is what its processes find in their environment."""
        own = ["head", "--address", self.address]
        if number:
            own = ["worker", "--head", self.address, "--ip", f"127.0.0.{2 + number}"]
        self._nodes[number] = subprocess.Popen(
            [sys.executable, "-m", "dist_lm.cluster.ray_node", *own, "--cpus", "2"],
            env=os.environ | {"RAY_AUTH_TOKEN_PATH": str(self.token), "LOOPBACK_RAY": self._mark} | environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def is_up(self) -> bool:
        """Whether the head answers; fails if its process has ended."""
        code = self._nodes[0].poll()
        assert code is None, f"the head at {self.address} ended with {code}"
        host, port = self.address.split(":")
        return answers(host, int(port))

    def process(self, number: int) -> int:
        """The process of a node; all others of the node are below it."""
        return self._nodes[number].pid

    def lose(self, number: int) -> None:
        """What a power cut does to a node."""
        node = psutil.Process(self._nodes[number].pid)
        for stop in (signal.SIGSTOP, signal.SIGKILL):  # stopped, nobody notices before all are gone
            for process in [node, *node.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):  # programs in sandboxes come and go, and end with their server
                    process.send_signal(stop)
        self._nodes.pop(number).wait(timeout=patient(120))

    def close(self) -> None:
        for process in self._nodes.values():
            process.terminate()
        for process in self._nodes.values():
            process.wait(timeout=patient(120))
        assert end(lambda: marked(self._mark, "LOOPBACK_RAY"), grace_s=1.0) == []


def answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


@contextmanager
def held_port(host: str, ports: range) -> Iterator[int]:
    """A port on which nobody answers. Other test runs on this machine take another one until the end of the block.

    A server needs the port itself, so what is held is a name: of an abstract socket, which ends with its process.
    """
    for port in ports:
        with socket.socket(socket.AF_UNIX) as held:
            with suppress(OSError):
                held.bind(f"\0dist_lm-tests-{host}:{port}")
            if held.getsockname() and not answers(host, port):
                yield port
                return
    raise AssertionError(f"no port of {host} is free in {ports}")


@contextmanager
def loopback_ray(directory: Path, nodes: int) -> Iterator[LoopbackRay]:
    """A cluster of `nodes` nodes, gone after the block."""
    with held_port("127.0.0.2", range(6400, 9000)) as port:
        ray = LoopbackRay(directory, port)
        try:
            for number in range(nodes):
                ray.start(number)
            eventually("the head is up", ray.is_up)
            yield ray
        finally:
            ray.close()
