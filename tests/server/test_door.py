"""Who may come in: a web page, a stranger, a client that sends too much or goes away."""

import json
import socket
import time
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from dist_lm.errors import ConfigError
from dist_lm.server.command import KEEP_ALIVE_S
from dist_lm.server.door import DoorRules, refusal_of
from tests.patience import patient
from tests.server.conftest import Running, served, wait_for
from tests.server.test_clients import MESSAGES

LOCAL = DoorRules("127.0.0.1")
KEYED = DoorRules("0.0.0.0", key="secret")


@pytest.mark.parametrize(
    ("rules", "headers", "status"),
    [
        (LOCAL, {"host": "127.0.0.1:8000"}, None),
        (LOCAL, {"host": "localhost:8000", "origin": "http://localhost:8000"}, None),
        (LOCAL, {"host": "[::1]:8000"}, None),
        (LOCAL, {"host": "evil.example:8000"}, 403),  # a name that a page made point here
        (LOCAL, {"host": "127.0.0.1.evil.example"}, 403),
        (LOCAL, {"host": "evil.example@localhost"}, 403),
        (LOCAL, {"host": "localhost/@evil"}, 403),
        (LOCAL, {}, 403),
        (LOCAL, {"host": "localhost:8000", "origin": "https://evil.example"}, 403),
        (LOCAL, {"host": "localhost:8000", "origin": "null"}, 403),
        (LOCAL, {"host": "localhost:8000", "sec-fetch-site": "cross-site"}, 403),
        (DoorRules("127.0.0.1", origins=("https://ours.example",)),
         {"host": "localhost", "origin": "https://ours.example"}, None),
        (DoorRules("127.0.0.1", hosts=("box",)), {"host": "box:8000"}, None),
        (KEYED, {"host": "anything"}, 401),
        (KEYED, {"host": "anything", "authorization": "Bearer wrong"}, 401),
        (KEYED, {"host": "anything", "authorization": "secret"}, 401),
        (KEYED, {"host": "anything", "authorization": "Bearer secret"}, None),
        (KEYED, {"host": "anything", "authorization": "Bearer secret", "origin": "https://evil.example"}, 403),
    ],
    ids=str,
)  # fmt: skip
def test_headers_say_who_comes_in(rules: DoorRules, headers: dict[str, str], status: int | None):
    refusal = refusal_of(rules, "/v1/models", [(name.encode(), value.encode()) for name, value in headers.items()])
    assert (refusal and refusal[0]) == status


def test_another_address_than_loopback_needs_a_key():
    with pytest.raises(ConfigError, match="DIST_LM_API_KEY"):
        DoorRules("0.0.0.0")
    with pytest.raises(ConfigError):
        DoorRules("box.example")


def test_a_key_is_asked_for(model, loaded):
    with served(model, loaded, DoorRules("127.0.0.1", key="secret")) as running:
        assert [each.id for each in running.client("secret").models.list()] == ["small", "default"]
        with pytest.raises(openai.AuthenticationError):
            running.client("guess").models.list()
        assert httpx.get(f"{running.url}/health", timeout=patient(20)).json() == {"status": "ok"}
        assert httpx.get(f"{running.url}/metrics", timeout=patient(20)).status_code == 401


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"model": "small", "messages": NaN}',
        b'{"a": 1, "a": 2}',
        b"\xff\xfe",
        b'{"model": "\\u0000", "messages": 1}',
        b"[" * 100_000,
        b'{"max_tokens": ' + b"9" * 10_000 + b"}",
    ],
    ids=lambda content: repr(content[:30]),
)
def test_broken_json_is_one_refused_request(server: Running, content: bytes):
    url = f"{server.url}/v1/chat/completions"
    response = httpx.post(url, content=content, timeout=patient(20))
    assert 400 <= response.status_code < 500
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_long_bodies_are_not_read(server: Running):
    def endless():
        while True:
            yield b" " * 65536

    for content in (b" " * (2 << 20), endless()):
        try:
            response = httpx.post(f"{server.url}/v1/completions", content=content, timeout=patient(20))
            assert response.status_code == 413
        except httpx.TransportError:
            pass  # the server closed the connection while we were still sending
    assert wait_for(lambda: server.is_empty)


def test_the_server_keeps_a_connection_longer_than_the_client():
    """Finds a connection that the server closes in the moment in which a client uses it again."""
    client_s = httpx.Limits().keepalive_expiry
    assert client_s is not None
    assert client_s < KEEP_ALIVE_S


def test_a_client_that_goes_away_frees_its_pages(server: Running):
    """Finds a request that runs on for nobody; streamed and whole, before the first token and behind it."""
    address = urlsplit(server.url)
    for stream, seconds in ((True, 0.0), (False, 0.0), (True, 0.3), (False, 0.3)):
        body = json.dumps({"messages": MESSAGES, "max_tokens": 300, "n": 8, "stream": stream, "stop": ["never"]})
        with socket.create_connection((address.hostname, address.port)) as connection:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            time.sleep(seconds)
        assert wait_for(lambda: server.is_empty), (stream, seconds)


def test_more_requests_than_the_server_takes_are_told_to_come_back(model, loaded):
    with served(model, loaded, LOCAL, most_requests=1) as running:
        client = running.client()
        first = client.chat.completions.create(model="small", messages=MESSAGES, max_tokens=300, n=8, stream=True)
        next(iter(first))
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="small", messages=MESSAGES, max_tokens=1)
        assert caught.value.response.headers["retry-after"]
        first.close()
        assert wait_for(lambda: running.is_empty)
        assert client.chat.completions.create(model="small", messages=MESSAGES, max_tokens=1).choices


@pytest.mark.heavy
def test_a_stop_ends_what_runs_within_a_bound(model, loaded):
    """Finds a server that waits for its longest answer."""
    with served(model, loaded, LOCAL) as running:
        stream = running.client().chat.completions.create(
            model="small", messages=MESSAGES, max_tokens=300, n=8, stream=True
        )
        next(iter(stream))
        begin = time.monotonic()
    assert time.monotonic() - begin < patient(20)


def test_figures_are_there_for_prometheus(server: Running, client: openai.OpenAI):
    client.completions.create(model="small", prompt="a", max_tokens=2)
    lines = httpx.get(f"{server.url}/metrics", timeout=patient(20)).text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values['dist_lm_answers_total{model="small"}']) >= 1
    assert float(values['dist_lm_http_responses_total{path="/v1/completions",status="200"}']) >= 1
    assert float(values['dist_lm_first_token_seconds{model="small",quantile="0.5"}']) > 0
