"""A program that speaks HTTP is an environment: its requests are observations, its reward the verdict, and whatever it
does otherwise is a failure with a name, or changes nothing."""

import asyncio
import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from dist_lm.chat.messages import Call, Message
from dist_lm.environments.agent_chat import chat_request
from dist_lm.environments.agent_endpoint import CHAT, REWARD, Endpoint, Exchange
from dist_lm.environments.agent_program import STARTS_A_CORE, ProgramEnvironment
from dist_lm.environments.host import Episode, Host
from dist_lm.environments.program_command import files_of, program_of
from dist_lm.environments.protocol import Action, Limits, Observation, Step, Task, Verdict
from dist_lm.errors import ConfigError, UserError
from dist_lm.storage.process import cores, marked
from tests.environments.playing import played
from tests.patience import patient

ROOT = Path(__file__).parents[2]
NAME = f"program:{sys.executable} -S {Path(__file__).with_name('hostile_agent.py')}"
FAILING = {
    "hangs": "timeout",
    "hangs_later": "timeout",
    "crashes": "crashed",
    "ends": "no_verdict",
    "is_killed": "crashed",
    "takes_memory": "memory",
    "is_early": "no_verdict",
    "is_nan": "bad_reward",
    "is_nan_for_a_turn": "bad_reward",
    "is_text": "bad_reward",
    "is_no_fp32": "bad_reward",
    "refuses": "refused",
    "gives_up": "infrastructure",
    "forges": "no_verdict",
    "begins_anew_with_too_much": "too_long",
    "says_too_much": "too_long",
    "speaks_for_the_model": "bad_observation",
    "leaves_a_child": "no_verdict",
}
GOOD = (
    *("good", "rewards_twice", "asks_for_what_is_not_there", "sends_garbage", "goes_on_after_the_last_turn"),
    *("forgets", "edits", "edits_the_answer", "changes_tools", "begins_anew_with_nothing_that_asks"),
)
USER, AGAIN = {"role": "user", "content": "Go."}, {"role": "user", "content": "Again."}
LOOK = {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": LOOK}]


@pytest.mark.heavy
def test_hostile_programs_are_counted_by_reason_and_the_others_go_on():
    """Finds a program that gets a number for what failed, raises in the caller, hangs the host, is counted as another
    failure, or harms a good conversation beside it; and a refused request that changes one."""
    limits = Limits(turns=2, seconds_a_step=patient(5.0), memory_bytes=1 << 30)

    async def play() -> tuple[dict[str, Step], Counter]:
        async with Host(NAME, limits) as host:
            steps: dict[str, Step] = {}
            ways = [*FAILING, *GOOD, "rewards_turns"]
            for begin in range(0, len(ways), 6):
                batch = ways[begin : begin + 6]
                results = await asyncio.gather(*(played(host, how) for how in [*batch, "good"]))
                steps |= dict(zip(batch, results, strict=False))
                assert results[-1].verdict == Verdict.of(1.0), results[-1]
            return steps, host.failures

    steps, failures = asyncio.run(play())
    for how, reason in FAILING.items():
        verdict = steps[how].verdict
        assert verdict is not None, how
        assert (verdict.valid, verdict.reward, verdict.failure_reason) == (False, None, reason), (how, verdict)
    for how in GOOD:
        assert steps[how].verdict == Verdict.of(1.0), (how, steps[how])
    assert failures == Counter(FAILING.values())
    last = steps["rewards_turns"]
    assert (last.turn_reward, last.verdict) == (0.5, Verdict.of(0.25))


@pytest.mark.heavy
def test_a_program_that_is_killed_is_held_again_and_leaves_no_process():
    """Finds a killed program that is a failure at once, other steps the second time, and processes that stay."""

    async def play(kills: bool) -> tuple[list[Step], int]:
        async with Host(NAME, Limits(seconds_a_step=patient(30.0))) as host:
            episode = host.episode(Task.of("0", {"how": "good"}))
            steps = [await episode.reset(), await episode.step(Action("go"))]
            mark = environment_of(episode)._mark
            if kills:
                process = environment_of(episode)._process
                assert process is not None
                os.kill(process.pid, signal.SIGKILL)
            steps.append(await episode.step(Action("go")))
            assert not marked(mark, "DIST_LM_ENVIRONMENT")
            return steps, host.take_held_again()

    steps, n_again = asyncio.run(play(kills=True))
    assert (steps, 0) == asyncio.run(play(kills=False))
    assert n_again == 1
    assert steps[-1].verdict == Verdict.of(1.0)


@pytest.mark.heavy
def test_programs_that_wait_for_their_start_use_no_time():
    """Finds conversations that begin together and exceed their seconds before a core is theirs, or a place that a
    failed start keeps for ever."""

    async def play() -> Counter:
        async with Host(NAME, Limits(turns=2, seconds_a_step=patient(1.0))) as host:
            # Each of these holds its place until its time is over.
            ways = ["hangs"] * (2 * STARTS_A_CORE * cores()) + ["good"]
            steps = await asyncio.gather(*(played(host, how) for how in ways))
            assert steps[-1].verdict == Verdict.of(1.0)
            return host.failures

    assert asyncio.run(play()) == Counter(timeout=2 * STARTS_A_CORE * cores())


def environment_of(episode: Episode) -> ProgramEnvironment:
    assert isinstance(episode._environment, ProgramEnvironment)
    return episode._environment


# --- the endpoint, without a program ---


class Client:
    """What a program sends, from this process."""

    def __init__(self, session: aiohttp.ClientSession, endpoint: Endpoint, exchange: Exchange) -> None:
        self._session, self._endpoint, self._exchange = session, endpoint, exchange

    async def chat(self, *messages: Any, **fields: Any) -> tuple[int, Any]:
        """Returns (status, body)."""
        return await self._post(CHAT, {"model": "x", "messages": messages, **fields}, self._exchange.key)

    async def reward(self, body: Any) -> int:
        return (await self._post(REWARD, body, self._exchange.reward_key))[0]

    async def _post(self, path: str, body: Any, key: str) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {key}"}
        async with self._session.post(self._endpoint.url + path, json=body, headers=headers) as response:
            is_json = response.content_type == "application/json"
            return response.status, await (response.json() if is_json else response.text())


def converse(body: Callable[[Client, Exchange], Awaitable[None]]) -> None:
    """Runs a test with an endpoint that is open for one conversation."""

    async def run() -> None:
        endpoint, exchange = Endpoint(1 << 20), Exchange()
        await endpoint.open()
        endpoint.add(exchange)
        try:
            async with aiohttp.ClientSession() as session:
                await body(Client(session, endpoint, exchange), exchange)
        finally:
            await endpoint.close()

    asyncio.run(asyncio.wait_for(run(), patient(60.0)))


def test_a_second_request_is_refused_while_one_waits():
    """Finds two turns that are drawn for one place, or a waiting request that a second one, or a reward, disturbs."""

    async def body(client: Client, exchange: Exchange) -> None:
        first = asyncio.ensure_future(client.chat(USER))
        assert await exchange.next() == Observation.user("Go.")
        for messages in ((USER,), (USER, AGAIN)):
            status, error = await client.chat(*messages)
            assert (status, error["error"]["code"]) == (409, "parallel_requests")
        assert await client.reward({"reward": 1.0}) == 409
        exchange.answer(Action("go"))
        status, answer = await first
        assert (status, answer["choices"][0]["message"]["content"]) == (200, "go")
        assert not exchange.has_arrival

    converse(body)


def test_a_request_whose_connection_broke_gets_the_same_answer():
    """Finds a retry of a client that is refused as a rewritten conversation, or draws another turn."""

    async def body(client: Client, exchange: Exchange) -> None:
        first = asyncio.ensure_future(client.chat(USER))
        await exchange.next()
        first.cancel()
        # Until the server sees the end of the connection, the retry counts as a second request.
        retry = asyncio.ensure_future(client.chat(USER))
        while (await asyncio.wait({retry}, timeout=0.1))[0]:
            assert (await retry)[0] == 409
            retry = asyncio.ensure_future(client.chat(USER))
        exchange.answer(Action("go"))
        assert (await retry)[1]["choices"][0]["message"]["content"] == "go"
        assert not exchange.has_arrival

    converse(body)


def test_a_stream_has_the_turn_of_a_whole_response():
    """Finds a stream that lacks a call or the reason of its end, or that a client cannot read."""
    action = Action("Looking.", (Call("look", {}), Call("look", {})))

    async def body(client: Client, exchange: Exchange) -> None:
        asked = asyncio.ensure_future(client.chat(USER, tools=TOOLS, stream=True))
        await exchange.next()
        exchange.answer(action)
        status, text = await asked
        *lines, end = re.findall(r"^data: (.*)\n\n", text, re.MULTILINE)
        assert (status, end) == (200, "[DONE]")
        chunks = [json.loads(line)["choices"][0] for line in lines]
        assert chunks[0]["delta"]["content"] == "Looking."
        assert [call["index"] for call in chunks[0]["delta"]["tool_calls"]] == [0, 1]
        assert chunks[-1]["finish_reason"] == "tool_calls"

    converse(body)


def test_no_room_is_an_error_that_clients_know_and_a_cut_turn_says_so():
    """Finds a program that waits for ever, or takes half a turn for a whole one, where the context is full."""

    async def body(client: Client, exchange: Exchange) -> None:
        first = asyncio.ensure_future(client.chat(USER))
        await exchange.next()
        exchange.answer(Action("half a", cut="tokens"))
        assert (await first)[1]["choices"][0]["finish_reason"] == "length"
        status, error = await client.chat(USER, AGAIN)
        assert (status, error["error"]["code"]) == (400, "context_length_exceeded")
        assert await client.reward({"reward": 0.5}) == 200
        assert await exchange.next() == Verdict.of(0.5)

    converse(body)


# --- what a request adds ---


def asked_again(action: Action, answer: dict[str, Any], *added: dict[str, Any]) -> Observation:
    """Returns what a second request adds, in which the turn of the model is `answer`."""
    changes: list[str] = []
    exchange = Exchange(changes.append)

    async def ask() -> Any:
        task = asyncio.ensure_future(exchange.ask(chat_request({"messages": [USER], "tools": TOOLS})))
        await exchange.next()
        exchange.answer(action)
        await task
        messages = [{**USER, "content": [{"type": "text", "text": "Go."}]}, answer, *added]
        task = asyncio.ensure_future(exchange.ask(chat_request({"messages": messages, "tools": TOOLS})))
        arrival = asyncio.ensure_future(exchange.next())
        await asyncio.wait({task, arrival}, return_when=asyncio.FIRST_COMPLETED)
        try:
            return arrival.result() if arrival.done() else await task
        finally:
            task.cancel()
            arrival.cancel()

    observation = asyncio.run(ask())
    assert isinstance(observation, Observation)
    assert bool(changes) == observation.begins_anew
    return observation


CALLS = Action("", (Call("look", {"x": 1}), Call("look", {"x": 2})))


def sent_calls(**changes: Any) -> list[dict[str, Any]]:
    arguments = ('{"x": 1}', '{"x":2}')
    functions = [{"name": "look", "arguments": text} | changes for text in arguments]
    return [{"id": f"call_0_{n}", "type": "function", "function": f} for n, f in enumerate(functions)]


@pytest.mark.parametrize(
    "answer",
    [
        {"role": "assistant", "content": " An answer.\n", "refusal": None, "annotations": [], "audio": None},
        {"role": "assistant", "content": [{"type": "text", "text": "An answer."}], "tool_calls": None},
    ],
)
def test_an_answer_may_come_back_in_any_form(answer):
    """Finds an agent that is refused because its client keeps the answer in its own form."""
    assert asked_again(Action("An answer."), answer, AGAIN) == Observation.user("Again.")


def test_results_are_in_the_order_of_the_calls():
    """Finds a result that the model reads as that of another call."""
    answer = {"role": "assistant", "content": None, "tool_calls": sent_calls()}
    results = [{"role": "tool", "tool_call_id": f"call_0_{n}", "content": json.dumps({"n": n})} for n in (1, 0)]
    expected = (Message("tool", results=({"n": 0}, {"n": 1})),)
    assert asked_again(CALLS, answer, *results).messages == expected


@pytest.mark.parametrize(
    ("action", "answer"),
    [
        (Action("An answer."), {"role": "assistant", "content": "Another."}),
        (CALLS, {"role": "assistant", "content": None, "tool_calls": sent_calls(name="listen")}),
        (CALLS, {"role": "assistant", "content": None, "tool_calls": sent_calls()[:1]}),
        (CALLS, {"role": "assistant", "content": "Looking.", "tool_calls": sent_calls()}),
    ],
)
def test_a_changed_answer_begins_the_conversation_anew(action, answer):
    """Finds a model that is rewarded for words which are not its own, or that does not read what the program sent."""
    calls = answer.get("tool_calls") or []
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "3"} for call in calls]
    observation = asked_again(action, answer, *results, AGAIN)
    assert observation.begins_anew
    assert [message.role for message in observation.messages][:2] == ["user", answer["role"]]
    assert [call.name for call in observation.messages[1].calls] == [call["function"]["name"] for call in calls]
    assert [tool.name for tool in observation.tools] == ["look"]


