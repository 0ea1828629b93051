"""The official client of OpenAI, unmodified: what it gets is what the engine computes."""

import json
from typing import Any

import httpx
import jsonschema
import openai
import pytest
import torch

from dist_lm.chat.layouts.turns import conversation_of
from dist_lm.chat.template import prompt, stop_tokens
from dist_lm.generation.request import Answer, Request, SamplingParams
from dist_lm.server.answers import logprobs_value
from tests.patience import patient
from tests.server.conftest import Running

MESSAGES: list[Any] = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Is it dry in Oslo?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a day.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
IDS = {"return_token_ids": True}


def test_a_chat_is_answered_with_usage(client: openai.OpenAI):
    answer = client.chat.completions.create(model="small", messages=MESSAGES, max_tokens=12, seed=1)
    assert answer.object == "chat.completion"
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage
    assert 1 <= answer.usage.completion_tokens <= 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    again = client.chat.completions.create(model="default", messages=MESSAGES, max_completion_tokens=12, seed=1)
    assert again.choices[0].message.content == choice.message.content


@pytest.mark.heavy
def test_ids_equal_the_offline_engines_alone_and_among_others(server: Running, client: openai.OpenAI):
    """Finds another prompt, other parameters, or an answer that depends on its batch; log-probabilities are those of
    the model that trains."""
    tokenizer = server.loaded.tokenizer
    ids = prompt(conversation_of(MESSAGES, None, style="openai"), tokenizer)
    params = SamplingParams(40, 0.9, top_k=20, top_p=0.95, stop_tokens=stop_tokens(tokenizer), logit_bias={9: 1.5})
    offline = server.offline()
    expected = {}
    for seed in range(32):
        offline.submit(Request(str(seed), ids, params, seed))
    for result in offline.run():
        assert isinstance(result, Answer)
        expected[int(result.request)] = result

    def ask(seed: int) -> Any:
        extra = {"top_k": 20, "logit_bias": {"9": 1.5}, **IDS}
        return client.chat.completions.create(
            model="small", messages=MESSAGES, max_tokens=40, temperature=0.9, top_p=0.95, seed=seed,
            extra_body=extra,
        )  # fmt: skip

    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(ask, range(32)))
    answers = [*enumerate(together), (3, ask(3))]
    for seed, answer in answers:
        (choice,) = answer.choices
        assert answer.prompt_token_ids == ids
        assert answer.weights_version == 7
        assert choice.token_ids == list(expected[seed].tokens)
        assert choice.sampling_logprobs == list(expected[seed].logprobs)
        assert choice.message.content == expected[seed].text

        row = torch.tensor([[*ids, *choice.token_ids]])
        logits = server.model(row)[0, len(ids) - 1 : -1].float()
        logprobs = logits.log_softmax(-1).gather(1, row[0, len(ids) :, None])[:, 0]
        assert choice.raw_logprobs == pytest.approx(logprobs.tolist(), abs=1e-5)


def test_a_stream_has_the_tokens_of_the_whole_answer(client: openai.OpenAI):
    given: Any = {"model": "small", "messages": MESSAGES, "max_tokens": 30, "seed": 5, "n": 3, "logprobs": True}
    whole = client.chat.completions.create(**given, extra_body=IDS)
    texts, ids, finishes, logprobs = ({n: [] for n in range(3)} for _ in range(4))
    usage = None
    options: Any = {"include_usage": True}
    chunks: Any = client.chat.completions.create(**given, stream=True, stream_options=options, extra_body=IDS)
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index].append(choice.delta.content or "")
            ids[choice.index] += getattr(choice, "token_ids", None) or []
            finishes[choice.index] += [choice.finish_reason] if choice.finish_reason else []
            logprobs[choice.index] += [entry.logprob for entry in choice.logprobs.content] if choice.logprobs else []
    assert usage
    assert whole.usage
    # What was cached of the prompt is the only difference.
    assert usage.model_dump(exclude={"prompt_tokens_details"}) == whole.usage.model_dump(
        exclude={"prompt_tokens_details"}
    )
    for choice in whole.choices:
        assert "".join(texts[choice.index]) == choice.message.content
        assert ids[choice.index] == choice.token_ids
        assert finishes[choice.index] == [choice.finish_reason]
        assert choice.logprobs
        assert logprobs[choice.index] == [entry.logprob for entry in choice.logprobs.content] == choice.raw_logprobs


