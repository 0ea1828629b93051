"""A server with an untrained model on a loopback port, and clients of it."""

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn

from dist_lm.config.model import ModelConfig
from dist_lm.generation.engine import Engine
from dist_lm.generation.grammar import Grammars
from dist_lm.generation.load import LoadedModel
from dist_lm.generation.session import build_engine
from dist_lm.model.keyed_random import initialise
from dist_lm.model.transformer import Transformer
from dist_lm.prepare.compose import compose_config
from dist_lm.server import command
from dist_lm.server.app import build_app
from dist_lm.server.door import DoorRules
from dist_lm.server.engine_thread import EngineThread
from dist_lm.server.scoring import RewardModel
from dist_lm.server.served import Served, ServeLimits
from dist_lm.server.serving import ServedModel, Serving
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from tests.conftest import TINY
from tests.patience import patient

CONTEXT = 512
CACHE_TOKENS = 8192
LIMITS = ServeLimits(max_tokens=300, n=8, body_bytes=1 << 20)


@dataclass(frozen=True)
class Running:
    """A server that runs."""

    url: str
    serving: Serving
    model: Transformer
    loaded: LoadedModel

    def client(self, key: str = "none") -> openai.OpenAI:
        """The official client."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=patient(60))

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=patient(60), **options)

    def offline(self) -> Engine:
        """An engine beside the server's, with the same weights."""
        return build_engine(self.loaded, torch.device("cpu"), 16, CACHE_TOKENS)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is under way, and every page of the cache is free."""
        threads = [model.thread for model in self.serving.models]
        is_idle = all(thread.is_idle and thread.free_pages == thread.n_pages for thread in threads)
        return is_idle and not self.serving.open_requests


@pytest.fixture(scope="session")
def model() -> Transformer:
    config: ModelConfig = compose_config(["stage=code", *TINY, "model.init_std=0.2"]).model
    model = Transformer(replace(config, max_seq_len=CONTEXT))
    initialise(model, seed=0)
    return model.requires_grad_(requires_grad=False)


@pytest.fixture(scope="session")
def loaded(model: Transformer, tiny_work: WorkDirectory) -> LoadedModel:
    tokenizer = Tokenizer.load(tiny_work.tokenizer_model)
    return LoadedModel("small", model.config, dict(model.named_parameters()), tokenizer, run=None)


def served_model(loaded: LoadedModel, name: str, aliases: tuple[str, ...] = (), queue_s: float = 60.0) -> ServedModel:
    """Returns a model with an engine of its own, whose weights are version 7."""
    grammars = Grammars(lambda: loaded.tokenizer, untrusted=True)
    engine = build_engine(loaded, torch.device("cpu"), 16, CACHE_TOKENS, grammars=grammars, version=7)
    width = loaded.config.d_model
    about = Served(name, loaded.tokenizer, CONTEXT, aliases, limits=LIMITS, embedding_width=width)
    return ServedModel(about, EngineThread(engine, queue_s), grammars)


@contextmanager
def served(
    model: Transformer,
    loaded: LoadedModel,
    rules: DoorRules,
    most_requests: int = 64,
    queue_s: float = 60.0,
    others: Sequence[ServedModel] = (),
    rewards: Sequence[RewardModel] = (),
) -> Iterator[Running]:
    models = [served_model(loaded, "small", ("default",), queue_s), *others]
    with serving_of(models, rules, most_requests, rewards) as (url, serving):
        yield Running(url, serving, model, loaded)


@contextmanager
def serving_of(
    models: Sequence[ServedModel], rules: DoorRules, most_requests: int = 64, rewards: Sequence[RewardModel] = ()
) -> Iterator[tuple[str, Serving]]:
    """A server of models: its address, and what its routes share."""
    serving = Serving(models, most_requests, limits=LIMITS, rewards=rewards)
    listener = socket.create_server(("127.0.0.1", 0))
    app = build_app(serving, rules)
    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=5, timeout_keep_alive=command.KEEP_ALIVE_S
    )
    server = uvicorn.Server(config)
    runner = threading.Thread(target=server.run, args=([listener],), daemon=True)
    runner.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", serving
    finally:
        server.should_exit = True
        runner.join(patient(30))
        assert not runner.is_alive()


@pytest.fixture(scope="session")
def server(model: Transformer, loaded: LoadedModel) -> Iterator[Running]:
    with served(model, loaded, DoorRules("127.0.0.1")) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Running) -> openai.OpenAI:
    return server.client()


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Returns whether a condition becomes true in time."""
    deadline = threading.Event()
    for _ in range(int(patient(seconds) / 0.05)):
        if condition():
            return True
        deadline.wait(0.05)
    return condition()
