"""torchrun on one node: the environment of torchrun and its ranks, and the program that an agent starts.

`python -m dist_lm.cluster.torchrun PARENT REPORT_FD ARGUMENTS...` is torchrun with three additions: it dies with the
process PARENT; if ranks fail it writes a JSON list of `{rank, exit_code, time}` to the file descriptor REPORT_FD
(a negative exit code is a signal number; time in seconds since 1970); and it knows the rendezvous of
`dist_lm.parallel.rendezvous`, also where dist_lm is not installed.
"""

import ipaddress
import json
import os
import socket
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import psutil

from dist_lm.cluster.node_facts import local_gpus
from dist_lm.parallel.rendezvous import BACKEND, NODES_BACKEND, address_handler, private_handler
from dist_lm.storage import process
from dist_lm.tracking.redact import without_secrets

# glibc's default returns large blocks to the kernel and faults them in again at every step: 20 % of the step time of a
# small model. Blocks of 64 MiB and more are still returned: keeping them fragments the heap of a larger model and saves
# no time.
CPU_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(64 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
# OpenMP threads spin by default for about 20 ms after each parallel loop, on cores that another process needs (a
# learner's cores while its actors generate, and theirs while it updates). This count means about 2 ms.
OPENMP_SPIN = {"GOMP_SPINCOUNT": "30000"}
LOOPBACK = "lo"
CUDA = {
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "NCCL_DEBUG": "WARN",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",  # collectives kept per rank, for a hang and for one that times out
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
    overrides: Mapping[str, str],
) -> dict[str, str]:
    """Returns the environment of torchrun and the ranks of a node: `environ` without secrets, and our settings.

    The user's own settings of OpenMP, gloo, NCCL and CUDA are kept, but for the number of threads.

    Args:
        mark: names the gang in the environment; its processes are found by it.
        logs: folder of the run's logs.
        interface: network interface for messages between ranks; None: gloo and NCCL choose.
        overrides: replace everything else.
    """
    ours = {
        process.MARK: mark,
        "OMP_NUM_THREADS": str(max(1, cores_per_rank)),  # replaces the value that Ray set for the agent
        "PYTHONUNBUFFERED": "1",
    }

    # Defaults give way to settings of the user.
    defaults = dict(OPENMP_SPIN)
    if device == "cuda":
        defaults |= CUDA | {"TORCH_FR_DUMP_TEMP_FILE": str(logs / "nccl_trace_rank_")}
    if device == "cpu":
        ours |= CPU_ALLOCATOR
    if interface:
        # without it gloo resolves this host's name, which may fail or give 127.0.1.1
        defaults["GLOO_SOCKET_IFNAME"] = interface
        if interface != LOOPBACK:
            # TCP only: NCCL still uses every InfiniBand port
            defaults["NCCL_SOCKET_IFNAME"] = f"={interface}"
    return defaults | without_secrets(environ) | ours | dict(overrides)


def interface_of(address: str) -> str | None:
    """Returns the network interface that has an address; None if no interface lists it, or not on Linux.

    Raises:
        ValueError: `address` is no IP address.
    """
    if sys.platform != "linux":
        return None
    if ipaddress.ip_address(address).is_loopback:
        # It has all of 127.0.0.0/8 but lists one address.
        return LOOPBACK
    for name, entries in psutil.net_if_addrs().items():
        if address in [entry.address for entry in entries]:
            return name
    return None


def complete_environment(environ: Mapping[str, str]) -> dict[str, str] | None:
    """Returns the environment of a rank that torchrun has started without an agent; None for a rank that has it
    already.

    It is as an agent would have made it, but with secrets.

    Args:
        environ: the rank's own, with the variables of torchrun.
    """
    if process.MARK in environ:
        return None
    ranks = int(environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes = int(environ.get("GROUP_WORLD_SIZE", "1"))
    address = environ.get("MASTER_ADDR", "127.0.0.1")
    return dict(environ) | rank_environment(
        environ,
        mark=f"torchrun-{os.getppid()}",
        logs=Path(tempfile.gettempdir()),
        device="cuda" if local_gpus() else "cpu",
        cores_per_rank=process.cores() // ranks,
        interface=LOOPBACK if nodes == 1 else interface_towards(address),
        overrides={},
    )


def interface_towards(address: str) -> str | None:
    """Returns the network interface by which this node reaches another one; None to let gloo and NCCL choose, also if
    the name cannot be resolved. Nothing is sent to the other node.

    Args:
        address: host name or IP address of the first node, which may be this one.
    """
    try:
        # connecting a datagram socket sends nothing, it only asks the kernel for the route
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
            route.connect((address, 1))
            interface = interface_of(route.getsockname()[0])
    except OSError:
        return None
    # A host name of this node may resolve to a loopback address, which the other nodes do not reach.
    by_name = address != "localhost" and not address.startswith("127.")
    return None if interface == LOOPBACK and by_name else interface


def main() -> None:
    """Runs torchrun, and ends with the agent that started it. If a rank failed, it prints the error, writes the
    failures to the report's descriptor and exits with code 1.

    Raises:
        OSError: the kernel refuses to end this process with its parent.
    """
    parent, report = int(sys.argv[1]), int(sys.argv[2])
    process.die_with_parent(parent)

    # imported here because it takes more than a second and only this process needs it
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry
    from torch.distributed.run import main as torchrun

    # torchrun has registered the same class by its entry point where dist_lm is installed.
    rendezvous_handler_registry.register(BACKEND, private_handler())
    rendezvous_handler_registry.register(NODES_BACKEND, address_handler())

    try:
        # torchrun leaves its log folder behind
        with tempfile.TemporaryDirectory(prefix="dlm-torchrun-") as logs:
            torchrun(["--log-dir", logs, *sys.argv[3:]])
    except ChildFailedError as error:
        print(error, file=sys.stderr, flush=True)
        failures = [
            {"rank": rank, "exit_code": failure.exitcode, "time": float(failure.timestamp)}
            for rank, failure in error.failures.items()
        ]
        os.write(report, json.dumps(failures).encode())
        sys.exit(1)


if __name__ == "__main__":
    main()
