"""A conversation whose process or sandbox dies is held once more, and nobody gains by it."""

import asyncio
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from dist_lm.environments.host import Episode, Host
from dist_lm.environments.own import OwnEnvironments
from dist_lm.environments.protocol import Action, EnvironmentDiedError, Limits, Observation, Step, Task, Verdict
from dist_lm.environments.user_process import EnvironmentProcess
from dist_lm.sandbox.sandbox import Sandbox
from dist_lm.sandbox.session import SessionFailedError, SessionPool, Turn
from tests.environments.test_own_environments import call, results, reward
from tests.patience import patient
from tests.sandbox.lost_server import kill_server

NAME = f"{Path(__file__).with_name('mortal.py')}:Mortal"
ACTIONS = (Action("1"), Action("20"), Action("300"))
sandboxed = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")


def kill_process(episode: Episode) -> None:
    assert isinstance(episode._environment, EnvironmentProcess)
    assert episode._environment._process
    os.kill(episode._environment._process.pid, signal.SIGKILL)


def played(
    data: dict[str, Any],
    *,
    kills_before: Sequence[int] = (),
    kill: Callable[[Episode], None] = kill_process,
    actions: Sequence[Action] = ACTIONS,
    name: str = NAME,
    limits: Limits | None = None,
) -> tuple[list[Step], int, Counter]:
    """Plays a conversation.

    Args:
        kills_before: actions, from 0, before which `kill` is called.

    Returns:
        (steps with that of `reset`, conversations held again, failures by reason)
    """

    async def play() -> tuple[list[Step], int, Counter]:
        async with Host(name, limits or Limits(seconds_a_step=patient(30.0))) as host:
            episode = host.episode(Task.of("0", data))
            steps = [await episode.reset()]
            for number, action in enumerate(actions):
                if number in kills_before:
                    kill(episode)
                if not steps[-1].done:
                    steps.append(await episode.step(action))
            await episode.close()
            return steps, host.take_held_again(), host.failures

    return asyncio.run(play())


def calls_in(log: Path) -> list[str]:
    return log.read_text().splitlines()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.mark.parametrize(
    ("deaths", "kills_before"),
    [({"0": 1}, ()), ({"1": 1}, ()), ({"3": 1}, ()), ({}, (0,)), ({}, (2,))],
    ids=["in reset", "in the first turn", "in the last turn", "before the first turn", "before the last turn"],
)
def test_a_conversation_whose_process_dies_once_is_the_undisturbed_one(deaths, kills_before, tmp_path, log):
    """Finds a conversation that leaves its group, or whose state lacks a turn, because a process was killed."""
    expected, _, _ = played({"log": str(tmp_path / "undisturbed"), "deaths": {}})
    steps, held_again, failures = played({"log": str(log), "deaths": deaths}, kills_before=kills_before)
    assert steps == expected
    assert steps[-1].verdict == Verdict.of(321.0)
    assert (held_again, failures) == (1, {})


@pytest.mark.parametrize("deaths", [{"2": 9}, {"1": 1, "3": 1}, {"0": 9}], ids=["one turn", "two turns", "reset"])
def test_a_conversation_whose_process_dies_twice_has_crashed(deaths, log):
    """Finds a policy that gains tries by killing its environment: there is one second try, with the same actions."""
    steps, held_again, failures = played({"log": str(log), "deaths": deaths})
    assert steps[-1].verdict
    assert steps[-1].verdict.failure_reason == "crashed"
    assert (held_again, failures) == (1, {"crashed": 1})
    assert calls_in(log).count("reset") == 2
    assert max(Counter(calls_in(log)).values()) == 2


def test_another_answer_than_before_ends_the_conversation_by_name(log):
    """Finds a conversation that goes on from another state than the model was told of."""
    steps, _, failures = played({"log": str(log), "deaths": {}, "shows_pid": True}, kills_before=(1,))
    assert steps[-1].verdict
    assert steps[-1].verdict.failure_reason == "differs"
    assert "reset: another observation" in steps[-1].verdict.detail
    assert failures == {"differs": 1}
    assert calls_in(log) == ["reset", "1: 1", "reset"]


def test_a_second_try_that_hangs_ends_at_its_own_limit(log):
    """Finds a second try without limits, and a third one behind it."""
    limits = Limits(seconds_a_step=patient(1.0))
    steps, _, failures = played({"log": str(log), "deaths": {}, "hangs": True}, kills_before=(0,), limits=limits)
    assert steps[-1].done
    assert failures == {"timeout": 1}
    assert calls_in(log) == ["reset", "reset"]


class DiesFirst:
    """Environments of which the first dies in its first turn, and the second uses so many seconds for `reset`."""

    sandboxes_again = 0

    def __init__(self, seconds: float) -> None:
        self.seconds, self.number = seconds, 0
        self.episode: Episode | None = None

    def seconds_again(self, environment: Any) -> float:
        return 0.0

    async def open(self) -> None:
        pass

    async def take(self) -> "DiesFirst":
        self.number += 1
        return self

    async def give_back(self, environment: Any, is_usable: bool) -> None:
        pass

    async def reset(self, task: Task) -> Observation:
        if self.number == 2:
            assert self.episode
            self.episode._seconds += self.seconds
        return Observation.user("begin")

    async def step(self, action: Action) -> Step:
        if self.number == 1:
            raise EnvironmentDiedError("killed")
        return Step(Observation(), True, Verdict.of(1.0))

    async def close(self) -> None:
        pass


