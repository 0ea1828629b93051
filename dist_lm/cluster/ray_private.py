"""A Ray of our own on this machine: started, used, and gone without a trace."""

import fcntl
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from dist_lm.cluster import process
from dist_lm.cluster.ray_environment import ENVIRONMENT, ClusterError, environment, import_ray
from dist_lm.config import ClusterConfig

# Ray replaces 127.0.0.1 by the host's own address; other loopback addresses are kept, and exist on Linux only
LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
PREFIX, LOCK = "dlm-", "lock"
PRIVATE_ENVIRONMENT = {
    # if the launch is killed its Ray goes too: the head does not come back, and a minute's wait for it is no use
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
}
LONGEST_TEMP = 24  # characters: Ray keeps sockets below it, whose paths the kernel limits to 107


@contextmanager
def private_ray(config: ClusterConfig) -> Iterator[str]:
    """Run a Ray of our own on this machine for the time of the block; its address, host:port.

    Raises:
        ClusterError: more than one node is asked for.
    """
    if config.nodes != 1:
        raise ClusterError(
            f"cluster.nodes={config.nodes}: cluster=local is this machine alone; use 1, "
            "or cluster=ray cluster.address=HOST:PORT"
        )
    with _private_directory() as private:
        token = private / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        changes = ENVIRONMENT | PRIVATE_ENVIRONMENT | {"RAY_AUTH_TOKEN_PATH": str(token)}
        with environment(changes, removed=("RAY_AUTH_TOKEN", "RAY_ADDRESS")):
            try:
                ray = import_ray()
                with _sigterm_kept():
                    context = ray.init(
                        address="local",
                        include_dashboard=False,
                        log_to_driver=False,
                        logging_level="ERROR",
                        num_cpus=process.cores(),
                        _node_ip_address=LOOPBACK,
                        _temp_dir=str(private / "ray"),
                    )
                yield context.address_info["gcs_address"]
            finally:
                _shut_down(private)


@contextmanager
def _private_directory() -> Iterator[Path]:
    """A directory of ours alone (Ray makes its own, inside it, writable for everybody); it goes with the block.

    It is locked while it is used: one that lies there unlocked was left by a killed launch, and is removed.
    """
    base = tempfile.gettempdir()
    if len(base) > LONGEST_TEMP:
        base = "/tmp"  # noqa: S108 - the directory made in it is ours alone
    for left in Path(base).glob(f"{PREFIX}*"):
        _remove_if_left(left)
    private = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    try:
        with (private / "new").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (private / "new").rename(private / LOCK)
            yield private
    finally:
        shutil.rmtree(private)


def _remove_if_left(private: Path) -> None:
    try:
        lock = (private / LOCK).open("r+")
    except OSError:  # of another user, just being made, or just being removed
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        shutil.rmtree(private, ignore_errors=True)  # another launch may be at it as well


def _shut_down(private: Path) -> None:
    """End the Ray that was started below `private`, and see to it that all of its processes are gone."""
    import ray

    # workers rename themselves, but they are children of a raylet whose command line names the directory
    roots = [child for child in psutil.Process().children() if _command_names(child, private)]
    started = [*roots, *(grandchild for root in roots for grandchild in _children(root))]
    ray.shutdown()
    _, alive = psutil.wait_procs(started, timeout=5)
    for left in alive:
        process.send(left, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=5)


def _command_names(candidate: psutil.Process, directory: Path) -> bool:
    try:
        return any(str(directory) in argument for argument in candidate.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


def _children(parent: psutil.Process) -> list[psutil.Process]:
    try:
        return parent.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself when it starts; it belongs to the launcher."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