def test_top_logprobs_are_the_models_most_likely_tokens(client: openai.OpenAI, server: Running):
    """Finds alternatives after temperature or filters, in another order, or of another place; streamed ones too."""
    given: Any = {
        "model": "small", "messages": MESSAGES, "max_tokens": 8, "seed": 2, "temperature": 0.5, "logprobs": True,
        "top_logprobs": 4,
    }  # fmt: skip
    answer: Any = client.chat.completions.create(**given, extra_body={**IDS, "top_k": 3})
    (choice,) = answer.choices
    row = torch.tensor([[*answer.prompt_token_ids, *choice.token_ids]])
    logits = server.model(row)[0, len(answer.prompt_token_ids) - 1 : -1].float()
    expected = logits.log_softmax(-1).topk(4)
    tokenizer = server.loaded.tokenizer
    for place, entry in enumerate(choice.logprobs.content):
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(expected.values[place].tolist(), abs=1e-5)
        contents = [[*tokenizer.content([token])] for token in expected.indices[place].tolist()]
        assert [top.bytes for top in entry.top_logprobs] == contents

    streamed = []
    chunks: Any = client.chat.completions.create(**given, stream=True, extra_body={"top_k": 3})
    for chunk in chunks:
        streamed += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    assert streamed == choice.logprobs.content
    text = client.completions.create(model="small", prompt=[5, 6], max_tokens=3, logprobs=2).choices[0]
    assert text.logprobs
    # By text, as OpenAI has it: two tokens with one text are one.
    alternatives = text.logprobs.top_logprobs or []
    assert len(alternatives) == len(text.logprobs.tokens or [])
    assert all(1 <= len(by_text) <= 2 for by_text in alternatives)


def test_of_two_tokens_with_one_text_the_likelier_is_told(server: Running):
    """Finds an alternative of /v1/completions whose probability is that of a rarer token."""
    tokenizer = server.loaded.tokenizer
    bytes_of = ((token, tokenizer.content([token])) for token in range(tokenizer.vocab_size))
    # Bytes that are no character of their own.
    first, second, *_ = [token for token, content in bytes_of if content.decode(errors="replace") == "\ufffd"]
    top = (((first, -0.5), (5, -1.0), (second, -2.0)),)
    value = logprobs_value("completions", [first], [-0.5], top, tokenizer)
    assert value["top_logprobs"][0]["\ufffd"] == -0.5


@pytest.mark.heavy
def test_penalties_are_those_of_the_engine(client: openai.OpenAI, server: Running):
    """Finds a penalty that is accepted and does nothing, or another one in its place."""
    ids = [5, 6, 7]
    often = {10: 12.0, 11: 12.5, 12: 13.0, 13: 11.0}  # so that tokens come again
    biases: Any = {str(token): bias for token, bias in often.items()}
    drawn = {}
    for presence, frequency in ((0.0, 0.0), (1.5, 0.0), (0.0, 1.5)):
        params = SamplingParams(40, 1.0, presence_penalty=presence, frequency_penalty=frequency, logit_bias=often)
        offline = server.offline()
        offline.submit(Request("1", ids, params, seed=3))
        (expected,) = offline.run()
        assert isinstance(expected, Answer)
        answer: Any = client.completions.create(
            model="small", prompt=ids, max_tokens=40, temperature=1, seed=3, presence_penalty=presence,
            frequency_penalty=frequency, logit_bias=biases, extra_body=IDS,
        )  # fmt: skip
        assert answer.choices[0].token_ids == [*expected.tokens]
        drawn[presence, frequency] = expected.tokens
    assert len({*drawn.values()}) == 3