@pytest.mark.parametrize(("share", "is_in_time"), [(0.9, True), (1.1, False)])
def test_a_second_try_has_the_seconds_of_a_conversation_for_itself(share, is_in_time):
    """Finds a conversation that ends as a timeout because it was held again, and a second try without a limit."""

    async def play() -> tuple[Step, float]:
        host = Host("tools")
        used_before = 0.5 * host.limits.seconds
        host._environments = environments = DiesFirst(share * host.limits.seconds)
        async with host:
            episode = environments.episode = host.episode(Task.of("0", {}))
            await episode.reset()
            episode._seconds = used_before
            return await episode.step(ACTIONS[0]), episode._seconds - used_before

    step, seconds = asyncio.run(play())
    assert step.verdict
    if is_in_time:
        assert step.verdict == Verdict.of(1.0)
        assert seconds < 100, "the second try is counted apart"
    else:
        assert step.verdict.failure_reason == "timeout"


# --- sandboxes ---


def sandbox_of(episode: Episode) -> Sandbox:
    environments = episode._host._environments
    assert isinstance(environments, OwnEnvironments)
    assert environments._sandboxes._sessions
    (sandbox,) = environments._sandboxes._sessions._all
    return sandbox


def killing(place: int) -> Callable[[Episode], None]:
    """Returns a function that kills one of the processes of a session in Python, and waits until those below it have
    ended: one that is still there could answer the next turn.

    Args:
        place: from the last one: -1 the interpreter, -2 the first process of the session, -3 the server inside.
    """

    def kill(episode: Episode) -> None:
        server = sandbox_of(episode)._server
        assert server
        processes = psutil.Process(server._process.pid).children(recursive=True)[place:]
        processes[0].kill()
        deadline = time.monotonic() + patient(30.0)
        while any(map(is_alive, processes)):
            assert time.monotonic() < deadline, f"still there: {processes}"
            time.sleep(0.01)

    return kill


def is_alive(process: psutil.Process) -> bool:
    # Whoever started it may not have read its end yet.
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


WORK = (call("python", code="import random\nx = random.random()\nx"), call("python", code="x + 1"), Action("4"))
QUESTION = {"prompt": "2 + 2?", "answer": "4", "files": {"a.txt": "hey\n"}}


@sandboxed
@pytest.mark.parametrize(
    "kill",
    [lambda episode: kill_server(sandbox_of(episode)), killing(-3), killing(-2), killing(-1)],
    ids=["sandbox", "server", "session", "interpreter"],
)
def test_a_session_whose_processes_are_killed_goes_on_with_its_variables(kill):
    """Finds a killed sandbox that the model is told of, so that its next turns are other ones."""
    expected, _, _ = played(QUESTION, actions=WORK, name="python")
    steps, held_again, failures = played(QUESTION, actions=WORK, name="python", kill=kill, kills_before=(1,))
    assert steps == expected
    assert reward(steps) == 1.0
    assert (held_again, failures) == (1, {})


@sandboxed
def test_code_that_kills_its_session_has_the_answer_of_one_try_and_a_verdict():
    """Finds code by which a policy escapes a bad reward: it kills itself behind output that no second try gives."""
    actions = (
        call("python", code="import time, os\ntime.time_ns()"),
        call("python", code="os.kill(os.getpid(), 9)"),
        call("python", code="os.kill(os.getpid(), 9)"),
        call("python", code="open('a.txt').read()"),
        Action("5"),
    )
    steps, held_again, failures = played(QUESTION, actions=actions, name="python")
    assert results(steps[2])[0]["exit_code"] == -9
    assert results(steps[2])[0]["note"] == "variables are lost"
    assert "NameError" in results(steps[3])[0]["output"]
    assert results(steps[4])[0]["output"] == "'hey\\n'\n"
    assert reward(steps) == 0.0
    assert (held_again, failures) == (1, {})


@sandboxed
def test_a_killed_session_whose_output_differs_is_lost_and_goes_on_empty():
    """Finds a session that goes on from another state than the model was told of, or that ends its conversation."""
    actions = (call("python", code="import time\nx = time.time_ns()\nx"), call("python", code="x"), Action("4"))
    steps, _, failures = played(
        QUESTION,
        actions=actions,
        name="python",
        kill=lambda episode: kill_server(sandbox_of(episode)),
        kills_before=(1,),
    )
    assert "files and variables are lost" in results(steps[2])[0]["error"]
    assert reward(steps) == 1.0
    assert not failures


class FailingSession:
    """A session whose machine is in trouble: it has no turn."""

    def __init__(self, session: Any) -> None:
        self.close = session.close

    def run(self, code: str) -> Turn:
        raise SessionFailedError("no core")


@sandboxed
def test_a_session_that_failed_on_a_busy_machine_goes_on_in_another_sandbox():
    """Finds a killed sandbox that costs a conversation its reward if no core is free at that moment; and one that is
    run again for ever."""
    with SessionPool(workers=1) as pool:
        session = pool.begin("python")
        session.run("x = 1").result()
        session._session = FailingSession(session._session)  # pyright: ignore[reportAttributeAccessIssue]
        assert session.run("x").result().output == "1\n"
        session._session = FailingSession(session._session)  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(SessionFailedError, match="no core"):
            session.run("x").result()
        session.close()
    assert pool.num_run_again == 1
