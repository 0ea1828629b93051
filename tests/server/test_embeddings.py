"""/v1/embeddings: the vectors are those of the model, in OpenAI's form, alone or beside other requests."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import pytest
import torch

from dist_lm.generation import likelihood
from dist_lm.generation.decoder import Decoder
from dist_lm.generation.embedding import POOLINGS, EmbeddingRequest, embeddings
from dist_lm.model.keyed_random import initialise
from dist_lm.model.transformer import Transformer
from dist_lm.prepare.compose import compose_config
from tests.conftest import TINY
from tests.server.conftest import Running, wait_for
from tests.server.test_clients import MESSAGES

TEXTS = ["Is it dry?", "def f(x):", "a", "A text that is longer than the others, so that rows have other lengths. " * 6]
SHAPES = {
    "neox": (),
    "window": ("model.norm=rmsnorm", "model.ffn=swiglu", "model.bias=false", "model.window=4"),
    "divided": ("model.logit_divisor=8",),
}


def by_hand(model: Transformer, ids: list[int], pooling: str) -> np.ndarray:
    """Returns the embedding from the hidden states of the whole sequence alone."""
    with torch.no_grad():
        states_TD = model.hidden(torch.tensor([ids]))[0].double()
    state_D = states_TD.mean(dim=0) if pooling == "mean" else states_TD[-1]
    return (state_D / state_D.norm()).numpy()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_vectors_are_those_of_the_model_in_any_pack(shape: str, pooling: Any, monkeypatch: pytest.MonkeyPatch):
    """Finds attention over the sequences of a pack, a missing final norm, and a mean over a neighbour's tokens."""
    model = Transformer(compose_config(["stage=code", *TINY, "model.init_std=0.2", *SHAPES[shape]]).model)
    initialise(model, seed=1)
    decoder = Decoder(model.config, 2, 64, torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        decoder.load(dict(model.named_parameters()))
    sequences = [[1, 5, 9, 9, 3], [2], [*range(10, 60)], [7, 7]]

    rows = []
    for most_tokens in (1, 8, 1024):
        monkeypatch.setitem(likelihood.PACKED_TOKENS, "cpu", most_tokens)
        request = EmbeddingRequest("e", sequences, pooling)
        rows.append(np.concatenate([*embeddings(decoder, request, torch.device("cpu"))]))
    assert (rows[0] == rows[1]).all()
    assert (rows[0] == rows[2]).all()
    expected = np.stack([by_hand(model, ids, pooling) for ids in sequences])
    assert np.abs(rows[0] - expected).max() < 1e-6


def test_the_client_of_openai_gets_the_vectors_of_the_model(server: Running, client: openai.OpenAI):
    """Finds another byte order in base64, another order of inputs, and counts that leave out a token."""
    tokenizer = server.loaded.tokenizer
    sequences = [tokenizer.encode_prompt(text) for text in TEXTS]
    expected = np.stack([by_hand(server.model, ids, "mean") for ids in sequences])

    asked: list[dict[str, Any]] = [{"input": TEXTS}, {"input": sequences}, {"input": TEXTS, "encoding_format": "float"}]
    for fields in asked:
        response = client.embeddings.create(model="small", **fields)
        assert [each.index for each in response.data] == [*range(len(TEXTS))]
        assert np.abs(np.array([each.embedding for each in response.data]) - expected).max() < 1e-6
        assert response.usage.prompt_tokens == response.usage.total_tokens == sum(map(len, sequences))

    last = client.embeddings.create(
        model="small", input=sequences[0], dimensions=server.loaded.config.d_model, extra_body={"pooling": "last"}
    )
    assert np.abs(np.array(last.data[0].embedding) - by_hand(server.model, sequences[0], "last")).max() < 1e-6


@pytest.mark.heavy
def test_vectors_beside_answers_are_the_same(server: Running, client: openai.OpenAI):
    """Finds a pass that touches the cache of answers, and requests for embeddings that stay behind."""

    def embed(number: int) -> list[float]:
        text = [TEXTS[number % len(TEXTS)], "filler " * 40][: 1 + number % 2]
        return client.embeddings.create(model="small", input=text).data[0].embedding

    def answer(number: int) -> str | None:
        response = client.chat.completions.create(
            model="small", messages=MESSAGES, max_tokens=40, seed=number % 3, temperature=1
        )
        return response.choices[0].message.content

    vectors, answers = [embed(number) for number in range(4)], [answer(number) for number in range(3)]
    with ThreadPoolExecutor(12) as pool:
        together = [(pool.submit(embed, number), pool.submit(answer, number)) for number in range(12)]
        for number, (vector, text) in enumerate(together):
            assert vector.result() == vectors[number % 4]
            assert text.result() == answers[number % 3]
    assert wait_for(lambda: server.is_empty)


def test_bad_requests_for_embeddings_are_refused_by_the_field(server: Running):
    for body, param in (
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [[-1]]}, "input"),
        ({"input": [1, "a"]}, "input"),
        ({"input": "word " * 4000}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "dimensions": 8}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "pooling": "max"}, "pooling"),
        ({"input": "a", "n": 2}, "n"),
    ):
        response = server.post("/v1/embeddings", body)
        assert response.status_code == 400, body
        assert response.json()["error"]["param"] == param, body
    assert server.post("/v1/embeddings", {"model": "other", "input": "a"}).status_code == 404
    assert wait_for(lambda: server.is_empty)
