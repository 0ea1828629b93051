"""What Ray reads from the environment of a process: how it authenticates, and what it keeps quiet about."""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dist_lm.errors import UserError

ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # ranks and engines are what a node is there for: no lower priority than others
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # leave CUDA_VISIBLE_DEVICES of a process without GPUs alone
}
SET_BY_RAY = ("RAY_CLIENT_MODE", "PYTHONBREAKPOINT")  # while it is connected


class ClusterError(UserError):
    """The cluster cannot be reached, does not let us in, or has not what was asked for."""


@contextmanager
def environment(changes: dict[str, str], removed: tuple[str, ...]) -> Iterator[None]:
    """Change the environment of this process, and so of what it starts, for the time of a block."""
    before = {name: os.environ.get(name) for name in (*changes, *removed, *SET_BY_RAY)}
    os.environ.update(changes)
    for name in removed:
        os.environ.pop(name, None)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def import_ray() -> Any:
    """Ray, with the authentication of the environment as it is now."""
    import ray

    # Ray keeps mode and token from the moment of its import; it has no public call to read them again
    raylet = importlib.import_module("ray._raylet")
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()
    return ray
