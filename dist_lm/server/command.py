"""`dist-lm serve RUN [RUN ...]`: loads models and serves them until the user or a signal ends it."""

import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dist_lm.cluster.ray_cluster import RayCluster, connect
from dist_lm.config.cluster import ClusterConfig
from dist_lm.errors import ConfigError, UserError, require
from dist_lm.parallel.mesh import option_device
from dist_lm.server.door import DoorRules
from dist_lm.server.follow import Follower
from dist_lm.server.model_files import ModelFiles, by_base, find_models, refuse_repeated
from dist_lm.server.models import ModelOptions, check_memory, load_over_pool, load_reward, load_served
from dist_lm.server.served import ServeLimits
from dist_lm.server.serving import Serving
from dist_lm.storage.process import CpuUsage
from dist_lm.tracking.readable import say

if TYPE_CHECKING:
    import uvicorn

KEY = "DIST_LM_API_KEY"
HEADER_BYTES = 32 << 10
# Longer than clients keep a connection without a request (httpx 5 s, aiohttp 15 s): the server would close some in the
# moment in which a client uses them again.
KEEP_ALIVE_S = 20


@dataclass(frozen=True)
class ServeOptions:
    """Options of `dist-lm serve`."""

    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "auto"
    tp: int = 1
    names: Sequence[str] = ()  # further names of the only model, or one for each model
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()
    cache_tokens: int = 65536  # cache for all answers under way, prompts included
    most_requests: int = 256  # under way at a time
    queue_s: float = 60.0  # the longest wait of a request for its first step
    stop_s: float = 10.0  # time for answers under way when the server ends
    follow: bool = False  # whether new checkpoints of the runs are loaded
    actors: int = 0  # engines of each model in a Ray cluster; -1: as many as fit; 0: engines in this process
    ray: str | None = None  # host:port of the head of a running Ray; None: one of our own on this machine
    nodes: int = 0  # most nodes of that Ray with actors, also of those that join later; 0: as many as are there now
    merge: bool = False  # whether adapters are merged even where models could share their base
    limits: ServeLimits = field(default_factory=ServeLimits)

    def __post_init__(self) -> None:
        require(0 <= self.port < 65536, "--port", self.port, "0 to 65535")
        require(self.actors >= -1, "--actors", self.actors, "a positive number, 0 for none, or -1 for as many as fit")
        require(self.actors != 0 or self.ray is None, "--ray", self.ray, "--actors too")
        nodes_fit = self.nodes == 0 or (self.nodes > 0 and self.ray is not None)
        require(nodes_fit, "--nodes", self.nodes, "a positive number, with --ray; 0 for those that are there")
        for option, value in (
            ("--tp", self.tp),
            ("--cache-tokens", self.cache_tokens),
            ("--max-requests", self.most_requests),
            ("--queue-seconds", self.queue_s),
            ("--stop-seconds", self.stop_s),
            ("--max-tokens", self.limits.max_tokens),
            ("--max-n", self.limits.n),
        ):
            require(value > 0, option, value, "a positive number")


