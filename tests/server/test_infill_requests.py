"""/infill: the requests of llama.vscode, and prompts that fit the context."""

from typing import Any

import httpx
import pytest

from dist_lm.data.infill import InfillMarks
from dist_lm.server.infill import SNIPPET, infill_job
from dist_lm.server.served import Served, ServeLimits
from tests.server.conftest import CONTEXT, Running, wait_for

# What llama.vscode sends: `createRequestPayload` in its src/llama-server.ts.
COMPLETION: dict[str, Any] = {
    "input_prefix": "def add(a, b):\n", "input_suffix": "\n\nprint(add(1, 2))\n", "prompt": "    return ",
    "input_extra": [{"text": "import os\n", "time": 1, "filename": "tools.py"}], "n_predict": 16, "top_k": 40,
    "top_p": 0.99, "stream": False, "samplers": ["top_k", "top_p", "infill"], "cache_prompt": True, "n_indent": 4,
    "t_max_prompt_ms": 500, "t_max_predict_ms": 1000,
}  # fmt: skip
WARM_UP: dict[str, Any] = {
    "input_prefix": "", "input_suffix": "", "input_extra": [{"text": "import os\n", "filename": "tools.py"}],
    "prompt": "", "n_predict": 0, "samplers": [], "cache_prompt": True, "t_max_prompt_ms": 500, "t_max_predict_ms": 1,
}  # fmt: skip


def test_an_editor_gets_the_text_between(server: Running):
    """Finds fields of the extension that the server refuses, and those of its answer that are missing."""
    answer = server.post("/infill", COMPLETION | {"seed": 1}).json()
    assert answer["stop"] is True
    assert isinstance(answer["content"], str)
    assert 1 <= answer["tokens_predicted"] <= 16
    assert server.post("/infill", WARM_UP).json()["content"] == ""

    lines = server.post("/infill", COMPLETION | {"seed": 1, "stream": True}).text.split("\n\n")
    events = [httpx.Response(200, text=line.removeprefix("data: ")).json() for line in lines if line]
    assert "".join(event["content"] for event in events) == answer["content"]
    assert [event["stop"] for event in events] == [*[False] * (len(events) - 1), True]
    assert wait_for(lambda: server.is_empty)


def test_the_prompt_is_that_of_training(server: Running):
    tokenizer = server.loaded.tokenizer
    about = Served("small", tokenizer, CONTEXT)
    (request,) = infill_job(COMPLETION, about, "").requests
    prefix, suffix, middle = InfillMarks.of(tokenizer)
    encode = tokenizer.encode
    assert request.prompt == [
        tokenizer.eot_id, *encode(f"{SNIPPET}tools.py\nimport os\n"), prefix, *encode(COMPLETION["input_prefix"]),
        suffix, *encode(COMPLETION["input_suffix"]), middle, *encode("    return "),
    ]  # fmt: skip


@pytest.mark.parametrize("long", [("input_prefix",), ("input_suffix",), ("input_prefix", "input_suffix", "extra")])
def test_long_files_keep_what_is_near_the_cursor(server: Running, long: tuple[str, ...]):
    """Finds a prompt that fills the context, so that an editor gets an error in every long file."""
    tokenizer = server.loaded.tokenizer
    text = "".join(f"value_{number} = {number}\n" for number in range(400))
    body = COMPLETION | {key: text for key in long if key != "extra"}
    if "extra" in long:
        body["input_extra"] = [{"text": text, "filename": f"{number}.py"} for number in range(8)]
    (request,) = infill_job(body, Served("small", tokenizer, CONTEXT), "").requests
    assert len(request.prompt) + 16 <= CONTEXT

    prefix, suffix, middle = (request.prompt.index(mark) for mark in InfillMarks.of(tokenizer))
    before = tokenizer.content(request.prompt[prefix + 1 : suffix]).decode()
    after = tokenizer.content(request.prompt[suffix + 1 : middle]).decode()
    assert body["input_prefix"].endswith(before)
    assert body["input_suffix"].startswith(after)
    assert before
    assert after


@pytest.mark.parametrize(
    ("field", "value"),
    [("input_prefix", 3), ("input_extra", [{"text": 1}]), ("input_extra", [{"text": ""}] * 65), ("n_predict", 10**9),
     ("n_probs", 3), ("return_token_ids", True)],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_other_forms_are_refused(server: Running, field: str, value: Any):
    """Finds a field that is taken although the answer cannot have what it asks for."""
    response = server.post("/infill", COMPLETION | {field: value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field


def test_a_request_may_leave_length_and_seed_to_the_server(server: Running):
    """Finds a default length that the server's own limit refuses, and llama.cpp's -1 as one fixed seed."""
    limits = ServeLimits(max_tokens=100, default_tokens=200)
    about = Served("small", server.loaded.tokenizer, CONTEXT, limits=limits)
    texts = {"input_prefix": "def f():\n", "input_suffix": "", "n_probs": 0}
    for length in ({}, {"n_predict": -1}):
        (request,) = infill_job(texts | length, about, "").requests
        assert request.params.max_new_tokens == 100
    seeds = {infill_job(texts | {"seed": -1}, about, "").requests[0].seed for _ in range(4)}
    assert len(seeds) == 4
