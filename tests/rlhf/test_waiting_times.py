"""Times of conversations: who is waited for, and no conversation that is counted twice."""

import asyncio
from dataclasses import dataclass

import pytest

from dist_lm.environments.protocol import Action, Observation, Step, Task, Verdict
from dist_lm.generation.request import Answer, Request, SamplingParams
from dist_lm.rlhf.waiting_times import WaitingTimes

SLOW_S = 0.05


@dataclass
class Slow:
    """An environment, and a model, that wait."""

    environment_s: float
    model_s: float

    def episode(self, task: Task) -> "Slow":
        return self

    async def reset(self) -> Step:
        await asyncio.sleep(self.environment_s)
        return Step(Observation.user("Go"), False)

    async def step(self, action: Action) -> Step:
        await asyncio.sleep(self.environment_s)
        if action.text == "fail":
            raise RuntimeError(action.text)
        return Step(Observation(), True, Verdict.of(1.0))

    async def close(self) -> None:
        pass

    async def ask(self, request: Request) -> Answer:
        await asyncio.sleep(self.model_s)
        return Answer(request.id, 0, 0, (1,), "", (-1.0,), (-1.0,), "stop", 0, 0)


def held(times: WaitingTimes, slow: Slow, text: str = "ok") -> None:
    async def hold() -> None:
        episode = times.host(slow).episode(Task.of("0", {}))
        await episode.reset()
        await times.ask(slow.ask)(Request("0", [1], SamplingParams()))
        await episode.step(Action(text))
        await episode.close()

    asyncio.run(hold())


@pytest.mark.parametrize(("environment_s", "model_s"), [(SLOW_S, 0.0), (0.0, SLOW_S)])
def test_the_slow_side_is_named(environment_s, model_s):
    """Finds waiting that is added to the other side, or counted from another clock."""
    times = WaitingTimes()
    for _ in range(2):
        held(times, Slow(environment_s, model_s))
    means = times.take()
    assert means["timing/environment_s"] >= 2 * environment_s
    assert means["timing/model_s"] >= model_s
    slow, fast = ("environment", "model") if environment_s else ("model", "environment")
    assert means[f"timing/{slow}_s"] > means[f"timing/{fast}_s"]
    assert times.take() == {}


def test_a_step_that_raises_is_timed_too():
    """Finds the time of failed steps that is lost."""
    times = WaitingTimes()
    with pytest.raises(RuntimeError):
        held(times, Slow(SLOW_S, 0.0), "fail")
    assert times.take()["timing/environment_s"] >= 2 * SLOW_S
