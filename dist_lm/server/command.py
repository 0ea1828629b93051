"""`dist-lm serve RUN [RUN ...]`: loads models and serves them until the user or a signal ends it."""

import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dist_lm.errors import ConfigError, UserError, require
from dist_lm.parallel.mesh import option_device
from dist_lm.server.door import DoorRules
from dist_lm.server.follow import Follower
from dist_lm.server.models import ModelOptions, check_memory, find_models, load_reward, load_served
from dist_lm.server.served import ServeLimits
from dist_lm.server.serving import Serving
from dist_lm.storage.process import CpuUsage
from dist_lm.tracking.readable import say

KEY = "DIST_LM_API_KEY"
HEADER_BYTES = 32 << 10


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
    cache_tokens: int = 65536  # of all answers under way, prompts included
    most_requests: int = 256  # under way at a time
    queue_s: float = 60.0  # that a request may wait for its first step
    stop_s: float = 10.0  # that answers under way get when the server ends
    follow: bool = False  # whether new checkpoints of the runs are loaded
    limits: ServeLimits = field(default_factory=ServeLimits)

    def __post_init__(self) -> None:
        require(0 <= self.port < 65536, "--port", self.port, "0 to 65535")
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
            memory), the fault of a checkpoint or tokenizer (ArtefactError), or the package that is missing.
    """
    try:
        import uvicorn

        from dist_lm.server.app import build_app
    except ImportError as error:
        raise UserError(f"dist-lm serve needs the extra `serve`: pip install 'dist_lm[serve]' ({error})") from error

    rules = DoorRules(options.host, os.environ.get(KEY, ""), options.hosts, options.origins)
    device = option_device(options.device)
    listener = _listener(options.host, options.port)  # an address in use is found before a model is loaded
    usage = CpuUsage()
    serving, followers = _load(paths, tokenizer, options, device)
    # Threads wait for each other in every layer: one that gets no core stops all of them.
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        n_threads = min(torch.get_num_threads(), usage.free_cores())
        torch.set_num_threads(max(1, n_threads // max(1, len(serving.models))))
        for model in serving.models:
            model.thread.use_threads(torch.get_num_threads())

    config = uvicorn.Config(
        build_app(serving, rules),
        log_level="warning",
        server_header=False,
        h11_max_incomplete_event_size=HEADER_BYTES,
        # A connection may be kept open without a request.
        limit_concurrency=4 * options.most_requests,
        timeout_graceful_shutdown=max(1, round(options.stop_s)),
    )
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"http://{host}:{listener.getsockname()[1]}"
    names = ", ".join(served.name for served in serving.all_served)
    say(f"{names}: {address}/v1, {'with' if rules.key else 'without'} a key; chat page: {address}/")

    # uvicorn repeats the signal that ended it, for whoever was there before.
    handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for follower in followers:
            follower.start()
        uvicorn.Server(config).run([listener])
    finally:
        listener.close()
        for follower in followers:
            follower.stop(options.stop_s)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for model in serving.models:
            model.thread.close()


def _load(
    paths: Sequence[Path], tokenizer: Path | None, options: ServeOptions, device: torch.device
) -> tuple[Serving, list[Follower]]:
    """Loads all models, after a line that says what memory they take; returns them with what follows their runs.

    Raises:
        ConfigError, ArtefactError: as `serve`.
    """
    model_files = find_models(paths, options.names, options.follow)
    language_models = [model for model in model_files if model.config.head == "tokens"]
    reward_models = [model for model in model_files if model.config.head == "scalar"]
    cache_tokens = max(1, options.cache_tokens // max(1, len(language_models)))
    model_options = ModelOptions(device, options.tp, cache_tokens, options.queue_s, options.limits)
    say(check_memory(model_files, model_options))

    models = [load_served(model, tokenizer, model_options) for model in language_models]
    rewards = [load_reward(model, tokenizer, model_options) for model in reward_models]
    serving = Serving(models, options.most_requests, options.stop_s, options.limits, rewards)
    if not options.follow:
        return serving, []
    followers = [
        Follower(files.path, tokenizer, files.checkpoint, model.thread, say)
        for files, model in zip(language_models, models, strict=True)
    ]
    return serving, followers


def _listener(host: str, port: int) -> socket.socket:
    """Returns a socket that listens on an address.

    Raises:
        ConfigError: it is in use, or not one of this machine.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(f"--host={host} --port={port}: cannot listen there ({error.strerror or error})") from error
