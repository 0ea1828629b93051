"""/v1/responses: by OpenAI's client, and by a program of the Agents SDK, both unmodified."""

import asyncio
import json
from typing import Any, Literal

import openai
import pytest
from agents import Agent, ModelSettings, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled

from dist_lm.chat.template import stop_tokens
from tests.patience import patient
from tests.server.conftest import Running, wait_for
from tests.server.test_clients import IDS, MESSAGES, PERSON

INPUT: Any = [{"role": "user", "content": "Is it dry in Oslo?"}]
CLOCK: Any = {
    "type": "function",
    "name": "clock",
    "description": "The time in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


@pytest.mark.heavy
def test_a_response_has_the_answer_of_a_chat(client: openai.OpenAI):
    """Finds another prompt or other parameters than those of /v1/chat/completions."""
    extra: Any = {"seed": 3, **IDS}
    response: Any = client.responses.create(
        model="small", instructions="Be short.", input=INPUT, max_output_tokens=20, temperature=0.7, extra_body=extra
    )
    chat: Any = client.chat.completions.create(
        model="small", messages=MESSAGES, max_tokens=20, temperature=0.7, extra_body=extra
    )
    assert response.prompt_token_ids == chat.prompt_token_ids
    assert response.token_ids == chat.choices[0].token_ids
    assert response.output_text == chat.choices[0].message.content
    assert response.status == ("incomplete" if chat.choices[0].finish_reason == "length" else "completed")
    assert response.usage.total_tokens == chat.usage.total_tokens


@pytest.mark.parametrize("tool_choice", ["auto", "required"])
def test_a_stream_ends_with_the_response_that_it_is_made_of(client: openai.OpenAI, server: Running, tool_choice: Any):
    """Finds events out of order, and text or calls of a stream that its response lacks."""
    tokenizer = server.loaded.tokenizer
    bias = {str(tokenizer.mark_id("<tool_call>")): 6.0, str(stop_tokens(tokenizer)[0]): 3.0}
    for seed in range(4):
        asked: Any = {
            "model": "small", "input": INPUT, "tools": [CLOCK], "tool_choice": tool_choice, "max_output_tokens": 100,
            "extra_body": {"seed": seed, "logit_bias": bias},
        }  # fmt: skip
        whole: Any = client.responses.create(**asked)
        events: Any = list(client.responses.create(**asked, stream=True))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert events[0].type == "response.created"
        assert events[-1].type == f"response.{whole.status}"
        assert events[-1].response.output_text == whole.output_text

        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert text == whole.output_text
        calls = [item for item in whole.output if item.type == "function_call"]
        done = [event.item for event in events if event.type == "response.output_item.done"]
        streamed_calls = [item for item in done if item.type == "function_call"]
        assert [call.arguments for call in streamed_calls] == [call.arguments for call in calls]
        assert len(done) == len(events[-1].response.output)
        if tool_choice == "required" and whole.status == "completed":
            assert calls
            assert json.loads(calls[0].arguments)["city"] in ("Oslo", "Rome")


def test_a_schema_and_a_conversation_that_goes_on_by_ids(client: openai.OpenAI):
    text: Any = {"format": {"type": "json_schema", "name": "person", "schema": PERSON, "strict": True}}
    first: Any = client.responses.create(
        model="small", input=INPUT, text=text, max_output_tokens=80, extra_body={"seed": 1, **IDS}
    )
    assert {*json.loads(first.output_text)} == {"name", "age"}

    items: Any = [*INPUT, *(item.model_dump() for item in first.output), {"role": "user", "content": "And Rome?"}]
    second: Any = client.responses.create(model="small", input=items, max_output_tokens=2, extra_body=IDS)
    written = [*first.prompt_token_ids, *first.token_ids[:-1]]  # the last one ended the turn
    assert second.remembered_tokens == len(written) + 1
    assert second.prompt_token_ids[: len(written)] == written


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input", []),
        ("input", [{"type": "computer_call"}]),
        ("input", [{"role": "user", "content": [{"type": "input_image", "image_url": "http://localhost/a"}]}]),
        ("input", [{"type": "function_call_output", "call_id": "x", "output": "y"}]),
        ("previous_response_id", "resp_1"),
        ("background", True),
        ("tools", [{"type": "web_search"}]),
        ("max_output_tokens", 10**9),
        ("include", ["file_search_call.results"]),
        ("text", {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_not_there_is_refused_by_its_field(server: Running, field: str, value: Any):
    response = server.post("/v1/responses", {"input": "a", "max_output_tokens": 2, field: value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] in (field, "response_format")


def test_an_agent_calls_tools_over_several_turns(server: Running):
    """Finds what the Agents SDK reads and the server does not write: calls, their outputs, streams, usage."""
    set_tracing_disabled(disabled=True)
    cities: list[str] = []

    @function_tool
    def clock(city: Literal["Oslo", "Rome"]) -> str:
        """Tells the time in a city."""
        cities.append(city)
        return "12:30"

    async def talk() -> tuple[Any, Any]:
        api = openai.AsyncOpenAI(
            base_url=f"{server.url}/v1",
            api_key="none",
            max_retries=0,
            timeout=patient(60),
        )
        # The untrained model calls until its turns are over, unless its end is likely.
        end = stop_tokens(server.loaded.tokenizer)[0]
        extra = {"seed": 2, "logit_bias": {str(end): 8.0}}
        agent = Agent(
            name="Clerk",
            instructions="Use the clock.",
            model=OpenAIResponsesModel(model="small", openai_client=api),
            model_settings=ModelSettings(tool_choice="required", max_tokens=60, extra_body=extra),
            tools=[clock],
        )
        first = await Runner.run(agent, "What time is it in Oslo?", max_turns=6)
        again: Any = [*first.to_input_list(), {"role": "user", "content": "And in Rome?"}]
        streamed = Runner.run_streamed(agent, again, max_turns=6)
        async for _ in streamed.stream_events():
            pass
        await api.close()
        return first, streamed

    first, streamed = asyncio.run(talk())
    assert len(cities) >= 2
    assert isinstance(first.final_output, str)
    assert isinstance(streamed.final_output, str)
    kinds = [item.type for item in first.new_items]
    assert kinds[:2] == ["tool_call_item", "tool_call_output_item"]
    assert first.context_wrapper.usage.total_tokens > 0
    assert wait_for(lambda: server.is_empty)
