"""Joining a Ray cluster that runs: bounded waits, and a reason in one line when it does not work."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_lm.cluster.ray_environment import ENVIRONMENT, ClusterError, environment, import_ray
from dist_lm.cluster.ray_token import check_token_file
from dist_lm.config.cluster import ClusterConfig


@contextmanager
def joined_ray(config: ClusterConfig) -> Iterator[str]:
    """Be a driver of the Ray cluster at cluster.address for the time of the block; its address, host:port.

    Raises:
        ClusterError: nothing answers within cluster.connect_timeout_s, or it refuses us.
    """
    assert config.address is not None  # ClusterConfig refuses it
    host = _wait_for_port(config.address, config.connect_timeout_s)
    # the port answers: that a token is refused need not be tried twenty times
    changes = ENVIRONMENT | {"RAY_NUM_REDIS_GET_RETRIES": "2"}
    changes |= {"RAY_AUTH_TOKEN_PATH": config.token_path} if config.token_path else {}
    with environment(changes, removed=("RAY_AUTH_TOKEN",) if config.token_path else ()):
        _check_token(config)
        ray = import_ray()  # on a cold network file system it takes longer than Ray to let us in

        def init() -> None:
            # a driver counts itself to the node of its address: loopback clusters need to be told
            own = {"_node_ip_address": host} if host.startswith("127.") else {}
            ray.init(address=config.address, log_to_driver=False, logging_level="ERROR", **own)

        try:
            _within(config.connect_timeout_s, init)
        except TimeoutError:
            raise _refused(
                config,
                f"something answers, but lets nobody in within {config.connect_timeout_s:.0f} s; "
                "is it a Ray head of this version, and cluster.token_path its token? On a busy machine "
                f"cluster.connect_timeout_s={3 * config.connect_timeout_s:.0f} waits longer",
            ) from None
        except Exception as error:
            raise _refused(config, _reason(error)) from error
        try:
            yield config.address
        finally:
            ray.shutdown()


def _refused(config: ClusterConfig, reason: str) -> ClusterError:
    return ClusterError(f"cluster.address={config.address}: {reason}")


def _reason(error: BaseException) -> str:
    """What went wrong while joining, in a line."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    if any("Authentication" in type(link).__name__ or "InvalidAuthToken" in str(link) for link in chain):
        return "the Ray head refuses our token; cluster.token_path (or RAY_AUTH_TOKEN_PATH) must hold its own"
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"Ray did not let us in: {first.strip()}"


def _wait_for_port(address: str, timeout_s: float) -> str:
    """Wait until something answers at host:port; the host."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ClusterError(f"cluster.address={address}: expected HOST:PORT")
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=min(2.0, timeout_s)).close()
            return host
        except OSError as error:
            if time.monotonic() >= deadline:
                raise ClusterError(
                    f"cluster.address={address}: no Ray head answers there (waited {timeout_s:.0f} s: "
                    f"{error.strerror or error}); start one there, or use cluster=local"
                ) from None
        time.sleep(0.2)


def _check_token(config: ClusterConfig) -> None:
    """Refuse a token file that is missing or that others can read."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if path is None:
        if "RAY_AUTH_TOKEN" in os.environ:
            return
        path = str(Path.home() / ".ray" / "auth_token")  # where Ray itself looks
    check_token_file("cluster.token_path" if config.token_path else "RAY_AUTH_TOKEN_PATH", path)


def _within(seconds: float, call: Callable[[], None]) -> None:
    """Run `call` in a thread and wait for it so long; its exception is raised here.

    Raises:
        TimeoutError: it is left behind, still running.
    """
    outcome: list[BaseException | None] = []

    def work() -> None:
        try:
            call()
        except BaseException as error:  # handed over to the caller
            outcome.append(error)
        else:
            outcome.append(None)

    thread = threading.Thread(target=work, name="ray-init", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError
    if outcome[0] is not None:
        raise outcome[0]
