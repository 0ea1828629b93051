"""The server at its limits: many clients, some of them hostile, many answers and long conversations.

DIST_LM_LOAD_SECONDS and DIST_LM_LOAD_CLIENTS reduce the load of 60 s and 200 clients, DIST_LM_CONVERSATIONS and
DIST_LM_ANSWERS the 10,000 conversations and 1,000 answers.
"""

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
import torch

from dist_lm.chat.template import stop_tokens
from dist_lm.generation.load import LoadedModel
from dist_lm.generation.request import Answer, Request, SamplingParams
from dist_lm.model.transformer import Transformer
from dist_lm.server.door import DoorRules
from tests.patience import patient
from tests.server.conftest import Running, served, wait_for
from tests.server.test_clients import IDS, MESSAGES, PERSON

pytestmark = [pytest.mark.bars, pytest.mark.heavy, pytest.mark.timeout(3600)]

SECONDS = float(os.environ.get("DIST_LM_LOAD_SECONDS", "60"))
CONVERSATIONS = int(os.environ.get("DIST_LM_CONVERSATIONS", "10000"))
CLIENTS = int(os.environ.get("DIST_LM_LOAD_CLIENTS", "200"))
HOSTILE = CLIENTS // 5
ANSWERS = int(os.environ.get("DIST_LM_ANSWERS", "1000"))
QUESTIONS = 20  # different ones of honest clients
FORMS = ("broken", "deep", "NUL", "n", "schema", "long", "gone", "slow")


def asked(number: int) -> dict[str, Any]:
    """Returns an honest request; those of one number have one answer."""
    body: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 12, "seed": number, **IDS}
    if number % 4 == 1:
        schema = {"name": "person", "schema": PERSON}
        body |= {"max_tokens": 60, "response_format": {"type": "json_schema", "json_schema": schema}}
    if number % 4 == 2:
        body |= {"n": 2, "temperature": 0.7, "top_p": 0.9}
    return body


def ids_of(response: httpx.Response) -> list[list[int]]:
    return [choice["token_ids"] for choice in response.json()["choices"]]


async def honest(
    client: httpx.AsyncClient, url: str, seed: int, until: float, expected: list[Any], seen: Counter[str]
) -> None:
    draw = random.Random(seed)
    while time.monotonic() < until:
        number = draw.randrange(QUESTIONS)
        response = await client.post(url, json=asked(number))
        seen[str(response.status_code)] += 1
        if response.status_code == 200:
            assert ids_of(response) == expected[number], number
        else:  # room is scarce, and nothing else is wrong
            assert response.status_code in (429, 503), response.text
            await asyncio.sleep(0.2)


async def hostile(client: httpx.AsyncClient, url: str, seed: int, until: float, seen: Counter[str]) -> None:
    draw = random.Random(seed)
    address = urlsplit(url)
    while time.monotonic() < until:
        form = draw.choice(FORMS)
        contents: dict[str, bytes] = {
            "broken": b'{"messages": [',
            "deep": b'{"messages": ' + b"[" * 50_000,
            "NUL": b'{"messages": "\x00", "\\u0000": "\\u0000"}',
            "n": json.dumps({"messages": MESSAGES, "n": 10**6}).encode(),
            "schema": json.dumps({"messages": MESSAGES, "max_tokens": 8, "response_format": _bomb(draw)}).encode(),
        }
        seen[form] += 1
        if form in contents:
            response = await client.post(url, content=contents[form])
            is_answered = form == "schema" and response.status_code == 200
            assert is_answered or 400 <= response.status_code < 500 or response.status_code == 503, form
        elif form == "long":
            response = await client.post(url, content=_long_body())
            assert response.status_code in (413, 429)
        else:  # a client that goes away in the middle, or that reads nothing for a while
            reader, writer = await asyncio.open_connection(address.hostname, address.port)
            body = json.dumps({"messages": MESSAGES, "max_tokens": 60, "n": 4, "stream": True}).encode()
            head = f"POST {address.path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            await writer.drain()
            await asyncio.sleep(draw.random() * (0.2 if form == "gone" else 2))
            writer.transport.abort()
            del reader


async def _long_body() -> AsyncIterator[bytes]:
    """Yields 100 MB, of which the server reads no more than its limit."""
    for _ in range(1600):
        yield b" " * (64 << 10)


def _bomb(draw: random.Random) -> Any:
    """Returns a schema with many branches, each time another one."""
    branches = [{"type": "object", "properties": {f"k{draw.random()}": {"type": "string"}}} for _ in range(300)]
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": {"anyOf": branches}}}


