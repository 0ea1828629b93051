"""What editors send with the configurations of docs/editors.md: each request is taken as it is."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from dist_lm.data.infill import InfillMarks
from dist_lm.server.requests import job_of
from dist_lm.server.served import Served
from tests.patience import patient
from tests.server.conftest import CONTEXT, Running, wait_for

PAGE = (Path(__file__).parents[2] / "docs" / "editors.md").read_text()
BEFORE, AFTER = "def add(a, b):\n    ", "\n\nprint(add(1, 2))\n"


def block(language: str) -> str:
    """Returns the first block of a language on the page."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)[0]


def events(response: httpx.Response) -> list[Any]:
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.heavy
def test_llama_vscode_edits_and_talks(server: Running):
    """Its /infill is in test_infill_requests.py; these are its edit and chat requests."""
    settings = json.loads(block("json"))
    assert settings["llama-vscode.endpoint"] == settings["llama-vscode.endpoint_chat"]
    messages = [{"role": "system", "content": "You are an expert coder."}, {"role": "user", "content": "Say a."}]
    edit: dict[str, Any] = {
        "messages": messages, "stream": False, "cache_prompt": True, "samplers": "edkypmxt", "temperature": 0.8,
        "dynatemp_range": 0, "dynatemp_exponent": 1, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "typical_p": 1,
        "xtc_probability": 0, "xtc_threshold": 0.1, "repeat_last_n": 64, "repeat_penalty": 1, "presence_penalty": 0,
        "frequency_penalty": 0, "dry_multiplier": 0, "dry_base": 1.75, "dry_allowed_length": 2,
        "dry_penalty_last_n": -1, "max_tokens": -1, "timings_per_token": False,
    }  # fmt: skip
    talk = {"messages": messages, "stream": False, "temperature": 0.8, "model": "default"}
    for body in (edit, talk):
        response = server.post("/v1/chat/completions", body)
        assert response.status_code == 200, response.text
        assert isinstance(response.json()["choices"][0]["message"]["content"], str)
    # What would change the answer, and does not here, is refused.
    assert server.post("/v1/chat/completions", edit | {"dry_multiplier": 0.8}).status_code == 400


def test_continue_completes_with_the_marks_of_its_template(server: Running):
    """Finds marks that stay text, so that the model never sees a middle, and lists of stops that are refused."""
    completing = yaml.safe_load(block("yaml"))["models"][1]
    assert completing["useLegacyCompletionsEndpoint"]
    template = completing["promptTemplates"]["autocomplete"]
    prompt = template.replace("{{{prefix}}}", BEFORE).replace("{{{suffix}}}", AFTER)
    stops = [
        *("<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|repo_name|>", "<|file_sep|>"),
        *("/src/", "#- coding: utf-8", "```", "\ndef", "\nclass", '\n"""#'),
    ]
    body = {
        "model": "default", "prompt": prompt, "max_tokens": 64, "temperature": 0.01, "stop": stops, "stream": True,
        "frequency_penalty": 0, "presence_penalty": 0,
    }  # fmt: skip
    assert events(server.post("/v1/completions", body))

    about = Served("small", server.loaded.tokenizer, CONTEXT)
    (request,) = job_of("completions", body, about).requests
    assert {*InfillMarks.of(about.tokenizer)} <= {*request.prompt}
    (by_suffix,) = job_of("completions", {"prompt": BEFORE, "suffix": AFTER}, about).requests
    assert request.prompt == by_suffix.prompt


@pytest.mark.parametrize(
    "text",
    ["<|fim_prefix|>a<|fim_suffix|>b", "a<|fim_prefix|>b<|fim_suffix|>c<|fim_middle|>",
     "<|fim_prefix|>a<|fim_suffix|>'<|fim_suffix|>'<|fim_middle|>", "<|fim_prefix|>a<|fim_middle|>"],
)  # fmt: skip
def test_a_text_that_spells_a_mark_stays_text(server: Running, text: str):
    about = Served("small", server.loaded.tokenizer, CONTEXT)
    (request,) = job_of("completions", {"prompt": text}, about).requests
    assert not {*InfillMarks.of(about.tokenizer)} & {*request.prompt}


def test_aider_talks_in_streams(server: Running):
    """litellm's requests, with and without a count of tokens."""
    headers = {"Authorization": "Bearer none"}
    body: dict[str, Any] = {
        "model": "default", "messages": [{"role": "system", "content": "Act as an expert."},
        {"role": "user", "content": "Say a."}], "temperature": 0, "stream": True, "max_tokens": 24,
    }  # fmt: skip
    for extra in ({}, {"stream_options": {"include_usage": True}}):
        url = f"{server.url}/v1/chat/completions"
        chunks = events(httpx.post(url, json=body | extra, headers=headers, timeout=patient(60)))
        assert bool(chunks[-1].get("usage")) == bool(extra)
    assert wait_for(lambda: server.is_empty)
