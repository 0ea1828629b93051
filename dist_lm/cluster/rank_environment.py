"""The environment of torchrun and the ranks: allocator, threads, and how gloo and NCCL find each other."""

import ipaddress
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil

from dist_lm.storage import process
from dist_lm.tracking.redact import without_secrets

# glibc hands big blocks back to the kernel and faults them in again at every step: a fifth of a step of a small model.
# Blocks of 64 MiB and more still go back: kept, they leave holes that cost a larger model memory and win no time.
CPU_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(64 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
# Without a count, threads of OpenMP look busily for more work for about 20 ms behind each loop, on cores that another
# process waits for: a learner's while its actors draw, and theirs while it updates. So often it is about 2 ms.
PATIENCE = {"GOMP_SPINCOUNT": "30000"}
LOOPBACK = "lo"
CUDA = {
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "NCCL_DEBUG": "WARN",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",  # the last collectives of a rank, written when one of them times out
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
}


def rank_environment(
    environ: Mapping[str, str],
    *,
    mark: str,
    logs: Path,
    device: str,
    cores_per_rank: int,
    interface: str | None,
    given: Mapping[str, str],
) -> dict[str, str]:
    """What torchrun and the ranks of a node find in their environment: `environ` without secrets, and ours.

    What a user has set for OpenMP, gloo, NCCL and CUDA stands.

    Args:
        mark: of the gang, by which its processes are found.
        logs: folder of the run's logs.
        interface: network interface for messages between ranks; None: their own choice.
        given: over everything else.
    """
    ours = {
        process.MARK: mark,
        "OMP_NUM_THREADS": str(max(1, cores_per_rank)),  # what is there is Ray's, for the agent
        "PYTHONUNBUFFERED": "1",
    }
    defaults = dict(PATIENCE)
    if device == "cuda":
        defaults |= CUDA | {"TORCH_FR_DUMP_TEMP_FILE": str(logs / "nccl_trace_rank_")}
    if device == "cpu":
        ours |= CPU_ALLOCATOR
    if interface:
        # otherwise gloo asks the resolver for this host's name, which may lead nowhere, or to 127.0.1.1
        defaults["GLOO_SOCKET_IFNAME"] = interface
        if interface != LOOPBACK:
            # of several InfiniBand ports NCCL takes all; what it says by TCP goes where the other nodes answer
            defaults["NCCL_SOCKET_IFNAME"] = f"={interface}"
    return defaults | without_secrets(environ) | ours | dict(given)


def interface_of(address: str) -> str | None:
    """The network interface that has an address; None if none has it by that name."""
    if sys.platform != "linux":
        return None
    if ipaddress.ip_address(address).is_loopback:
        return LOOPBACK  # has all of 127.0.0.0/8, and lists one of them
    return _named(address, ((name, [a.address for a in found]) for name, found in psutil.net_if_addrs().items()))


def _named(address: str, interfaces: Iterable[tuple[str, list[str]]]) -> str | None:
    return next((name for name, addresses in interfaces if address in addresses), None)
