"""Measurements of a node by the agent that runs on it: facts before ranks start, links to other nodes, usage."""

import hashlib
import importlib.metadata
import os
import platform
import re
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import psutil

import dist_lm

GIB = 1 << 30
VISIBLE = "CUDA_VISIBLE_DEVICES"
SEEN_S = 5.0  # a network file system may show a new file with a delay
LINK_TIMEOUT_S = 10.0
USAGE_EVERY_S = 5.0
_CHUNK = bytes(1 << 20)


@dataclass(frozen=True)
class NodeFacts:
    """Facts about one node, measured on it."""

    host: str
    time: float  # seconds since 1970, by the node's clock
    sees_directory: bool  # the driver's run directory is visible
    free_bytes: Mapping[str, int]  # directory -> free bytes; the run directory, and the one of temporary files
    gpus: int
    code: str  # hash of the sources of dist_lm
    packages: Mapping[str, str]  # versions of Python and of the packages that dist_lm requires


def examine(directory: Path, mark: str) -> NodeFacts:
    """Returns the facts of this node; waits up to `SEEN_S` for the file `mark`.

    Args:
        directory: the run directory.
        mark: name of a file that the driver has just created in it, which tells it from another disk's directory of the
            same name.
    """
    # A network file system may show the file with a delay.
    deadline = time.monotonic() + SEEN_S
    while not (sees := (directory / mark).exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    present = [path for path in (directory, Path(tempfile.gettempdir())) if path.is_dir()]
    return NodeFacts(
        host=host_name(),
        time=time.time(),
        sees_directory=sees,
        free_bytes={str(path): shutil.disk_usage(path).free for path in present},
        gpus=local_gpus(),
        code=code_hash(),
        packages=package_versions(),
    )


def host_name() -> str:
    """Slurm's name of this node, or else the host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def local_gpus() -> int:
    """NVIDIA GPUs of this machine that its processes may use."""
    return len(shown_gpus())


def shown_gpus() -> tuple[str, ...]:
    """Returns the numbers or UUIDs of the GPUs that the driver has device files for and that CUDA shows."""
    return visible_gpus(os.environ, len(list(Path("/dev").glob("nvidia[0-9]*"))))


def visible_gpus(environ: Mapping[str, str], count: int) -> tuple[str, ...]:
    """Returns the numbers or UUIDs of the GPUs that CUDA shows to a process, in the order of its device indices.

    Args:
        environ: as CUDA does, `CUDA_VISIBLE_DEVICES` is read up to its first entry that names no GPU.
        count: GPUs of the machine.
    """
    visible = environ.get(VISIBLE)
    if visible is None or not count:
        return tuple(map(str, range(count)))
    entries = (entry.strip() for entry in visible.split(","))
    return tuple(takewhile(lambda entry: _names_gpu(entry, count), entries))


def _names_gpu(entry: str, count: int) -> bool:
    return entry.startswith(("GPU-", "MIG-")) or (entry.isdecimal() and int(entry) < count)


@cache
def code_hash() -> str:
    """Returns a hash of every source file of the installed dist_lm."""
    root = Path(dist_lm.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


@cache
def package_versions() -> dict[str, str]:
    """Returns the versions of Python and of every package that dist_lm requires, by name."""
    versions = {"python": platform.python_version()}
    for requirement in importlib.metadata.requires("dist_lm") or []:
        if "extra ==" not in requirement:
            name = re.split(r"[^A-Za-z0-9._-]", requirement)[0]
            versions[name] = importlib.metadata.version(name)
    return versions


class LinkServer:
    """Receives bytes from nodes that know its secret; connections without the secret are closed."""

    def __init__(self, address: str) -> None:
        """Listens on a free port of `address`."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.create_server((address, 0), family=family)
        self.port: int = self._socket.getsockname()[1]
        self.secret = secrets.token_bytes(32)
        threading.Thread(target=self._serve, name="links", daemon=True).start()

    def close(self) -> None:
        """Stops listening."""
        # Not every system can shut down a listening socket.
        with suppress(OSError):
            # Closing alone does not wake the thread in `accept`.
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _serve(self) -> None:
        """Receives connections, each in a thread of its own, until the socket is closed."""
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._receive, args=(peer,), name="link", daemon=True).start()

    def _receive(self, peer: socket.socket) -> None:
        """Reads what one peer sends and confirms it; closes the connection if the secret is another one. Errors of the
        connection are left to the sender.
        """
        peer.settimeout(LINK_TIMEOUT_S)
        try:
            with peer, peer.makefile("rb") as stream:
                if not secrets.compare_digest(stream.read(len(self.secret)), self.secret):
                    return
                remaining = int.from_bytes(stream.read(8), "big")
                # An empty chunk says that the peer has closed.
                while remaining > 0 and (chunk := stream.read(min(remaining, len(_CHUNK)))):
                    remaining -= len(chunk)
                peer.sendall(b"\1")
        except OSError:  # reported by the sender
            return


