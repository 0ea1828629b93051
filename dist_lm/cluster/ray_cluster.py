"""Connections to Ray: a private cluster on this machine, one that already runs, or the one that started this rank.

Ray without a token lets anyone who reaches its port run code, so every connection uses a token. Ray is imported
inside functions, because a launch that needs no cluster should not pay for the import.
"""

import importlib
import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from dist_lm.config.cluster import ClusterConfig
from dist_lm.errors import UserError
from dist_lm.tracking import readable

RANK_ACCESS = "DIST_LM_RAY"  # environment variable of a rank that may join Ray
PATH, TOKEN = "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN"  # Ray's own names
RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0",  # a Python process per core that nobody asked for
    "RAY_worker_niceness": "0",  # Ray would lower the priority of actors; ranks and engines need the normal one
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # keep CUDA_VISIBLE_DEVICES of a process that reserves no GPU
}
CHANGED_BY_RAY = ("RAY_CLIENT_MODE", "PYTHONBREAKPOINT")  # while it is connected
LOOPBACK = "127.0.0.1"  # Ray's processes of a node with this address listen there alone, see `keep_loopback`
LONGEST_REASON = 300  # characters of a Ray error in a message; some fill a screen
PRIVATE_END_S = 30.0
DEATH_NOTICED_S = 2.0  # longest time from the end of a process of Ray to the line of its node
PRIVATE_PATIENCE = 3  # times the usual timeout: our own head has answered, so only a busy machine delays it

Outcome = TypeVar("Outcome")


class ClusterError(UserError):
    """The cluster cannot be reached, refuses the connection, or lacks the requested nodes."""


@dataclass(frozen=True)
class Node:
    """A living node of the cluster."""

    id: str
    address: str
    cpus: int
    gpus: int


def bundle_of(gpus: int) -> dict[str, float]:
    """Returns what an agent or an actor reserves on its node: one CPU, which keeps two of them apart, and its GPUs."""
    bundle = {"CPU": 1.0}
    if gpus:
        bundle["GPU"] = float(gpus)
    return bundle


@dataclass(frozen=True)
class RayCluster:
    """An open connection to Ray; the `ray` calls of this process use it."""

    address: str  # host:port of the head
    config: ClusterConfig

    def nodes(self) -> list[Node]:
        """Returns the living nodes, ordered by address; asks Ray at every call."""
        import ray

        nodes = [
            Node(
                id=node["NodeID"],
                address=node["NodeManagerAddress"],
                cpus=int(node["Resources"].get("CPU", 0)),
                gpus=int(node["Resources"].get("GPU", 0)),
            )
            for node in ray.nodes()
            if node["Alive"]
        ]
        return sorted(nodes, key=lambda node: (node.address, node.id))


@contextmanager
def connect(config: ClusterConfig) -> Iterator[RayCluster]:
    """Starts a private Ray on this machine (`cluster=local`) or joins a running one (`cluster=ray`) for the block.

    A process holds one connection at a time. Leaving the block restores the environment.

    Raises:
        ClusterError: no head answers at cluster.address within cluster.connect_timeout_s, the head refuses, Ray does
            not start, or cluster.nodes is not 1 with `cluster=local`.
    """
    with _private(config) if config.name == "local" else _joined(config) as address:
        yield RayCluster(address, config)


@dataclass(frozen=True)
class RayAccess:
    """How a rank joins the cluster of its agent: the head's address and its token (a file, or else the token)."""

    address: str  # host:port of the head
    token_path: str | None
    token: str | None
    nodes: tuple[str, ...]  # addresses of the nodes that run ranks


def access_variables(environ: Mapping[str, str], address: str, nodes: Sequence[str]) -> dict[str, str]:
    """Returns the environment variable that lets a rank join. An agent sets it only if the stage drives actors from a
    rank. It holds the path of the token's file, or without one the token itself.

    Args:
        environ: the agent's own.
        address: host:port of the head.
        nodes: addresses of the nodes that run ranks.
    """
    path = environ.get(PATH)
    token = None if path else environ.get(TOKEN)
    return {RANK_ACCESS: json.dumps(asdict(RayAccess(address, path, token, tuple(nodes))))}


