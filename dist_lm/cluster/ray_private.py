"""A Ray of our own on this machine: started, used, and gone without a trace."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from dist_lm.cluster.ray_environment import ClusterError
from dist_lm.cluster.ray_join import joined_ray
from dist_lm.config.cluster import ClusterConfig

# Ray replaces 127.0.0.1 by the host's own address; other loopback addresses are kept, and exist on Linux only
LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
REAP_S = 30.0


@contextmanager
def private_ray(config: ClusterConfig) -> Iterator[str]:
    """Run a Ray of our own on this machine for the time of the block; its address, host:port.

    Raises:
        ClusterError: more than one node is asked for, or Ray does not start within cluster.connect_timeout_s.
    """
    if config.nodes != 1:
        raise ClusterError(
            f"cluster.nodes={config.nodes}: cluster=local is this machine alone; use 1, "
            "or cluster=ray cluster.address=HOST:PORT"
        )
    node = subprocess.Popen(
        [sys.executable, "-m", "dist_lm.cluster.ray_private_node", LOOPBACK],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # signals to the launch's process group are not for it
    )
    assert node.stdout is not None
    assert node.stdin is not None
    try:
        said = node.stdout.readline()
        if not said:
            raise ClusterError("cluster=local: Ray does not start here; the reason is above")
        where = json.loads(said)
        private = replace(config, name="ray", address=where["address"], token_path=where["token_path"])
        with joined_ray(private) as address:
            yield address
    finally:
        node.stdin.close()
        node.wait(timeout=REAP_S)
