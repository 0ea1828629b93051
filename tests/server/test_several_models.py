"""Several models in one server: each request gets the one that it names, and new weights come while requests run."""

import threading
from dataclasses import replace
from typing import Any

import openai
import pytest
import torch

from dist_lm.errors import ConfigError
from dist_lm.generation.load import LoadedModel
from dist_lm.generation.request import Request, SamplingParams
from dist_lm.generation.session import build_engine
from dist_lm.model.keyed_random import initialise
from dist_lm.model.transformer import Transformer
from dist_lm.server.door import DoorRules
from dist_lm.server.engine_thread import Done, EngineThread, Event
from dist_lm.server.serving import Serving
from tests.patience import patient
from tests.server.conftest import CACHE_TOKENS, served, served_model
from tests.server.test_clients import IDS, MESSAGES

LOCAL = DoorRules("127.0.0.1")


@pytest.fixture(scope="module")
def other(loaded: LoadedModel) -> LoadedModel:
    """A model of the same shape with other weights."""
    model = Transformer(loaded.config)
    initialise(model, seed=1)
    weights = dict(model.requires_grad_(requires_grad=False).named_parameters())
    return replace(loaded, name="other", weights=weights)


def test_each_request_gets_the_model_that_it_names(model: Transformer, loaded: LoadedModel, other: LoadedModel):
    """Finds one engine that answers for both, and a request without a name that gets either."""
    with served(model, loaded, LOCAL, others=[served_model(other, "other")]) as running:
        client = running.client()
        assert [each.id for each in client.models.list()] == ["small", "default", "other"]
        ids: dict[str, Any] = {}
        for name in ("small", "default", "other"):
            answer: Any = client.chat.completions.create(
                model=name, messages=MESSAGES, max_tokens=20, seed=1, extra_body=IDS
            )
            ids[name] = answer.choices[0].token_ids
        assert ids["small"] == ids["default"] != ids["other"]

        response = running.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2})
        assert response.status_code == 400
        assert "small, other" in response.json()["error"]["message"]
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="third", messages=MESSAGES, max_tokens=2)


def test_two_models_of_one_name_are_refused(loaded: LoadedModel):
    with pytest.raises(ConfigError, match="default"):
        Serving([served_model(loaded, "small", ("default",)), served_model(loaded, "default")], 8)


@pytest.mark.heavy
def test_new_weights_wait_for_what_runs(loaded: LoadedModel, other: LoadedModel):
    """Finds an answer that mixes two versions of the weights, or a request behind the new ones that gets the old."""
    thread = EngineThread(build_engine(loaded, torch.device("cpu"), 16, CACHE_TOKENS, version=7), queue_s=60)
    answers: dict[str, Any] = {}
    complete, loaded_event = threading.Event(), threading.Event()
    errors: list[str] = []

    def sink(event: Event) -> None:
        assert isinstance(event, Done)
        answers[event.answer.request] = event.answer
        if len(answers) == 3:
            complete.set()

    def has_loaded(error: str) -> None:
        errors.append(error)
        loaded_event.set()

    prompt = loaded.tokenizer.encode_prompt("def add(a, b):")
    params = SamplingParams(60, ignore_eot=True)
    thread.submit(Request("old", prompt, params, seed=3), sink, streams=False)
    thread.start()
    try:
        while not thread.figures.first_token_s:
            threading.Event().wait(0.001)
        thread.load_weights(other.weights, 9, has_loaded)
        thread.submit(Request("new", prompt, params, seed=3), sink, streams=False)
        assert loaded_event.wait(patient(30))
        thread.submit(Request("later", prompt, params, seed=3), sink, streams=False)
        assert complete.wait(patient(30))
    finally:
        thread.stop(patient(30))
    assert errors == [""]
    assert {name: answer.version for name, answer in answers.items()} == {"old": 7, "new": 9, "later": 9}

    for name, weights, version in (("old", loaded, 7), ("new", other, 9), ("later", other, 9)):
        engine = build_engine(weights, torch.device("cpu"), 16, CACHE_TOKENS, version=version)
        engine.submit(Request(name, prompt, params, seed=3))
        assert engine.run() == [answers[name]]


def test_weights_of_another_shape_leave_the_old_ones(loaded: LoadedModel):
    """Finds a checkpoint of another model that ends the engine."""
    thread = EngineThread(build_engine(loaded, torch.device("cpu"), 16, CACHE_TOKENS, version=7), queue_s=60)
    errors: list[str] = []
    has_tried = threading.Event()
    thread.start()
    try:
        thread.load_weights({}, 8, lambda error: (errors.append(error), has_tried.set())[0])
        assert has_tried.wait(patient(30))
    finally:
        thread.stop(patient(30))
    assert errors[0]
    assert thread.version == 7
    assert not thread.failure