def own_access(environ: Mapping[str, str]) -> RayAccess | None:
    """Returns the access that the agent gave this rank; None without an agent, or if the stage drives no actors."""
    if RANK_ACCESS not in environ:
        return None
    fields = json.loads(environ[RANK_ACCESS])
    return RayAccess(**fields | {"nodes": tuple(fields["nodes"])})


@contextmanager
def joined_by(access: RayAccess, config: ClusterConfig) -> Iterator[RayCluster]:
    """Joins the cluster of `access` as a driver for the block; RAY_ variables are removed from the environment
    meanwhile.

    Args:
        config: its timeouts and limits apply.

    Raises:
        ClusterError: the head does not answer within cluster.connect_timeout_s, or refuses.
    """
    rank_config = replace(config, name="ray", address=access.address, token_path=access.token_path)
    # the variables that Ray set in the agent's process are wrong for a driver
    inherited = tuple(name for name in os.environ if name.startswith("RAY_"))
    token = {TOKEN: access.token} if access.token else {}
    with environment(token, inherited), _joined(rank_config) as address:
        yield RayCluster(address, rank_config)


def first_line(error: BaseException) -> str:
    """Returns the first non-empty line of a Ray error, shortened; for the death of an actor that is the reason."""
    lines = (line.strip() for line in str(error).splitlines() if line.strip())
    return textwrap.shorten(next(lines, type(error).__name__), LONGEST_REASON, placeholder=" ...")


