"""A server over the actors of a pool: the answers are those of one engine, whatever dies under load."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import httpx
import openai
import pytest
import torch

from dist_lm.cluster.allocation import Site
from dist_lm.cluster.ray_cluster import RayCluster, connect
from dist_lm.config.cluster import ClusterConfig
from dist_lm.generation.grammar import Grammars
from dist_lm.generation.load import LoadedModel
from dist_lm.generation.session import cache_options
from dist_lm.model.keyed_random import initialise
from dist_lm.model.size import parameter_shapes
from dist_lm.model.transformer import Transformer
from dist_lm.server.door import DoorRules
from dist_lm.server.pool_thread import LOST, PoolThread
from dist_lm.server.served import Served
from dist_lm.server.serving import ServedModel
from dist_lm.server.serving_pool import ServingPool, ServingSpec
from tests.patience import patient
from tests.server.conftest import CACHE_TOKENS, CONTEXT, LIMITS, Running, served, served_model, wait_for
from tests.server.test_clients import IDS, MESSAGES

pytestmark = [pytest.mark.cluster, pytest.mark.heavy]

LOCAL = DoorRules("127.0.0.1")
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


@dataclass(frozen=True)
class Pooled:
    """A server with the model `pooled` on two actors, beside `small` in this process."""

    running: Running
    pool: ServingPool
    thread: PoolThread

    def kill(self, number: int) -> None:
        """Kills one of the actors, once it is up, and waits until it is missed."""
        assert wait_for(lambda: number in self.pool.serving, 120)
        pid = self.pool.serving[number].pid
        os.kill(pid, signal.SIGKILL)
        assert wait_for(lambda: number not in self.pool.serving or self.pool.serving[number].pid != pid, 120)


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with connect(ClusterConfig(name="local", connect_timeout_s=patient(30))) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def other(loaded: LoadedModel) -> LoadedModel:
    """Later weights of the model."""
    model = Transformer(loaded.config)
    initialise(model, seed=1)
    weights = dict(model.requires_grad_(requires_grad=False).named_parameters())
    return replace(loaded, name="other", weights=weights)


@pytest.fixture(scope="module")
def pooled(cluster: RayCluster, model: Transformer, loaded: LoadedModel, other: LoadedModel) -> Iterator[Pooled]:
    spec = ServingSpec(
        model=loaded.config,
        options=replace(cache_options(loaded.config, 16, CACHE_TOKENS, 256), page_tokens=0),
        eot_id=loaded.tokenizer.eot_id,
        vocabulary=tuple(loaded.tokenizer.vocabulary()),
        tokenizer_file=loaded.tokenizer.file_content,
    )
    weights = ((name, loaded.weights[name]) for name in parameter_shapes(loaded.config))
    pool = ServingPool.start(cluster, spec, weights, version=7, actors=2, site=Site(among_others=True))
    thread = PoolThread(pool, spec)
    about = Served("pooled", loaded.tokenizer, CONTEXT, limits=LIMITS, embedding_width=loaded.config.d_model)
    on_pool = ServedModel(about, thread, Grammars(lambda: loaded.tokenizer, untrusted=True))
    try:
        with served(model, loaded, LOCAL, others=[on_pool, served_model(other, "other")]) as running:
            yield Pooled(running, pool, thread)
    finally:
        thread.close()


def body_of(number: int, name: str) -> dict[str, Any]:
    """Returns one of many different requests: with and without streams, several answers, schemas, long prompts."""
    system = [{"role": "system", "content": f"The same words, again and again. {number % 3} " * 20}]
    body = {"model": name, "messages": [*system, *MESSAGES], "seed": number, "temperature": 1, **IDS}
    if number % 4 == 0:
        body |= {"n": 3}
    if number % 4 == 1:
        schema = {"name": "a", "strict": True, "schema": SCHEMA}
        body |= {"response_format": {"type": "json_schema", "json_schema": schema}}
    if number % 4 == 2:
        body |= {"logprobs": True, "top_logprobs": 2}
    return body | {"max_tokens": 20 + number % 50}


def ask(running: Running, number: int, name: str) -> tuple[Any, int]:
    """Returns (all that the choices say, version of the weights)."""
    response = running.post("/v1/chat/completions", body_of(number, name))
    assert response.status_code == 200, response.text
    value = response.json()
    return value["choices"], value["weights_version"]


def ids_in(choices: Any) -> list[tuple[int, int]]:
    return [(choice["index"], token) for choice in choices for token in choice["token_ids"]]


def stream_of(running: Running, number: int, name: str) -> tuple[list[tuple[int, int]], str]:
    """Returns (index, id) of all streamed tokens, and the message of the error that ended the stream, if one did."""
    client = running.client()
    body = body_of(number, name)
    extra = {"return_token_ids": body.pop("return_token_ids")}
    ids: list[tuple[int, int]] = []
    try:
        for chunk in client.chat.completions.create(**body, stream=True, extra_body=extra):
            for choice in chunk.choices:
                ids += [(choice.index, token) for token in getattr(choice, "token_ids", None) or []]
    except openai.APIError as error:
        return sorted(ids, key=lambda pair: pair[0]), str(error)
    return sorted(ids, key=lambda pair: pair[0]), ""


def test_a_pool_answers_as_one_engine_does(pooled: Pooled):
    """Finds an actor with other sampling, other grammars or no log-probabilities, lost or repeated tokens of streams,
    and a request that stays behind."""
    running = pooled.running
    with ThreadPoolExecutor(16) as threads:
        by_pool = list(threads.map(lambda number: ask(running, number, "pooled"), range(24)))
        streams = list(threads.map(lambda number: stream_of(running, number, "pooled"), range(24)))
    for number in range(24):
        expected = ask(running, number, "small")
        assert by_pool[number] == expected
        assert streams[number] == (ids_in(expected[0]), "")

    vectors = [running.post("/v1/embeddings", {"model": name, "input": ["a", "b c"]}) for name in ("pooled", "small")]
    assert vectors[0].json()["data"] == vectors[1].json()["data"]
    assert wait_for(lambda: running.is_empty)


def test_equal_beginnings_go_to_one_actor_and_are_read_once(pooled: Pooled):
    """Finds a pool that spreads a conversation, so that each actor reads it anew."""
    running = pooled.running
    prompt = [*range(10, 60)] * 6
    cached = []
    for _ in range(3):
        response = running.post("/v1/completions", {"model": "pooled", "prompt": prompt, "max_tokens": 8, **IDS}).json()
        cached.append(response["usage"]["prompt_tokens_details"]["cached_tokens"])
        prompt = [*prompt, *response["choices"][0]["token_ids"], 7, 8, 9]
    assert cached[0] == 0
    assert min(cached[1:]) >= 256


def test_a_client_that_goes_away_frees_its_place(pooled: Pooled):
    """Finds a cancelled request that an actor goes on with."""
    running = pooled.running
    body = {"model": "pooled", "prompt": "a", "max_tokens": 300, "n": 8, "stream": True, "logit_bias": {"0": -100}}
    with httpx.stream("POST", f"{running.url}/v1/completions", json=body, timeout=patient(60)) as response:
        next(response.iter_lines())
    assert wait_for(lambda: running.is_empty)


@pytest.mark.parametrize("n_kills", [2, pytest.param(10, marks=pytest.mark.bars)])
def test_every_answer_is_right_while_actors_are_killed(pooled: Pooled, n_kills: int):
    """Finds answers of a dead actor that are lost, repeated or mixed, and streams that end without an error."""
    running = pooled.running
    numbers = range(40)
    expected = [ask(running, number, "small")[0] for number in numbers]
    is_over = threading.Event()
    n_answers, n_broken = [0], [0]

    def load(client: int) -> None:
        number = client
        while not is_over.is_set():
            number = (number + 7) % len(numbers)
            if client % 2:
                assert ask(running, number, "pooled")[0] == expected[number]
            else:
                ids, error = stream_of(running, number, "pooled")
                assert (ids == ids_in(expected[number])) != bool(error), error
                if error:
                    assert LOST in error
                    assert {*ids} <= {*ids_in(expected[number])}
                n_broken[0] += bool(error)
            n_answers[0] += 1

    with ThreadPoolExecutor(12) as threads:
        clients = [threads.submit(load, client) for client in range(12)]
        try:
            for kill in range(n_kills):
                n_before = n_answers[0]
                assert wait_for(lambda n_before=n_before: n_answers[0] >= n_before + 12, 120)
                pooled.kill([*pooled.pool.serving][kill % max(1, len(pooled.pool.serving))])
        finally:
            is_over.set()
        for each in clients:
            each.result()
    print(f"{n_kills} kills, {n_answers[0]} answers, {n_broken[0]} streams that had begun")
    assert n_broken[0] < n_answers[0]
    assert wait_for(lambda: running.is_empty, 60)


def test_new_weights_come_actor_by_actor_and_answers_are_of_one_version(
    pooled: Pooled, other: LoadedModel
):  # the last test: the pool keeps them
    """Finds answers of two versions of the weights, and a pool that stops while weights are loaded."""
    running = pooled.running
    numbers = range(16)
    expected = {
        version: [ask(running, number, name)[0] for number in numbers] for version, name in ((7, "small"), (8, "other"))
    }
    errors: list[str] = []
    has_loaded = threading.Event()

    def loaded(error: str) -> None:
        errors.append(error)
        has_loaded.set()

    def load(client: int) -> set[int]:
        versions: set[int] = set()
        while not has_loaded.is_set():
            number = (client + 5 * len(versions)) % len(numbers)
            choices, version = ask(running, number, "pooled")
            assert choices == expected[version][number]
            versions.add(version)
        return versions

    with ThreadPoolExecutor(6) as threads:
        clients = [threads.submit(load, client) for client in range(6)]
        time.sleep(0.2)
        pooled.thread.load_weights(other.weights, 8, loaded)
        assert has_loaded.wait(patient(120))
        versions = set.union(*(each.result() for each in clients))
    assert errors == [""]
    assert versions == {7, 8}
    assert ask(running, 0, "pooled") == (expected[8][0], 8)

    pooled.thread.load_weights({"embedding.weight": torch.zeros(1)}, 9, loaded)
    assert wait_for(lambda: len(errors) == 2)
    assert "embedding.weight" in errors[1]
    assert pooled.thread.version == 8
