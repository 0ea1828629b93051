"""Tasks for agents: solutions earn the whole reward, short cuts do not, and no task is in two parts."""

import asyncio
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from dist_lm.chat.layouts.registry import read_row
from dist_lm.chat.messages import Call, Conversation
from dist_lm.demo import errands, repairs
from dist_lm.environments.host import Host
from dist_lm.environments.protocol import Action, Step, Task

ROPE: dict = {
    "prompt": "",
    "rooms": {"rope": "attic", "map": "hall"},
    "locked": ["shed"],
    "requests": [["where", "rope", None]],
}
MAP_TO_SHED = {**ROPE, "requests": [["put", "map", "shed"]]}
MAP_TO_ROPE = {**ROPE, "requests": [["beside", "map", "rope"]]}


def call(name: str, **arguments: str) -> Action:
    return Action("", (Call(name, arguments),))


IN_ATTIC, IN_SHED = Action("The map is in the attic."), Action("The map is in the shed.")
WRONG_NUMBER = 7  # of no task


async def played(host: Host, task: Task, actions: Sequence[Action]) -> list[Step]:
    """The steps of an environment with these turns of a model."""
    episode = host.episode(task)
    steps = [await episode.reset()]
    for action in actions:
        steps.append(await episode.step(action))
    await episode.close()
    return steps


def reward_of(data: dict, *actions: Action) -> float | None:
    """The reward of an errand that ends with the last action."""

    async def play() -> Step:
        environment = errands.Errands()
        await environment.reset(Task.of("0", data))
        return [await environment.step(action) for action in actions][-1]

    step = asyncio.run(play())
    assert step.done
    assert step.verdict
    return step.verdict.reward


def actions_of(conversation: Conversation) -> list[Action]:
    turns = [message for message in conversation.messages if message.role == "assistant"]
    return [Action(turn.content, turn.calls) for turn in turns]


def test_errands_without_haste_earn_the_whole_reward():
    """Finds a request that its own calls do not serve, and results other than those that a model is shown."""

    async def play() -> None:
        for task in errands.tasks(5, "examples", 40):
            conversation = errands.conversation(task)
            environment = errands.Errands()
            told = list((await environment.reset(Task.of("0", task))).messages)
            for action in actions_of(conversation):
                step = await environment.step(action)
                told += step.observation.messages
            assert step.verdict
            assert step.verdict.reward == 1.0
            assert told == [message for message in conversation.messages if message.role != "assistant"]

    asyncio.run(play())


def test_a_hasty_assistant_serves_some_requests_of_each_kind():
    """Finds examples that teach all that the reward asks for, or nothing of it."""
    rewards: dict[str, list[float]] = {kind: [] for kind in errands.KINDS}
    rows = list(errands.tasks(5, "examples", 300))
    for row, conversation in zip(rows, errands.examples(5, 300), strict=True):
        reward = reward_of(row, *actions_of(conversation))
        assert reward is not None
        rewards[row["requests"][0][0]].append(reward)
    assert all(0.1 < sum(earned) / len(earned) < 0.8 for earned in rewards.values())


@pytest.mark.parametrize(
    ("data", "actions"),
    [
        pytest.param(ROPE, [Action("The rope is in the hall.")], id="wrong room"),
        pytest.param(ROPE, [Action("The rope is in the attic. The rope is in the hall.")], id="many answers"),
        pytest.param(ROPE, [Action("The rope is in the attic.", cut="tokens")], id="cut off"),
        pytest.param(
            ROPE, [call("put", thing="map", room="attic"), Action("The rope is in the attic.")], id="put by mistake"
        ),
        pytest.param(MAP_TO_ROPE, [IN_ATTIC], id="only said"),
        pytest.param(MAP_TO_ROPE, [call("put", thing="map", room="attic"), Action("174")], id="not said"),
        pytest.param(MAP_TO_ROPE, [call("put", thing="rope", room="hall"), IN_ATTIC], id="other thing"),
        pytest.param(MAP_TO_SHED, [call("put", thing="map", room="shed"), IN_SHED], id="locked"),
    ],
)
def test_short_cuts_earn_nothing(data, actions):
    """Finds a reward for what looks like a served request."""
    assert reward_of(data, *actions) == 0.0


def test_an_error_can_be_answered_by_another_call():
    """Finds a model that ends its conversation without a reward by a call that failed."""
    broken = Action("", (Call("find", {"room": "hall"}), Call("fly"), Call("put", {"thing": "map", "room": "shed"})))
    put = call("put", thing="map", room="shed")
    assert reward_of(MAP_TO_SHED, broken, call("open", room="shed"), put, IN_SHED) == 1.0


def test_the_reward_is_the_share_of_served_requests():
    """Finds a second request that is judged by where things were before the first one."""
    both = {**ROPE, "requests": [["put", "rope", "hall"], ["beside", "map", "rope"], ["where", "map", None]]}
    put, answer = call("put", thing="rope", room="hall"), Action("The rope is in the hall.")
    assert reward_of(both, put, answer, IN_ATTIC, Action("The map is in the hall.")) == pytest.approx(2 / 3)


@pytest.mark.heavy
@pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
def test_mended_programs_earn_the_whole_reward_and_short_cuts_a_third():
    """Finds a feedback other than the one that is learned, and a shown test that is worth the answer of all."""

    async def play() -> None:
        kinds = {repair.kind.asks: repair for repair in repairs.tasks(5, "solved", 60)}
        async with Host("code_repair") as host:
            for repair in kinds.values():
                conversation, task = repair.conversation(WRONG_NUMBER), Task.of(repair.name, repair.fields)
                first, second = actions_of(conversation)
                steps = await played(host, task, [first, second])
                assert steps[1].observation.messages == (conversation.messages[2],)
                assert steps[-1].verdict
                assert steps[-1].verdict.reward == 1.0

                shown = repr(repair.kind.value(repair.kind.arguments[0], repair.number))
                constant = Action(f"def {repair.name}(x): return {shown}")
                (*_, last) = await played(host, task, [first, constant])
                assert last.verdict
                assert last.verdict.reward == pytest.approx(1 / 3)
        assert len(kinds) == len(repairs.KINDS)

    asyncio.run(play())


def test_no_task_is_in_two_parts():
    """Finds held-out tasks that were trained on, for any pair of seeds."""
    requests = {
        part: {
            (kind, thing, goal or row["rooms"][thing])
            for seed in (0, 1) for row in errands.tasks(seed, part, 300) for kind, thing, goal in row["requests"]
        }
        for part in errands.SHARES
    }  # fmt: skip
    programs = {
        part: {(repair.kind.asks, repair.number) for seed in (0, 1) for repair in repairs.tasks(seed, part, 300)}
        for part in repairs.SHARES
    }
    for parts in (requests, programs):
        assert len(set.union(*parts.values())) == sum(map(len, parts.values()))
        assert all(parts.values())


def test_files_hold_the_conversations(tmp_path: Path):
    """Finds rows that a reader of conversations takes for others, such as without their tools."""
    errands.write(tmp_path / "errands", 5, {"examples": 3, "train": 4, "held_out": 2})
    repairs.write(tmp_path / "repairs", 5, {"solved": 3, "train": 4, "held_out": 2})
    expected = {"errands/examples": errands.examples(5, 3), "repairs/solved": repairs.conversations(5, 3)}
    for name, conversations in expected.items():
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert [read_row(json.loads(line)) for line in lines] == conversations
    for folder in ("errands", "repairs"):
        for part, size in (("train", 4), ("held_out", 2)):
            assert len((tmp_path / folder / f"{part}.jsonl").read_text().splitlines()) == size