def send(address: str, port: int, secret: bytes, n_bytes: int) -> float | str:
    """Sends `n_bytes` to a `LinkServer`; returns bytes per second, or a text that says why there is no connection."""
    content = memoryview(_CHUNK)
    try:
        with socket.create_connection((address, port), timeout=LINK_TIMEOUT_S) as link:
            # The connection is not part of the rate: ranks connect once.
            started = time.perf_counter()
            link.sendall(secret + n_bytes.to_bytes(8, "big"))
            remaining = n_bytes
            while remaining > 0:
                link.sendall(content[: min(remaining, len(content))])
                remaining -= len(content)

            # The peer confirms, since bytes in the kernel's buffers have not arrived.
            if link.recv(1) != b"\1":
                return f"{address}:{port} closed the connection"
            return n_bytes / (time.perf_counter() - started)
    except OSError as error:
        return f"{address}:{port}: {error.strerror or error}"


@dataclass(frozen=True)
class GpuUsage:
    """Usage of one GPU by all processes."""

    index: int  # the driver's
    busy_percent: float
    memory_gib: float


@dataclass(frozen=True)
class NodeUsage:
    """Usage of a node by all processes."""

    cpu_percent: float  # all cores together, since the previous measurement
    memory_percent: float
    memory_gib: float
    gpus: tuple[GpuUsage, ...] = ()  # empty without a driver


def open_nvml() -> Any:
    """Returns the module `pynvml`, initialised, or a text that says why there is none."""
    try:
        import pynvml  # pyright: ignore[reportMissingImports]
    except ImportError:
        return "the package nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"NVML: {error}"
    return pynvml


class UsageMeter:
    """Measures the usage of its node, at most once in `USAGE_EVERY_S`."""

    def __init__(self) -> None:
        # Starts its interval: the first value is meaningless.
        psutil.cpu_percent()
        self._at = time.monotonic()
        self._usage: NodeUsage | None = None
        self._nvml = open_nvml()

    def read(self) -> NodeUsage | None:
        """Returns the newest measurement; None until `USAGE_EVERY_S` have passed."""
        if time.monotonic() - self._at >= USAGE_EVERY_S:
            self._at = time.monotonic()
            memory = psutil.virtual_memory()
            used = memory.total - memory.available
            self._usage = NodeUsage(psutil.cpu_percent(), memory.percent, used / GIB, self._gpus())
        return self._usage

    def _gpus(self) -> tuple[GpuUsage, ...]:
        """Returns the usage of each GPU: its index, the share of time it was busy (per cent) and its memory in use
        (GiB); empty without NVML. GPUs that cannot be read are left out.
        """
        if isinstance(self._nvml, str):
            return ()
        usages = []
        for index in range(self._nvml.nvmlDeviceGetCount()):
            try:
                gpu = self._nvml.nvmlDeviceGetHandleByIndex(index)
                memory = self._nvml.nvmlDeviceGetMemoryInfo(gpu).used
                busy = self._nvml.nvmlDeviceGetUtilizationRates(gpu).gpu
            except self._nvml.NVMLError:  # a lost GPU, which fails the ranks, or one without these counters
                continue
            usages.append(GpuUsage(index, float(busy), memory / GIB))
        return tuple(usages)


def usage_metrics(usages: Mapping[str, NodeUsage]) -> dict[str, float]:
    """Returns usage by host as metrics (per cent and GiB), with the names of the metrics registry."""
    metrics: dict[str, float] = {}
    for host, usage in usages.items():
        metrics[f"system/cpu_percent_{host}"] = usage.cpu_percent
        metrics[f"system/memory_percent_{host}"] = usage.memory_percent
        metrics[f"system/memory_gib_{host}"] = usage.memory_gib
        for gpu in usage.gpus:
            metrics[f"system/gpu_percent_{host}.{gpu.index}"] = gpu.busy_percent
            metrics[f"system/gpu_memory_gib_{host}.{gpu.index}"] = gpu.memory_gib
    return metrics
