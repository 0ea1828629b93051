"""`dist-lm serve RUN`: loads a model and serves it until the user or a signal ends it."""

import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dist_lm.errors import ConfigError, UserError, require
from dist_lm.generation.grammar import Grammars
from dist_lm.generation.load import LoadedModel, load_model
from dist_lm.generation.session import build_engine
from dist_lm.generation.shard import check_tp
from dist_lm.parallel.mesh import option_device
from dist_lm.server.door import DoorRules
from dist_lm.server.engine_thread import EngineThread
from dist_lm.server.protocol import Served, ServeLimits
from dist_lm.storage.process import CpuUsage
from dist_lm.tracking.readable import say

KEY = "DIST_LM_API_KEY"
STEP_PREFIX = "step_"
HEADER_BYTES = 32 << 10


@dataclass(frozen=True)
class ServeOptions:
    """Options of `dist-lm serve`."""

    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "auto"
    tp: int = 1
    names: Sequence[str] = ()  # further names of the model
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()
    cache_tokens: int = 65536  # of all answers under way, prompts included
    most_requests: int = 256  # under way at a time
    queue_s: float = 60.0  # that a request may wait for its first step
    stop_s: float = 10.0  # that answers under way get when the server ends
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


def serve(path: Path, tokenizer: Path | None, options: ServeOptions) -> None:
    """Serves a model; returns after Ctrl-C or SIGTERM, when what runs has ended or `stop_s` have passed.

    Args:
        path: a run, a folder of checkpoints, or a checkpoint.
        tokenizer: file or folder of the tokenizer; None: that of the run.

    Raises:
        UserError: names the option (ConfigError; also of an address that is in use), the fault of the checkpoint or
            tokenizer (ArtefactError), or the package that is missing.
    """
    try:
        import uvicorn

        from dist_lm.server.app import Serving, build_app
    except ImportError as error:
        raise UserError(f"dist-lm serve needs the extra `serve`: pip install 'dist_lm[serve]' ({error})") from error

    rules = DoorRules(options.host, os.environ.get(KEY, ""), options.hosts, options.origins)
    device = option_device(options.device)
    listener = _listener(options.host, options.port)  # an address in use is found before the model is loaded
    usage = CpuUsage()
    loaded = load_model(path, tokenizer)
    check_tp(loaded.config, options.tp, torch.cuda.device_count() if device.type == "cuda" else None, "--tp")
    # Threads wait for each other in every layer: one that gets no core stops all of them.
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), usage.free_cores())))

    grammars = Grammars(lambda: loaded.tokenizer, untrusted=True)
    answers = max(1, options.cache_tokens // loaded.config.max_seq_len)
    engine = build_engine(loaded, device, answers, options.cache_tokens, options.tp, grammars=grammars)
    thread = EngineThread(engine, options.queue_s)
    served = served_of(loaded, options)
    serving = Serving(served, thread, grammars, options.most_requests, options.stop_s)
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
    say(f"{served.name}: {address}/v1, {'with' if rules.key else 'without'} a key; chat page: {address}/")

    # uvicorn repeats the signal that ended it, for whoever was there before.
    handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        uvicorn.Server(config).run([listener])
    finally:
        listener.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        engine.close()


def _listener(host: str, port: int) -> socket.socket:
    """Returns a socket that listens on an address.

    Raises:
        ConfigError: it is in use, or not one of this machine.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(f"--host={host} --port={port}: cannot listen there ({error.strerror or error})") from error


def served_of(loaded: LoadedModel, options: ServeOptions) -> Served:
    """Returns what requests may know of the model; its name is that of its run and checkpoint."""
    last = loaded.name.rpartition("/")[2].removeprefix(STEP_PREFIX)
    return Served(
        name=loaded.name,
        tokenizer=loaded.tokenizer,
        context=loaded.config.max_seq_len,
        version=int(last) if last.isdigit() else 0,
        aliases=tuple(options.names),
        created=int(time.time()),
        limits=options.limits,
    )