def serve(paths: Sequence[Path], tokenizer: Path | None, options: ServeOptions) -> None:
    """Serves models; returns after Ctrl-C or SIGTERM, when what runs has ended or `stop_s` have passed.

    Args:
        paths: runs, folders of checkpoints, or checkpoints.
        tokenizer: file or folder of the tokenizer of all; None: that of each run.

    Raises:
        UserError: names the option (ConfigError; also of an address that is in use, and of models that do not fit into
            memory), the fault of a checkpoint or tokenizer (ArtefactError), the package that is missing, or the Ray
            cluster that does not answer or has no place for an actor (ClusterError).
    """
    try:
        import uvicorn

        from dist_lm.server.app import build_app
    except ImportError as error:
        raise UserError(f"dist-lm serve needs the extra `serve`: pip install 'dist_lm[serve]' ({error})") from error

    rules = DoorRules(options.host, os.environ.get(KEY, ""), options.hosts, options.origins)
    listener = _listener(options.host, options.port)  # an address in use is found before a model is loaded
    usage = CpuUsage()
    with _cluster(options) as cluster:
        serving, followers = _load(paths, tokenizer, options, cluster)
        if cluster is None:
            _divide_threads(serving, usage, options)

        config = uvicorn.Config(
            build_app(serving, rules),
            log_level="warning",
            server_header=False,
            h11_max_incomplete_event_size=HEADER_BYTES,
            # A connection may be kept open without a request.
            limit_concurrency=4 * options.most_requests,
            timeout_graceful_shutdown=max(1, round(options.stop_s)),
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        # An IPv6 address stands in brackets in a URL.
        host = f"[{options.host}]" if ":" in options.host else options.host
        address = f"http://{host}:{listener.getsockname()[1]}"
        names = ", ".join(served.name for served in serving.all_served)
        say(f"{names}: {address}/v1, {'with' if rules.key else 'without'} a key; chat page: {address}/")
        _run(uvicorn.Server(config), listener, serving, followers)


@contextmanager
def _cluster(options: ServeOptions) -> Iterator[RayCluster | None]:
    """Connects to the Ray cluster that the options name, or starts one on this machine; None without actors.

    Raises:
        ClusterError: the cluster does not answer or refuses, or Ray does not start.
    """
    if not options.actors:
        yield None
        return
    with connect(ClusterConfig(name="ray" if options.ray else "local", address=options.ray)) as cluster:
        # Actors may use every node that is there; the default of cluster.nodes is one.
        n_nodes = options.nodes or len(cluster.nodes())
        yield replace(cluster, config=replace(cluster.config, nodes=max(1, n_nodes)))


def _divide_threads(serving: Serving, usage: CpuUsage, options: ServeOptions) -> None:
    """Gives each engine on a CPU its part of the cores that others leave free."""
    # Threads wait for each other in every layer: one that gets no core stops all of them.
    if option_device(options.device).type != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return
    n_threads = min(torch.get_num_threads(), usage.free_cores())
    torch.set_num_threads(max(1, n_threads // max(1, len(serving.threads))))
    for thread in serving.threads:
        thread.use_threads(torch.get_num_threads())


def _run(server: "uvicorn.Server", listener: socket.socket, serving: Serving, followers: Sequence[Follower]) -> None:
    """Runs the server until a signal ends it, and then ends all models."""
    # uvicorn repeats the signal that ended it, for whoever was there before.
    handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for follower in followers:
            follower.start()
        server.run([listener])
    finally:
        listener.close()
        for follower in followers:
            follower.stop(serving.stop_s)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for thread in serving.threads:
            thread.close()


def _load(
    paths: Sequence[Path], tokenizer: Path | None, options: ServeOptions, cluster: RayCluster | None
) -> tuple[Serving, list[Follower]]:
    """Loads all models, after a line that says what memory they take here; returns them with what follows their runs.

    Raises:
        ConfigError, ArtefactError: as `serve`.
        UserError: no actor starts.
    """
    model_files = find_models(paths, options.names, options.follow)
    refuse_repeated(model_files)
    language_models = [model for model in model_files if model.config.head == "tokens"]
    reward_models = [model for model in model_files if model.config.head == "scalar"]
    # The option counts the tokens of all models together.
    cache_tokens = max(1, options.cache_tokens // max(1, len(language_models)))
    device = option_device(options.device) if cluster is None else _device_of(cluster, options.device)
    model_options = ModelOptions(device, options.tp, cache_tokens, options.queue_s, options.limits)

    groups = _groups(language_models, options)
    if cluster is None:
        say(check_memory([*groups, *([model] for model in reward_models)], model_options))
        loaded = [load_served(group, tokenizer, model_options) for group in groups]
    else:
        loaded = [load_over_pool(group, tokenizer, model_options, cluster, options.actors) for group in groups]
    by_name = {model.served.name: model for of_group in loaded for model in of_group}
    models = [by_name[model.name] for model in language_models]

    if cluster is not None:
        counts = [thread.n_engines for thread in dict.fromkeys(model.thread for model in models)]
        say(f"{sum(counts)} actor{'s' * (sum(counts) != 1)} at {cluster.address}, on {device}")
    # Scores are computed in this process.
    reward_options = replace(model_options, device=device if cluster is None else torch.device("cpu"), tp=1)
    rewards = [load_reward(model, tokenizer, reward_options) for model in reward_models]
    serving = Serving(models, options.most_requests, options.stop_s, options.limits, rewards)
    if not options.follow:
        return serving, []
    followers = [
        Follower(files.path, tokenizer, files.checkpoint, model.thread, say)
        for files, model in zip(language_models, models, strict=True)
    ]
    return serving, followers


def _groups(models: Sequence[ModelFiles], options: ServeOptions) -> list[list[ModelFiles]]:
    """Returns the models in groups with one engine each, and says so where models over one base are merged instead."""
    groups = by_base(models)
    if len(groups) == len(models):
        return groups
    # Each rank would hold its part of the factors, and weights that change have no adapters beside them.
    for reason, holds in (
        ("--merge", options.merge),
        (f"--tp {options.tp}", options.tp > 1),
        ("--follow", options.follow),
    ):
        if holds:
            say(f"{reason}: adapters of one base are merged, and each model has weights of its own")
            return [[model] for model in models]
    return groups


def _device_of(cluster: RayCluster, name: str) -> torch.device:
    """Returns what actors compute on: with `auto` GPUs if a node has some."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if any(node.gpus for node in cluster.nodes()) else "cpu")


def _listener(host: str, port: int) -> socket.socket:
    """Returns a socket that listens on an address.

    Raises:
        ConfigError: it is in use, or not one of this machine.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(f"--host={host} --port={port}: cannot listen there ({error.strerror or error})") from error
