"""Addresses of Ray nodes: the head's as a person gives it, a node's own as the others see it."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from dist_lm.cluster.ray_environment import ClusterError

LOOPBACK = "127."
REPLACED_BY_RAY = "127.0.0.1"
CONNECT_S = 2.0


@dataclass(frozen=True)
class HeadAddress:
    """Where a Ray head listens."""

    host: str
    port: int

    @classmethod
    def parse(cls, option: str, text: str) -> "HeadAddress":
        """From `IP:PORT`.

        Raises:
            ClusterError: names the option.
        """
        host, _, port = text.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ClusterError(f"{option}={text}: expected IP:PORT")
        if host == REPLACED_BY_RAY:
            raise ClusterError(
                f"{option}={text}: Ray replaces {host} by an address of its own choice; give the machine's address in "
                "its network, or another loopback address such as 127.0.1.1"
            )
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def error(self) -> OSError | None:
        """Why nobody answers there now; None: somebody does."""
        try:
            socket.create_connection((self.host, self.port), timeout=CONNECT_S).close()
        except OSError as error:
            return error
        return None

    def check_free(self) -> None:
        """Refuse an address that a head could not listen on.

        Raises:
            ClusterError: the port is taken, or the address is not of this machine.
        """
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that are closing do not count
            try:
                server.bind((self.host, self.port))
            except OSError as error:
                raise ClusterError(
                    f"--address={self}: port {self.port} cannot be listened on ({error.strerror}); give an address of "
                    "this machine and a port below 10000 that is free"
                ) from None


def own_address(head: HeadAddress, environ: Mapping[str, str] = os.environ) -> str:
    """The address of this node in the network that leads to the head.

    For a head at a loopback address (all nodes are one machine) it is that of the node's name: SLURMD_NODENAME,
    or the host name.
    """
    if head.host.startswith(LOOPBACK):
        name = environ.get("SLURMD_NODENAME") or socket.gethostname()
        try:
            return socket.gethostbyname(name)
        except OSError as error:
            raise ClusterError(f"node {name}: no address for this name ({error.strerror}); give --ip") from None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        try:
            route.connect((head.host, head.port))  # sends nothing
        except OSError as error:
            raise ClusterError(f"--head={head}: no route to it ({error.strerror})") from None
        return route.getsockname()[0]


def address_of_interface(name: str) -> str:
    """The IPv4 address of a network interface of this machine."""
    interfaces = psutil.net_if_addrs()
    found = [entry.address for entry in interfaces.get(name, []) if entry.family == socket.AF_INET]
    if not found:
        raise ClusterError(f"--interface={name}: no IPv4 address; this machine has {', '.join(sorted(interfaces))}")
    return found[0]