def test_the_next_turn_says_what_was_cached_of_its_prompt(client: openai.OpenAI, server: Running):
    """Finds usage that counts nothing, or prompts of one request that are counted once for each answer."""
    messages = [MESSAGES[0], {"role": "user", "content": "a b c d " * 20}]
    given: Any = {"model": "small", "max_tokens": 4, "seed": 5, "n": 2}
    first = client.chat.completions.create(**given, messages=messages).usage
    assert first
    assert first.prompt_tokens_details
    longer = [*messages, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "Why?"}]
    second = client.chat.completions.create(**given, messages=longer).usage
    assert second
    assert second.prompt_tokens_details
    cached = second.prompt_tokens_details.cached_tokens
    assert cached
    assert first.prompt_tokens - 32 < cached <= first.prompt_tokens

    *_, last = client.chat.completions.create(
        **given, messages=longer, stream=True, stream_options={"include_usage": True}
    )
    assert last.usage
    assert last.usage.prompt_tokens_details
    assert second.prompt_tokens - 32 <= (last.usage.prompt_tokens_details.cached_tokens or 0) < second.prompt_tokens
    assert "dist_lm_prefix_reused_tokens_total" in httpx.get(f"{server.url}/metrics", timeout=patient(20)).text


@pytest.mark.parametrize("tool_choice", ["auto", "required", {"type": "function", "function": {"name": "clock"}}])
def test_calls_fit_their_tools_and_stream_as_they_are(client: openai.OpenAI, server: Running, tool_choice: Any):
    bias = {str(server.loaded.tokenizer.mark_id("<tool_call>")): 7.0, str(stop_tokens(server.loaded.tokenizer)[0]): 2.0}
    n_calls = 0
    for seed in range(4):
        given: Any = {
            "model": "small", "messages": MESSAGES, "tools": [WEATHER, CLOCK], "tool_choice": tool_choice,
            "max_tokens": 120, "seed": seed, "logit_bias": bias,
        }  # fmt: skip
        (choice,) = client.chat.completions.create(**given).choices
        calls = choice.message.tool_calls or []
        n_calls += len(calls)
        for call in calls:
            tool = {"weather": WEATHER, "clock": CLOCK}[call.function.name]
            jsonschema.validate(json.loads(call.function.arguments), tool["function"]["parameters"])
        if choice.finish_reason != "length":
            assert bool(calls) == (choice.finish_reason == "tool_calls")
            assert calls or tool_choice == "auto"

        text, streamed = "", []
        for chunk in client.chat.completions.create(**given, stream=True):
            (part,) = chunk.choices
            text += part.delta.content or ""
            streamed += part.delta.tool_calls or []
        assert text == (choice.message.content or "")
        assert [call.function.arguments for call in streamed] == [call.function.arguments for call in calls]
        assert [call.index for call in streamed] == [*range(len(calls))]
    assert n_calls


def test_a_conversation_goes_on_by_ids_until_a_message_is_edited(client: openai.OpenAI, server: Running):
    """Finds an answer that is encoded again, into other tokens than the model wrote."""
    tokenizer = server.loaded.tokenizer
    extra = {**IDS, "constraint": {"regex": "[a-z ]{10,20}"}}
    messages = list(MESSAGES)
    before: list[int] = []
    plain: list[int] = []
    for turn in range(6):
        given: Any = {"model": "small", "messages": messages, "max_tokens": 40, "seed": turn, "extra_body": extra}
        plain = prompt(conversation_of(messages, None, style="openai"), tokenizer)
        if turn % 2:
            chunks: Any = list(client.chat.completions.create(**given, stream=True))
            ids, n_remembered = chunks[0].prompt_token_ids, chunks[0].remembered_tokens
            parts = [choice for chunk in chunks for choice in chunk.choices]
            new_ids = [token for part in parts for token in getattr(part, "token_ids", None) or []]
            text = "".join(part.delta.content or "" for part in parts)
        else:
            answer: Any = client.chat.completions.create(**given)
            ids, n_remembered = answer.prompt_token_ids, answer.remembered_tokens
            new_ids, text = answer.choices[0].token_ids, answer.choices[0].message.content
        assert ids[: len(before)] == before
        assert n_remembered >= len(before)
        assert tokenizer.content(ids) == tokenizer.content(plain)

        before = [*ids, *[token for token in new_ids if token != tokenizer.eot_id]]
        messages = [*messages, {"role": "assistant", "content": text}, {"role": "user", "content": f"And {turn}?"}]
    assert plain != ids, "the model wrote each answer as the tokenizer would: this test shows nothing"

    edited = [*messages[:-2], {"role": "assistant", "content": "Something else."}, messages[-1]]
    answer = client.chat.completions.create(model="small", messages=edited, max_tokens=1, extra_body=IDS)
    assert answer.remembered_tokens == 0