def test_the_reward_of_a_turn_is_that_of_no_other_turn():
    """Finds the reward of a turn that the next turn keeps."""

    async def body(client: Client, exchange: Exchange) -> None:
        messages: list[Any] = [USER]
        for reward in (0.5, None):
            asked = asyncio.ensure_future(client.chat(*messages))
            await exchange.next()
            exchange.answer(Action("go"))
            messages += [(await asked)[1]["choices"][0]["message"], AGAIN]
            if reward:
                assert await client.reward({"turn_reward": reward}) == 200
            assert exchange.turn_reward == (reward or 0.0)
        assert not exchange.is_over

    converse(body)


# --- the command ---


def test_a_command_is_split_without_a_shell(tmp_path, monkeypatch):
    """Finds a command that a shell reads, and a changed file of a program that a run does not notice."""
    monkeypatch.chdir(tmp_path)
    Path("my agent.py").touch()
    name = "program:python 'my agent.py' --limit '$HOME; true'"
    assert program_of(name) == ["python", "my agent.py", "--limit", "$HOME; true"]
    assert files_of(name) == [Path("my agent.py")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("program:", "expected program:COMMAND"),
        ("program:python 'agent.py", "No closing quotation"),
        ("program:python nowhere.py", "there is no file nowhere.py"),
        ("program:no-such-program", "there is no program no-such-program"),
    ],
)
def test_a_command_that_cannot_run_is_refused_before_a_conversation(name, message):
    """Finds a mistyped command that only shows as many crashed conversations."""

    async def open_host() -> None:
        async with Host(name):
            pass

    with pytest.raises((ConfigError, UserError), match=message):
        asyncio.run(open_host())
