"""A Ray of our own on this machine: started, used, and gone without a trace."""

import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_lm.cluster import process
from dist_lm.cluster.node_directory import short_temporary
from dist_lm.cluster.ray_environment import ENVIRONMENT, ClusterError, environment, import_ray
from dist_lm.config import ClusterConfig

# Ray replaces 127.0.0.1 by the host's own address; other loopback addresses are kept, and exist on Linux only
LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
REAP_S = 30.0


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
        changes = ENVIRONMENT | {"RAY_AUTH_TOKEN_PATH": str(token)}
        with environment(changes, removed=("RAY_AUTH_TOKEN", "RAY_ADDRESS")):
            ray = import_ray()
            try:
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
                ray.shutdown()


@contextmanager
def _private_directory() -> Iterator[Path]:
    """A directory of ours alone (Ray makes its own, inside it, writable for everybody).

    It and all processes that use it are gone after the block, however this process ends.
    """
    private = Path(tempfile.mkdtemp(prefix="dlm-", dir=short_temporary()))
    reaper = subprocess.Popen(
        [sys.executable, "-m", "dist_lm.cluster.ray_reaper", str(private)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # a Ctrl-C in the terminal is not for it
    )
    try:
        yield private
    finally:
        reaper.communicate(timeout=REAP_S)


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
