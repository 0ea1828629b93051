"""pydantic-ai, unmodified: its requests are answered with values of the type that it asks for."""

from contextlib import suppress
from typing import Annotated, Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.exceptions import OutputTokenLimitExceeded, UsageLimitExceeded
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.usage import UsageLimits

from dist_lm.chat.template import stop_tokens
from tests.patience import patient
from tests.server.conftest import Running, wait_for


class Person(BaseModel):
    """A person."""

    name: Annotated[str, Field(max_length=6)]
    age: Annotated[int, Field(ge=0, le=99)]
    city: Literal["Oslo", "Rome"]


ASKED: list[Any] = [{"role": "user", "content": "Who is it?"}]


@pytest.mark.parametrize("kind", ["chat", "responses"])
@pytest.mark.parametrize("output", [NativeOutput(Person), ToolOutput(Person)], ids=["schema", "tool"])
def test_pydantic_ai_gets_a_person(server: Running, kind: str, output: Any):
    agent = Agent(_model(server, kind), output_type=output, retries=0)
    result = agent.run_sync("Who is it?", model_settings={"max_tokens": 120, "extra_body": {"seed": 1}})
    assert isinstance(result.output, Person)
    assert result.usage.output_tokens
    assert wait_for(lambda: server.is_empty)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["chat", "responses"])
def test_pydantic_ai_runs_tools_and_goes_on(server: Running, kind: str):
    """Finds calls and outputs that do not come back as they went out."""
    cities: list[str] = []
    agent = Agent(_model(server, kind), output_type=ToolOutput(Person), retries=0)

    @agent.tool_plain
    def clock(city: Literal["Oslo", "Rome"]) -> str:
        """Tells the time in a city."""
        cities.append(city)
        return "12:30"

    # An untrained model picks a tool at random: some seeds call the clock first and end with a person.
    end = stop_tokens(server.loaded.tokenizer)[0]
    for seed in range(30):
        cities.clear()
        settings: Any = {
            "max_tokens": 90,
            "parallel_tool_calls": False,
            "extra_body": {"seed": seed, "logit_bias": {str(end): 8.0}},
        }
        limits = UsageLimits(request_limit=3)
        with suppress(UsageLimitExceeded, OutputTokenLimitExceeded):
            result = agent.run_sync("What time is it?", model_settings=settings, usage_limits=limits)
            assert isinstance(result.output, Person)
            if cities and len(result.all_messages()) > 3:
                return
    pytest.fail("no run called the clock and went on")


def _model(server: Running, kind: str) -> Any:
    url = f"{server.url}/v1"
    client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=patient(60))
    provider = OpenAIProvider(openai_client=client)
    if kind == "chat":
        return OpenAIChatModel("small", provider=provider)
    return OpenAIResponsesModel("small", provider=provider)