def test_results_of_calls_go_back_into_the_conversation(client: openai.OpenAI):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages: Any = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": '{"sky": "clear"}'},
    ]
    answer = client.chat.completions.create(
        model="small", messages=messages, tools=[WEATHER], tool_choice="none", max_tokens=8
    )
    assert answer.choices[0].message.tool_calls is None


def test_json_of_a_schema(client: openai.OpenAI):
    schema: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    for seed in range(4):
        (choice,) = client.chat.completions.create(
            model="small", messages=MESSAGES, response_format=schema, max_tokens=80, seed=seed
        ).choices
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), PERSON)


def test_other_constraints_and_stop_texts(client: openai.OpenAI):
    extra = {"constraint": {"regex": "[0-9]{3}-[0-9]{3}"}}
    given: Any = {"model": "small", "prompt": "A number: ", "max_tokens": 20, "seed": 2, "extra_body": extra}
    whole = client.completions.create(**given).choices[0].text
    assert len(whole) == 7
    cut = client.completions.create(**given, stop=["-"]).choices[0]
    assert cut.text == whole.partition("-")[0]
    assert cut.finish_reason == "stop"


def test_ids_are_prompts_and_several_prompts_are_answered_in_order(server: Running, client: openai.OpenAI):
    tokenizer = server.loaded.tokenizer
    texts = ["def add(a, b):", "#!/bin/bash"]
    by_text: Any = client.completions.create(model="small", prompt=texts, max_tokens=9, seed=3, n=2, extra_body=IDS)
    ids = [tokenizer.encode_prompt(text) for text in texts]
    by_ids: Any = client.completions.create(model="small", prompt=ids, max_tokens=9, seed=3, n=2, extra_body=IDS)
    assert by_text.prompt_token_ids == by_ids.prompt_token_ids == ids
    assert [c.token_ids for c in by_text.choices] == [c.token_ids for c in by_ids.choices]
    assert [c.index for c in by_text.choices] == [0, 1, 2, 3]
    counted = server.post("/tokenize", {"prompt": texts[0]}).json()
    assert counted == {"tokens": ids[0], "count": len(ids[0]), "max_model_len": 512}
    assert server.post("/detokenize", {"tokens": ids[0]}).json() == {"prompt": texts[0]}


def test_models_are_listed(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["small", "default"]
    assert client.models.retrieve("small").owned_by == "dist_lm"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("large")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": "large"}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": 3}]}, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 4000}]}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 7}, "top_p"),
        ({"n": 10**6}, "n"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"seed": 2**70}, "seed"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "wether"}}}, "tool_choice"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
         "response_format"),
        ({"extra_body": {"minimum_tokens": 3}}, "minimum_tokens"),
        ({"extra_body": {"constraint": {"regex": "("}}}, "response_format"),
        ({"extra_body": {"constraint": {"regex": "a" * 70_000}}}, "constraint"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_is_said_in_openais_form(client: openai.OpenAI, change: Any, param: str):
    given: Any = {"model": "small", "messages": MESSAGES, "max_tokens": 4} | change
    with pytest.raises(openai.BadRequestError if param != "model" else openai.NotFoundError) as caught:
        client.chat.completions.create(**given)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