def test_many_clients_some_of_them_hostile(model: Transformer, loaded: LoadedModel, capsys: pytest.CaptureFixture[str]):
    """Finds a crash, pages that nobody frees, memory that grows, and honest answers that others change."""
    with served(model, loaded, DoorRules("127.0.0.1"), most_requests=256, queue_s=120) as running:
        expected = [ids_of(running.post("/v1/chat/completions", asked(number))) for number in range(QUESTIONS)]
        rss: list[int] = []
        seen: Counter[str] = Counter()

        async def load(seconds: float) -> None:
            limits = httpx.Limits(max_connections=None)
            url = f"{running.url}/v1/chat/completions"
            until = time.monotonic() + seconds
            async with httpx.AsyncClient(timeout=patient(200), limits=limits) as client:
                n_honest = CLIENTS - HOSTILE
                tasks = [honest(client, url, seed, until, expected, seen) for seed in range(n_honest)]
                tasks += [_hostile_until(client, url, seed, until, seen) for seed in range(HOSTILE)]
                await asyncio.gather(*tasks)

        # The first part fills caches, whose sizes are bounded.
        for part in (SECONDS / 2, SECONDS / 2):
            asyncio.run(load(part))
            assert not running.serving.failure
            assert wait_for(lambda: running.is_empty, 60), "pages or requests are left"
            rss.append(psutil.Process().memory_info().rss)
        text = running.post("/tokenize", {"prompt": "a"}).text
        assert "tokens" in text
        assert not running.serving.failure
        figures = running.serving.models[0].thread.figures
        with capsys.disabled():
            print(f"\n{CLIENTS} clients, {HOSTILE} hostile, {SECONDS:g} s: {dict(seen)}")
            print(f"memory {rss[0] >> 20} -> {rss[1] >> 20} MiB")
            for name, times in (("queue", figures.queue_s), ("first token", figures.first_token_s)):
                ordered = sorted(times)
                p50, p99 = (ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.99))
                print(f"{name}: p50 {p50:.3f} s, p99 {p99:.3f} s")
    assert seen["200"] > QUESTIONS
    assert rss[1] < rss[0] * 1.1 + (64 << 20)


async def _hostile_until(client: httpx.AsyncClient, url: str, seed: int, until: float, seen: Counter[str]) -> None:
    """Is hostile; a connection that the server closes in the middle is an answer to it."""
    while time.monotonic() < until:
        try:
            await hostile(client, url, seed, until, seen)
        except (httpx.TransportError, OSError):
            seen["closed"] += 1
        seed += 1000


def test_served_answers_are_those_of_engine_and_trainer(server: Running):
    """Finds log-probabilities that the trainer's model does not have, and ids that depend on what else runs."""
    tokenizer = server.loaded.tokenizer
    with ThreadPoolExecutor(32) as pool:
        bodies = [asked(number) for number in range(ANSWERS)]
        responses = list(pool.map(lambda body: server.post("/v1/chat/completions", body).json(), bodies))

    worst, n_alone = 0.0, 0
    for number, response in enumerate(responses):
        prompt = response["prompt_token_ids"]
        for choice in response["choices"]:
            row = torch.tensor([[*prompt, *choice["token_ids"]]])
            with torch.inference_mode():
                logits = server.model(row)[0, len(prompt) - 1 : -1].float()
            logprobs = logits.log_softmax(-1).gather(1, row[0, len(prompt) :, None])[:, 0]
            difference = (logprobs - torch.tensor(choice["raw_logprobs"])).abs().max().item()
            worst = max(worst, difference)
        if number % 4 == 0:
            offline = server.offline()
            params = SamplingParams(12, stop_tokens=stop_tokens(tokenizer))
            offline.submit(Request("alone", prompt, params, number))
            (answer,) = offline.run()
            assert isinstance(answer, Answer)
            assert response["choices"][0]["token_ids"] == list(answer.tokens)
            n_alone += 1
    print(
        f"{ANSWERS} answers: largest difference of a log-probability {worst:.1e}; {n_alone} equal the offline engine's"
    )
    assert worst < 1e-5


def test_conversations_go_on_by_ids(server: Running):
    """Finds an answer that is tokenized twice: the prompt of each turn begins with all ids before it."""

    def talk(number: int) -> int:
        messages: list[Any] = [{"role": "user", "content": f"Question {number}"}]
        before: list[int] = []
        with httpx.Client(timeout=patient(120)) as client:
            for turn in range(3):
                # An untrained model writes bytes that are no text, which no message holds: so its letters are chosen.
                body = {"messages": messages, "max_tokens": 12, "seed": number * 10 + turn, **IDS}
                body["constraint"] = {"regex": "[a-z ]{4,9}"}
                response = client.post(f"{server.url}/v1/chat/completions", json=body).json()
                prompt = response["prompt_token_ids"]
                assert prompt[: len(before)] == before, (number, turn)
                assert response["remembered_tokens"] >= len(before)

                (choice,) = response["choices"]
                tokens = choice["token_ids"]
                before = [*prompt, *(tokens[:-1] if tokens[-1] == server.loaded.tokenizer.eot_id else tokens)]
                text = choice["message"]["content"]
                messages = [*messages, {"role": "assistant", "content": text}, {"role": "user", "content": f"{turn}?"}]
        return len(messages) // 2

    with ThreadPoolExecutor(16) as pool:
        turns = sum(pool.map(talk, range(CONVERSATIONS)))
    print(f"{CONVERSATIONS} conversations, {turns} turns")
    assert turns == 3 * CONVERSATIONS
