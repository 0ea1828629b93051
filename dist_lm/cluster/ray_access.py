"""A rank's way to the Ray cluster that its agent belongs to, handed over in its environment.

Ranks are no part of Ray and are told none of its secrets, unless the stage drives actors of its own from a rank.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

from dist_lm.cluster.ray_cluster import RayCluster
from dist_lm.cluster.ray_environment import environment
from dist_lm.cluster.ray_join import joined_ray
from dist_lm.config.cluster import ClusterConfig

VARIABLE = "DIST_LM_RAY"  # environment variable of a rank that may join
PATH, TOKEN = "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN"  # Ray's own names


@dataclass(frozen=True)
class RayAccess:
    """Where the cluster is and what lets one in: the file with its token, or the token where there is no file."""

    address: str  # host:port of the head
    token_path: str | None
    token: str | None
    nodes: tuple[str, ...]  # addresses of the nodes that the ranks run on


def access_variables(environ: Mapping[str, str], address: str, nodes: Sequence[str]) -> dict[str, str]:
    """What an agent puts into the environment of ranks that may join.

    Args:
        environ: the agent's own.
        address: of the head, host:port.
        nodes: addresses of the nodes that the ranks run on.
    """
    path = environ.get(PATH)
    token = None if path else environ.get(TOKEN)
    return {VARIABLE: json.dumps(asdict(RayAccess(address, path, token, tuple(nodes))))}


def own_access(environ: Mapping[str, str]) -> RayAccess | None:
    """What the agent has handed to this rank; None where no agent has started it, or it has no business with Ray."""
    if VARIABLE not in environ:
        return None
    values = json.loads(environ[VARIABLE])
    return RayAccess(**values | {"nodes": tuple(values["nodes"])})


@contextmanager
def joined_by(access: RayAccess, config: ClusterConfig) -> Iterator[RayCluster]:
    """Be a driver of the cluster for the time of the block.

    Args:
        config: whose waits and limits hold.

    Raises:
        ClusterError: nothing answers within cluster.connect_timeout_s, or it refuses us.
    """
    own = replace(config, name="ray", address=access.address, token_path=access.token_path)
    # what Ray told the agent's process about itself is not true of a driver
    inherited = tuple(name for name in os.environ if name.startswith("RAY_"))
    with environment({TOKEN: access.token} if access.token else {}, removed=inherited), joined_ray(own) as address:
        yield RayCluster(address, own)