def last_line(error: BaseException) -> str:
    """Returns the last non-empty line of a Ray error; for a failed task that is the exception."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


def reason_of(error: BaseException) -> str:
    """Returns why a call of an actor failed: the exception that its code raised, or what happened to the actor."""
    from ray.exceptions import RayTaskError

    # A failed task ends with its exception; the death of an actor begins with its reason.
    if isinstance(error, RayTaskError):
        return last_line(error)
    return first_line(error)


def check_token_file(key: str, path: str) -> None:
    """Refuses a token file that is missing, empty or readable by others.

    Args:
        key: setting that `path` comes from, for the message.

    Raises:
        ClusterError: names key, path and remedy, never the token.
    """
    file = Path(path)
    if not file.is_file():
        raise ClusterError(f"{key}={path}: no such file; it must hold the token of the Ray cluster (mode 0600)")
    if file.stat().st_size == 0:
        raise ClusterError(f"{key}={path}: the file is empty; write the token of the Ray cluster into it")

    mode = file.stat().st_mode & 0o777
    if mode & 0o077:
        raise ClusterError(f"{key}={path}: mode {mode:04o} lets others read the token: `chmod 600 {path}`")


@contextmanager
def _private(config: ClusterConfig) -> Iterator[str]:
    """Runs a Ray head of our own on this machine for the block, and joins it; yields its address, host:port.

    Raises:
        ClusterError: cluster.nodes is not 1, or Ray does not start or answer.
        subprocess.TimeoutExpired: the head has not ended `PRIVATE_END_S` after the block.
    """
    if config.nodes != 1:
        raise ClusterError(
            f"cluster.nodes={config.nodes}: cluster=local is this machine alone; use 1, "
            "or cluster=ray cluster.address=HOST:PORT"
        )
    node = subprocess.Popen(
        [sys.executable, "-m", "dist_lm.cluster.ray_node", "private", LOOPBACK],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # signals to the launch's process group must not reach it
    )
    assert node.stdout is not None
    assert node.stdin is not None

    # The node ends when its standard input is closed, also if this process is killed.
    try:
        answer = node.stdout.readline()
        if not answer:
            raise ClusterError("cluster=local: Ray did not start on this machine; the lines above give the reason")
        death = in_thread(node.stdout.readline, "ray-death")
        timeout_s = PRIVATE_PATIENCE * config.connect_timeout_s
        private = replace(config, name="ray", connect_timeout_s=timeout_s, **json.loads(answer))
        with ExitStack() as connection:
            try:
                address = connection.enter_context(_joined(private, death))
            except ClusterError as error:
                # Its words name keys of cluster=ray, which nobody has set here.
                raise ClusterError(_failed_start(config, error, death)) from error

            death.add_done_callback(_say_death)
            yield address
    finally:
        node.stdin.close()
        node.wait(timeout=PRIVATE_END_S)


def _failed_start(config: ClusterConfig, error: ClusterError, death: "Future[bytes]") -> str:
    """Returns why the private Ray could not be joined, and the ways out.

    Args:
        error: that of joining.
        death: the line that the node prints when Ray dies; empty if the node itself has ended.
    """
    without_ray = "train without Ray: `torchrun -m dist_lm.train` same settings, rlhf.pool.actors=0 for stage rlhf"
    # A refused connection may be the first sign of a death that the node notices a moment later.
    wait([death], DEATH_NOTICED_S)
    if not death.done():
        reason = f"it accepted no connection within {PRIVATE_PATIENCE * config.connect_timeout_s:.0f} s"
        if error.__cause__:
            reason = _refusal(error.__cause__)
        return (
            f"cluster=local: the Ray of this machine cannot be used: {reason}. A busy machine may need longer: try "
            f"again with cluster.connect_timeout_s={3 * config.connect_timeout_s:.0f}, which waits "
            f"{3 * PRIVATE_PATIENCE * config.connect_timeout_s:.0f} s, or {without_ray}"
        )

    reason, logs = "its node has ended", ""
    if line := death.result():
        fields = json.loads(line)
        reason, logs = fields["death"], f" (Ray's own words: {fields['log']})"
    return (
        f"cluster=local: the Ray of this machine died while it started, as on a busy machine: {reason}{logs}: "
        f"try again, or {without_ray}"
    )


def _say_death(death: "Future[bytes]") -> None:
    """Prints that the private Ray has died during the block, and where its logs are; nothing when its node has ended
    with the block."""
    if line := death.result():
        fields = json.loads(line)
        readable.say(f"cluster=local: {fields['death']}; Ray's own words: {fields['log']}", sys.stderr)


@contextmanager
def _joined(config: ClusterConfig, death: "Future[bytes] | None" = None) -> Iterator[str]:
    """Joins the Ray cluster at cluster.address as a driver for the block; yields its address, host:port.

    The environment is changed inside the block.

    Args:
        death: done once the head has died; then joining ends early.

    Raises:
        ClusterError: no head answers in time, the token is missing or wrong, or Ray refuses.
    """
    assert config.address is not None  # ClusterConfig refuses it
    host = _wait_for_port(config.address, config.connect_timeout_s, death)

    # Ray's default retries a refused token 20 times.
    changes = RAY_ENVIRONMENT | {"RAY_NUM_REDIS_GET_RETRIES": "2"}
    removed: tuple[str, ...] = ()
    if config.token_path:
        changes |= {PATH: config.token_path}
        # Ray would prefer it to the file.
        removed = (TOKEN,)
    with environment(changes, removed):
        _check_token(config)
        # Outside the timeout: on a cold network file system the import takes longer.
        ray = _import_ray()

        def init() -> None:
            # Ray assigns a driver to the node of its address, which is ambiguous on loopback addresses
            node_address = {"_node_ip_address": host} if host.startswith("127.") else {}
            with _loopback_kept(host, config.address):
                ray.init(address=config.address, log_to_driver=False, logging_level="ERROR", **node_address)

        try:
            joining = in_thread(init, "ray-init")
            pending: list[Future[Any]] = [joining, death] if death else [joining]
            wait(pending, config.connect_timeout_s, FIRST_COMPLETED)
            joining.result(timeout=0)
        except TimeoutError:
            raise ClusterError(
                f"cluster.address={config.address}: the port answers, but the connection was not accepted within "
                f"{config.connect_timeout_s:.0f} s; check that it is a Ray head of this version and that "
                "cluster.token_path is its token, or on a busy machine wait longer: "
                f"cluster.connect_timeout_s={3 * config.connect_timeout_s:.0f}"
            ) from None
        except Exception as error:
            raise ClusterError(f"cluster.address={config.address}: {_refusal(error)}") from error

        try:
            yield config.address
        finally:
            ray.shutdown()


def keep_loopback() -> Callable[[str], str]:
    """Lets Ray of this process use 127.0.0.1, which it would replace by the host's own address: a node of that address
    listens on it alone, one of any other address on all of them. Returns what it has replaced."""
    services: Any = importlib.import_module("ray._private.services")
    replaced = services.resolve_ip_for_localhost
    services.resolve_ip_for_localhost = lambda host: host
    return replaced


@contextmanager
def _loopback_kept(host: str, address: str | None) -> Iterator[None]:
    """Keeps 127.0.0.1 for the block if the head at `address` listens there alone, as a private one does."""
    services: Any = importlib.import_module("ray._private.services")
    if host != LOOPBACK or _answers(services.get_node_ip_address(), int(str(address).rpartition(":")[2])):
        yield
        return

    replaced = keep_loopback()
    try:
        yield
    finally:
        services.resolve_ip_for_localhost = replaced


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2.0).close()
    except OSError:
        return False
    return True


def _wait_for_port(address: str, timeout_s: float, death: "Future[bytes] | None" = None) -> str:
    """Waits until host:port accepts a connection; returns the host.

    Args:
        death: as in `_joined`.

    Raises:
        ClusterError: the address has another form, or nothing answers within `timeout_s` seconds.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ClusterError(f"cluster.address={address}: expected HOST:PORT")

    # `ray.init` waits long and says little if nothing listens there.
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=min(2.0, timeout_s)).close()
            return host
        except OSError as error:
            if time.monotonic() >= deadline or (death and death.done()):
                raise ClusterError(
                    f"cluster.address={address}: no Ray head answers there (waited {timeout_s:.0f} s: "
                    f"{error.strerror or error}); start one there, or use cluster=local"
                ) from None
        time.sleep(0.2)


