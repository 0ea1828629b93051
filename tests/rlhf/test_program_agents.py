"""The agent of the docs, with the plain `openai` package: it trains through the endpoint as it stands there."""

import re
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from dist_lm.environments.host import Host
from dist_lm.environments.protocol import Limits, Verdict
from dist_lm.generation.call_grammar import ToolChoice, call_constraint
from dist_lm.rlhf.episodes import Episode, read_episodes
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer, text_with_marks
from tests.patience import patient
from tests.rlhf.guessing import config_of, end_turns_early, game
from tests.rlhf.toy import Toy, tensors_of

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("one_rank")]
PAGE = Path(__file__).parents[2] / "docs" / "program_agents.md"
LIMITS = Limits(turns=3, tokens=190, seconds_a_step=patient(60.0), seconds=patient(120.0))
ITERATIONS = 2


@pytest.fixture(scope="module")
def tokenizer(tiny_work: WorkDirectory) -> Tokenizer:
    return Tokenizer.load(tiny_work.tokenizer_model)


@pytest.fixture(autouse=True)
def short_turns(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    end_turns_early(tokenizer, monkeypatch)


CALLER = """
import json
import sys

import httpx
from openai import BadRequestError, OpenAI

task = json.loads(sys.stdin.readline())
guess = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}}
tools = [{"type": "function", "function": {"name": "guess", "description": "Guesses.", "parameters": guess}}]
messages = [{"role": "user", "content": "Guess."}]
numbers = []
for turn in range(2):
    asked = {"model": "policy", "messages": messages, "tools": tools}
    if turn:  # a stream, whose parts are put together as agents do
        try:
            (first, last) = [chunk.choices[0] for chunk in OpenAI().chat.completions.create(stream=True, **asked)]
        except BadRequestError:  # no room for another turn
            break
        assert last.finish_reason in ("tool_calls", "length"), last
        answer = {**first.delta.model_dump(exclude_none=True), "content": first.delta.content}
        calls = first.delta.tool_calls or []
    else:
        answer = OpenAI().chat.completions.create(**asked).choices[0].message
        calls = answer.tool_calls or []
    if not calls:
        break
    messages.append(answer)
    for call in reversed(calls):
        numbers.append(json.loads(call.function.arguments).get("n", 0))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps({"error": numbers[-1]})})
headers = {"Authorization": f"Bearer {task['reward_key']}"}
reward = sum(n > 4 for n in numbers) / max(1, len(numbers))
httpx.post(task["reward_url"], headers=headers, json={"reward": reward}).raise_for_status()
"""

SUMMARISER = """
import json
import sys

import httpx
from openai import BadRequestError, OpenAI

task = json.loads(sys.stdin.readline())
letter = task["data"]["letter"]
headers = {"Authorization": f"Bearer {task['reward_key']}"}


def post(**reward):
    httpx.post(task["reward_url"], headers=headers, json=reward).raise_for_status()


history = [{"role": "user", "content": f"Write {letter}."}]
client, shares = OpenAI(), []
try:
    for turn in range(4):
        if turn == 2:  # the two turns so far become one of the user
            words = " ".join(str(message["content"]) for message in history)
            history = [{"role": "user", "content": f"Summary: {words[:20]}"}]
        answer = client.chat.completions.create(model="policy", messages=history).choices[0].message.content or ""
        shares.append(answer.lower().count(letter) / max(1, len(answer)))
        post(turn_reward=shares[-1])
        history += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Again."}]
except BadRequestError as error:
    if error.code not in ("turn_limit", "context_length_exceeded"):
        raise
post(reward=0.5)
"""


@pytest.fixture
def agent(tmp_path: Path) -> Path:
    """The file of the page."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(code.splitlines()) <= 40
    path = tmp_path / "agent.py"
    path.write_text(code)
    return path


def trained(agent: Path, folder: Path, tokenizer: Tokenizer, limits: Limits = LIMITS) -> tuple[Toy, list[Episode]]:
    """Returns a run that has trained on conversations of the agent, and the conversations in their order."""
    with ExitStack() as stack:
        run = game(
            config_of(epochs=1, max_new_tokens=12),
            ITERATIONS,
            tokenizer,
            stack,
            open_host=partial(Host, f"program:{sys.executable} {agent}", limits),
            folder=folder,
            limits=limits,
            at_once=3,
        )
        before = {name: tensor.clone() for name, tensor in tensors_of(run).items()}
        run.run()
        assert any(not torch.equal(tensor, before[name]) for name, tensor in tensors_of(run).items())
    return run, [episode for path in sorted(folder.iterdir()) for episode in read_episodes(path)]


def test_the_agent_of_the_docs_trains_and_two_runs_are_equal(agent, tmp_path, tokenizer):
    """Finds an agent with the plain `openai` package that needs a change to train, ids that change between its turns,
    losses of other tokens than the model's, and numbers that depend on the order of requests."""
    run, episodes = trained(agent, tmp_path / "first", tokenizer)

    assert run.metric("rlhf/ratio_mean") == [pytest.approx(1, abs=1e-6)] * ITERATIONS
    assert max(run.metric("rollout/logprob_gap")) < 1e-5
    assert min(run.metric("rollout/turns")) > 1.5
    assert len(episodes) == ITERATIONS * 9
    assert all(episode.verdict.valid for episode in episodes), [episode.verdict for episode in episodes]
    assert len({episode.reward for episode in episodes}) > 2, "equal rewards train nothing"
    for episode in episodes:
        # One sample: each turn stands behind the ids that were read for it. Its marks are of drawn tokens alone.
        (sample,) = episode.samples
        assert sum(sample.drawn) == sum(turn.new_tokens for turn in episode.turns) == len(episode.logprobs)
        assert not sample.drawn[0]
        assert sample.drawn[-1]

    again, episodes_again = trained(agent, tmp_path / "second", tokenizer)
    assert episodes == episodes_again
    for name, tensor in tensors_of(run).items():
        assert torch.equal(tensor, tensors_of(again)[name]), name


def test_an_agent_with_tools_trains_on_its_calls(tmp_path, tokenizer, monkeypatch):
    """Finds calls that reach a program otherwise than they were drawn, streamed ones too, results that come back to
    other calls, and sets of a grammar that the learner reads for another turn."""
    monkeypatch.undo()  # calls end by themselves
    path = tmp_path / "caller.py"
    path.write_text(CALLER)
    with ExitStack() as stack:
        run = game(
            config_of(epochs=1, max_new_tokens=40, top_k=9),
            1,
            tokenizer,
            stack,
            open_host=partial(Host, f"program:{sys.executable} {path}", LIMITS),
            constraint_of=lambda tools: call_constraint(tools, tokenizer, ToolChoice("required")),
            folder=tmp_path / "conversations",
            limits=LIMITS,
            at_once=3,
        )
        run.run()
    (report,) = run.reports
    assert report.metrics["rlhf/ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert report.metrics["rollout/logprob_gap"] < 1e-5
    assert report.metrics["rollout/turns"] > 1.2
    assert report.metrics["rollout/tool_errors"] > 0.2

    episodes = [e for file in (tmp_path / "conversations").iterdir() for e in read_episodes(file)]
    assert all(episode.verdict.valid for episode in episodes), [episode.verdict for episode in episodes]
    for turn in (turn for episode in episodes for turn in episode.turns if turn.step["observation"]["messages"]):
        (message,) = turn.step["observation"]["messages"]
        assert message["results"] == [{"error": arguments.get("n", 0)} for _, arguments in turn.action["calls"]]


def test_an_agent_that_summarises_trains_on_all_its_samples(tmp_path, tokenizer):
    """Finds turns behind a summary that are learned from ids which the model did not read there, rewards of turns that
    are lost, and a conversation of two samples that counts twice."""
    path = tmp_path / "summariser.py"
    path.write_text(SUMMARISER)
    run, episodes = trained(path, tmp_path / "conversations", tokenizer, replace(LIMITS, turns=4))

    assert run.metric("rlhf/ratio_mean") == [pytest.approx(1, abs=1e-6)] * ITERATIONS
    assert max(run.metric("rollout/logprob_gap")) < 1e-5
    assert len(episodes) == ITERATIONS * 9
    assert all(episode.verdict == Verdict.of(0.5) for episode in episodes), [episode.verdict for episode in episodes]
    assert len({episode.reward for episode in episodes}) > 2, "equal rewards train nothing"

    num_summarised = 0
    for episode in episodes:
        first, *others = episode.samples
        texts = [text_with_marks(sample.ids, tokenizer) for sample in episode.samples]
        assert "Summary" not in texts[0]
        assert all("Summary: Write" in text for text in texts[1:])
        assert sum(first.drawn) == sum(turn.new_tokens for turn in episode.turns[:2])
        assert sum(sum(sample.drawn) for sample in others) == sum(turn.new_tokens for turn in episode.turns[2:])
        assert len(others) == (len(episode.turns) > 2)
        num_summarised += len(others)
    assert num_summarised > 0.8 * len(episodes)
    assert sum(run.metric("rollout/broken_prefixes")) == num_summarised
    shares = [turn.reward for episode in episodes for turn in episode.turns]
    assert min(shares) >= 0
    assert max(shares) > 0
