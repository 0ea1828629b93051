"""Requests that would harm others: each is refused by its field, and the server answers the next one."""

import time
from typing import Any

import pytest

from dist_lm.chat import json_text
from dist_lm.chat.layouts.turns import conversation_of
from dist_lm.chat.messages import ChatError, Message
from dist_lm.server.conversations import Conversations
from tests.patience import patient
from tests.server.conftest import Running, wait_for
from tests.server.test_clients import MESSAGES

HUGE = 10**400  # JSON has such integers, no float does


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", HUGE),
        ("temperature", 1e300),
        ("top_k", HUGE),
        ("top_p", 0),
        ("repetition_penalty", HUGE),
        ("repetition_penalty", 1e-300),
        ("logit_bias", {"5": HUGE}),
        ("logit_bias", {"5": 1e300}),
        ("logit_bias", {"9" * 5000: 1}),
        ("logit_bias", {str(token): 1 for token in range(2000)}),
        ("seed", HUGE),
        ("n", HUGE),
        ("max_tokens", HUGE),
        ("stop", ["a" * 100_000]),
        ("stop", {"a": 1}),
        ("stream_options", {"\u0000" * 200: 1}),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_one_request_does_not_end_the_engine_of_all(server: Running, field: str, value: Any):
    """Finds a number that torch cannot hold, and a text whose comparison takes forever: they reach the engine's
    thread, which all requests share."""
    body = {"messages": MESSAGES, "max_tokens": 2, field: value}
    response = server.post("/v1/chat/completions", body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field
    assert server.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize("temperature", [1e-320, 1e-46, 1e-6, 100])
def test_extreme_temperatures_are_answered(server: Running, temperature: float):
    body = {"messages": MESSAGES, "max_tokens": 2, "temperature": temperature}
    assert server.post("/v1/chat/completions", body).status_code == 200


def test_a_body_of_many_keys_is_read_in_linear_time():
    """Finds a search for the repeated key that compares all pairs."""
    text = "{" + ",".join(f'"k{number}": 0' for number in range(100_000)) + ', "x": 1, "x": 2}'
    begin = time.monotonic()
    with pytest.raises(ChatError, match="'x' is there twice"):
        json_text.read(text, "the body")
    assert time.monotonic() - begin < patient(10)


def test_what_is_remembered_for_one_key_is_not_for_another(server: Running):
    """Finds ids of one client's answers in the prompt of another client."""
    tokenizer = server.loaded.tokenizer
    conversations = Conversations(tokenizer)
    asked = conversation_of(MESSAGES, None, style="openai")
    ids = [*conversations.prompt(asked, "ours")[0], *(tokenizer.encode(letter)[0] for letter in "yes")]
    conversations.remember(asked, Message("assistant", "yes"), ids, "ours")

    turns = [*MESSAGES, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "Sure?"}]
    later = conversation_of(turns, None, style="openai")
    assert conversations.prompt(later, "ours")[1]
    assert conversations.prompt(later, "theirs")[1] == conversations.prompt(later)[1] == 0


def test_a_schema_that_is_too_much_work_fails_alone(server: Running):
    """Finds an error of the library in the middle of an answer that ends the engine for all."""
    branches = [{"type": "object", "properties": {f"k{number}": {"type": "string"}}} for number in range(300)]
    schema = {"name": "many", "schema": {"anyOf": branches}}
    body = {"messages": MESSAGES, "max_tokens": 40, "response_format": {"type": "json_schema", "json_schema": schema}}
    statuses = {server.post("/v1/chat/completions", body | {"seed": seed}).status_code for seed in range(6)}
    assert 400 in statuses
    assert statuses <= {200, 400}
    assert not server.serving.failure
    assert server.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2}).status_code == 200
    assert wait_for(lambda: server.is_empty)