def _check_token(config: ClusterConfig) -> None:
    path = os.environ.get(PATH)
    if path is None:
        if TOKEN in os.environ:
            return
        path = str(Path.home() / ".ray" / "auth_token")  # Ray's default
    check_token_file("cluster.token_path" if config.token_path else PATH, path)


def _refusal(error: BaseException) -> str:
    """Returns why Ray refused the connection, in one line."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    if any("Authentication" in type(link).__name__ or "InvalidAuthToken" in str(link) for link in chain):
        return f"the Ray head refuses our token; cluster.token_path (or {PATH}) must hold the head's own"
    return f"Ray refused the connection: {first_line(error)}"


def _import_ray() -> Any:
    """Ray, using the authentication that the environment specifies now."""
    import ray

    # Ray reads mode and token when it is imported and has no public call to read them again
    raylet = importlib.import_module("ray._raylet")
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()
    return ray


@contextmanager
def environment(changes: Mapping[str, str], removed: tuple[str, ...] = ()) -> Iterator[None]:
    """Changes the environment of this process and its future children for the block, and restores it.

    So it does with `CHANGED_BY_RAY`.
    """
    before = {name: os.environ.get(name) for name in (*changes, *removed, *CHANGED_BY_RAY)}
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


def in_thread(call: Callable[[], Outcome], name: str) -> Future[Outcome]:
    """Begins `call` in a thread of its own and returns its outcome to come. The thread of a call that never returns
    does not keep the process from ending.
    """
    outcome: Future[Outcome] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:  # raised again by `outcome.result`
            outcome.set_exception(error)

    threading.Thread(target=work, name=name, daemon=True).start()
    return outcome
