"""A host turns whatever an environment does into a step: no number for what failed, no exception, no harm to others."""

import asyncio
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dist_lm.environments.host import Host
from dist_lm.environments.protocol import (
    Action,
    EnvironmentFailedError,
    Limits,
    Observation,
    Step,
    Task,
    Verdict,
)
from dist_lm.environments.served import failure_in
from dist_lm.environments.user_process import MARK, EnvironmentProcess
from dist_lm.environments.values import checked_step
from dist_lm.errors import UserError
from dist_lm.storage.process import marked
from tests.descriptors import SELECTABLE, thousand_descriptors
from tests.environments.hostile import EXPECTED
from tests.environments.playing import played
from tests.patience import patient

NAME = f"{Path(__file__).with_name('hostile.py')}:Environment"
GOOD = ("good", "forks", "leaves_a_process")


@pytest.mark.heavy
def test_hostile_environments_are_counted_by_reason_and_the_others_go_on():
    """Finds a bad environment that gets a number, raises in the caller, hangs the host, or is counted as another one;
    and one that harms a good conversation, or leaves a process behind."""
    limits = Limits(turns=3, seconds_a_step=patient(1.0), memory_bytes=1 << 30)

    async def play() -> tuple[dict[str, Step], Counter]:
        async with Host(NAME, limits) as host:
            ways = [*EXPECTED, *GOOD]
            # Some at a time, so that good conversations follow bad ones in the same processes.
            steps: dict[str, Step] = {}
            for begin in range(0, len(ways), 12):
                batch = ways[begin : begin + 12]
                results = await asyncio.gather(*(played(host, how) for how in [*batch, "good"]))
                steps |= dict(zip(batch, results, strict=False))
                assert results[-1].verdict == Verdict.of(1.0)
            return steps, host.failures

    steps, failures = asyncio.run(play())
    for how, reason in EXPECTED.items():
        verdict = steps[how].verdict
        assert verdict is not None, how
        assert (verdict.valid, verdict.reward, verdict.failure_reason) == (False, None, reason), (how, verdict)
    for how in GOOD:
        assert steps[how].verdict == Verdict.of(1.0), (how, steps[how])
    assert failures == Counter(EXPECTED.values())


def test_no_process_is_left(monkeypatch):
    """Finds a process of the environment, or one that it started in a session of its own, that outlives its host."""
    seen = []
    monkeypatch.setattr("uuid.uuid4", lambda: type("Mark", (), {"hex": f"mark{len(seen)}-{id(seen)}"}))

    async def play() -> None:
        async with Host(NAME, Limits(seconds_a_step=patient(3.0))) as host:
            assert (await played(host, "leaves_a_process")).verdict
            seen.extend(marked(f"mark0-{id(seen)}", MARK))

    asyncio.run(play())
    assert len(seen) == 2
    assert not marked(f"mark0-{id(seen)}", MARK)


@pytest.mark.heavy
def test_a_slow_conversation_stops_no_other():
    """Finds a host that steps one conversation at a time."""
    limits = Limits(seconds_a_step=patient(1.0))

    async def play() -> None:
        async with Host(NAME, limits) as host:
            slow = asyncio.ensure_future(played(host, "hangs_async"))
            await asyncio.gather(*(played(host, "good") for _ in range(4)))
            assert not slow.done()
            step = await slow
            assert step.verdict
            assert step.verdict.failure_reason == "timeout"

    asyncio.run(play())


def test_a_cancelled_conversation_leaves_the_host_in_order():
    """Finds a process that a cancelled step keeps busy, and that the next conversation gets."""

    async def play() -> None:
        async with Host(NAME, Limits(seconds_a_step=patient(60.0))) as host:
            episode = host.episode(Task.of("0", {"how": "hangs"}))
            assert not (await episode.reset()).done
            step = asyncio.ensure_future(episode.step(Action("go")))
            await asyncio.sleep(0.2)
            step.cancel()
            with pytest.raises(asyncio.CancelledError):
                await step
            begin = time.monotonic()
            assert (await played(host, "good")).verdict == (await played(host, "good")).verdict
            assert time.monotonic() - begin < patient(30.0)

    asyncio.run(play())


def test_the_detail_of_a_failure_is_one_line():
    """Finds an exception of many lines that scatters one failure over the log."""
    failure = failure_in(ValueError("first\n\n  second\n" * 1000))
    assert failure.detail.startswith("ValueError: first second first")
    assert "\n" not in str(failure)


@pytest.mark.parametrize(("done", "message"), [("yes", "the step's done is a str"), (1, "the step's done is a int")])
def test_a_step_with_a_part_of_another_type_is_named_by_that_part(done: Any, message: str):
    """Finds a message that calls a Step no Step, where one of its parts is wrong."""
    with pytest.raises(EnvironmentFailedError, match=message):
        checked_step(Step(Observation(), done, Verdict.of(1.0)), Action("go"), 1000)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.py:Environment", "there is no file nowhere.py"),
        (NAME.replace("Environment", "Nothing"), "there is no class Nothing"),
        (f"{NAME.partition(':')[0]}:Verdict", "class Verdict has no reset, step, close"),
        ("pyhton", "did you mean"),
    ],
)
def test_a_name_that_is_no_environment_is_refused_before_anything_runs(name: str, message: str):
    """Finds a mistyped environment that only shows when the first conversation fails."""

    async def open_host() -> None:
        async with Host(name):
            pass

    with pytest.raises(UserError, match=message):
        asyncio.run(open_host())


def test_a_task_cannot_be_changed_and_its_digest_is_that_of_its_data():
    """Finds a task whose data one reader changes for the next, and equal tasks that seem different."""
    task = Task.of("a", {"x": [1], "y": 2})
    task.data["x"].append(2)
    assert task.data == {"x": [1], "y": 2}
    assert task.digest == Task.of("a", {"y": 2, "x": [1]}).digest
    assert task.digest != Task.of("b", {"x": [1], "y": 2}).digest
    assert task.digest != Task.of("a", {"x": [1], "y": 2.0}).digest


@pytest.mark.parametrize(("page", "reward"), [("environments.md", 1.0), ("first_agent.md", 1 / 3)])
def test_the_environment_of_a_page_is_played(tmp_path, monkeypatch, page, reward):
    """Finds a page whose class or whose calls do not work as they stand there."""

    def blocks(name: str) -> list[str]:
        text = (Path(__file__).parents[2] / "docs" / name).read_text()
        return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)

    monkeypatch.chdir(tmp_path)
    Path("guess.py").write_text(blocks(page)[0])
    steps: list[Step] = []
    play = blocks("environments.md")[1]
    exec(compile(play.replace("print(step)", "steps.append(step)"), "page", "exec"), {"steps": steps})
    assert [step.done for step in steps] == [False, False, True]
    assert [step.observation.messages[0].content for step in steps[:2]] == ["Too low.", "Too high."]
    assert steps[-1].verdict == Verdict.of(reward)


def test_a_rank_with_thousands_of_connections_knows_that_its_process_is_alive():
    """Finds a look by select.select, which raises for descriptors above 1,023: 512 ranks have more connections."""

    async def look() -> list[bool]:
        process = EnvironmentProcess(NAME, Limits())
        await process.start()
        assert process._connection is not None
        assert process._connection.fileno() >= SELECTABLE
        looks = [process.is_alive]
        await process.end()
        return [*looks, process.is_alive]

    with thousand_descriptors():
        assert asyncio.run(look()) == [True, False]
