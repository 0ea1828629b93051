"""Runs conversations with an environment under limits, many at once: `async with Host("python") as host: ...`.

    episode = host.episode(task)
    step = await episode.reset()
    while not step.done:
        step = await episode.step(action)
    step.verdict

Whatever an environment does, `reset` and `step` return a step: a hang, a crash, a reward that is no number or an
observation that no conversation can hold end the conversation with a failed verdict, never with a number or an
exception. Conversations share nothing, so a slow one stops no other.

A conversation whose process ends is held once more: a fresh one executes the actions so far again, must answer as the
first one did, and goes on with the action at which that ended. The model neither draws a turn again nor sees what the
first one would have answered, so a policy gains nothing by ending its environment.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, TypeVar

from dist_lm.environments.own import OwnEnvironments, own_names
from dist_lm.environments.program_command import PROGRAM
from dist_lm.environments.protocol import (
    LAST_TURN,
    Action,
    Environment,
    EnvironmentDiedError,
    EnvironmentFailedError,
    Failure,
    Limits,
    Observation,
    Step,
    Task,
    Verdict,
)
from dist_lm.environments.sandboxes import OWN_SLACK_S, again_seconds
from dist_lm.environments.served import failure_in
from dist_lm.environments.source import Environments
from dist_lm.environments.user_process import UserEnvironments
from dist_lm.environments.values import checked_observation, checked_step, step_value
from dist_lm.errors import ConfigError, did_you_mean

log = logging.getLogger(__name__)
Returned = TypeVar("Returned")
DEFAULT_LIMITS = Limits()


class Host:
    """Runs conversations with one kind of environment. An async context manager, for one event loop.

    Args:
        name: an own environment (`own_names`), a user's class, FILE:CLASS or PACKAGE.MODULE:CLASS, or program:COMMAND.
        limits: of each conversation.
        workers: steps of own environments that run at once, others wait; 0: four for each core, since many sleep.
        trust_me: run code of the model without isolation where the machine allows none.

    Raises:
        ConfigError: there is no own environment of this name, or no command.
    """

    def __init__(self, name: str, limits: Limits = DEFAULT_LIMITS, workers: int = 0, trust_me: bool = False) -> None:
        self.limits = limits
        self.failures: Counter[Failure] = Counter()  # conversations without a reward, by reason
        self._processes_again = 0  # conversations that were held again because their process had ended
        self._num_taken = 0  # of these and those of sandboxes, by `take_held_again`
        self._leaving: set[asyncio.Future[None]] = set()  # environments that are being given back
        if ":" in name:
            self._environments: Environments = _environments_of_user(name, limits)
            self._slots: Callable[[], AbstractAsyncContextManager[Any]] = nullcontext
            self._slack_s = self._most_again_s = 0.0
            return

        if name not in own_names():
            hint = did_you_mean(name, own_names())
            raise ConfigError(
                f"environment {name}: {hint}expected {', '.join(own_names())}, FILE:CLASS or {PROGRAM}COMMAND"
            )
        own_environments = OwnEnvironments(name, limits, workers, trust_me)
        self._environments, self._slack_s = own_environments, OWN_SLACK_S
        self._slots = own_environments.slot
        self._most_again_s = again_seconds(limits)

    def take_held_again(self) -> int:
        """Returns how many conversations were executed again since the last call, because a process or a sandbox had
        ended. For any thread."""
        total = self._processes_again + self._environments.sandboxes_again
        number, self._num_taken = total - self._num_taken, total
        return number

    async def __aenter__(self) -> Self:
        """Raises UserError if the user's class cannot be imported, and SandboxError if a sandbox is needed and none can
        be made."""
        try:
            await self._environments.open()
        except BaseException:
            await self._environments.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        # Environments on their way back still need what `close` ends.
        await asyncio.gather(*self._leaving)
        await self._environments.close()

    def episode(self, task: Task) -> "Episode":
        """Returns a conversation about a task, which `reset` begins."""
        return Episode(self, task)


def _environments_of_user(name: str, limits: Limits) -> Environments:
    """Returns the source of a user's environments: a class, or a program. Raises ConfigError: no command is there."""
    if not name.startswith(PROGRAM):
        return UserEnvironments(name, limits)
    # Imported here, because other environments need no HTTP.
    from dist_lm.environments.agent_program import ProgramEnvironments

    return ProgramEnvironments(name, limits)


class Episode:
    """One conversation. Its methods are called one after another; they raise nothing but CancelledError."""

    def __init__(self, host: Host, task: Task) -> None:
        self._host, self.task = host, task
        self._environment: Environment | None = None
        self._turns = 0
        self._seconds = 0.0  # time of the environment so far
        self._opening: Step | None = None
        self._steps: list[tuple[Action, Step]] = []  # actions so far, with their steps
        self._is_second = False  # whether the conversation is held again
        self._last: Step | None = None  # the final step

    async def reset(self) -> Step:
        """Begins the conversation and returns its first turns and tools; or the final step, if that failed."""
        opening = await self._answer(self._begin)
        if not opening.done:
            self._opening = opening
        return opening

    async def step(self, action: Action) -> Step:
        """Executes a turn of the model and returns what follows. The last allowed turn is cut, so it has a verdict.

        After the final step, returns that again.
        """
        if self._last is not None or self._environment is None:
            return self._last or await self._fail(EnvironmentFailedError("crashed", "a step before reset"))

        self._turns += 1
        if self._turns >= self._host.limits.turns and not action.cut:
            action = replace(action, cut=LAST_TURN)
        step = await self._answer(lambda: self._execute(action))
        if self._last is not None:
            return step

        self._steps.append((action, step))
        if step.done:
            assert step.verdict is not None
            if not step.verdict.valid:
                self._note(EnvironmentFailedError(step.verdict.failure_reason or "crashed", step.verdict.detail))
            self._last = step
            await self._leave(is_usable=True)
        return step

    async def close(self) -> None:
        """Ends the conversation, wherever it is; may be called twice."""
        await self._leave(is_usable=self._last is None)

    async def _answer(self, call: Callable[[], Awaitable[Step]]) -> Step:
        """Returns the environment's answer, a second one's if its process ends; or the final step, if that failed. What
        the environment raises is in the final step; only a cancelled task raises.
        """
        try:
            try:
                return await call()
            except EnvironmentDiedError as death:
                # The second try has as many seconds as the conversation, and leaves those of the first as they are.
                seconds, self._seconds = self._seconds, 0.0
                await self._hold_again(death)
                step = await call()
                self._seconds = seconds
                return step
        except asyncio.CancelledError:
            await self._leave(is_usable=False)
            raise
        # An environment may raise anything, SystemExit too; it must end its own conversation alone.
        except BaseException as error:
            return await self._fail(failure_in(error))

    async def _begin(self) -> Step:
        """Takes an environment and returns its first step."""
        self._environment = environment = await self._host._environments.take()
        observation = await self._limited(lambda: environment.reset(self.task))
        return Step(checked_observation(observation, self._host.limits.observation_bytes), done=False)

    async def _execute(self, action: Action) -> Step:
        environment = self._environment
        assert environment is not None, "reset comes first"
        step = await self._limited(lambda: environment.step(action))
        return checked_step(step, action, self._host.limits.observation_bytes)

    async def _hold_again(self, death: EnvironmentDiedError) -> None:
        """Lets a fresh environment execute all actions that have their steps.

        Raises:
            EnvironmentDiedError: the conversation was held again before.
            EnvironmentFailedError: an answer is another one than the first time (`differs`).
            Exception: what the environment raises.
        """
        if self._is_second:
            raise death
        self._is_second = True
        self._host._processes_again += 1
        log.warning("task %s is held again: %s", self.task.key, death)
        await self._leave(is_usable=False)
        # `call` begins a conversation that has not begun yet.
        if self._opening is None:
            return

        _check_equal("reset", self._opening, await self._begin())
        for number, (action, step) in enumerate(self._steps, 1):
            _check_equal(f"turn {number}", step, await self._execute(action))

    async def _limited(self, call: Callable[[], Awaitable[Returned]]) -> Returned:
        """Awaits a call of the environment for as long as the limits allow.

        Raises:
            EnvironmentFailedError: it took longer, or the conversation has used its seconds.
            Exception: what the environment raises.
        """
        limits, environments = self._host.limits, self._host._environments
        async with self._host._slots():
            remaining_s = limits.seconds - self._seconds
            allowed_s = min(limits.seconds_a_step + self._host._slack_s, remaining_s)
            begin, again_s = time.monotonic(), environments.seconds_again(self._environment)

            try:
                if allowed_s <= 0:
                    raise EnvironmentFailedError("timeout", f"the conversation took longer than {limits.seconds:g} s")
                # Not `asyncio.wait_for`: a TimeoutError of the environment's own is a crash.
                async with asyncio.timeout(allowed_s + self._host._most_again_s) as timer:
                    answer = await call()
            except TimeoutError:
                if not timer.expired():
                    raise
                raise EnvironmentFailedError("timeout", f"a step took longer than {allowed_s:g} s") from None
            finally:
                again_s = environments.seconds_again(self._environment) - again_s
                self._seconds += time.monotonic() - begin - again_s

        # A call that executed nothing again had more time than its conversation.
        if self._seconds > limits.seconds:
            raise EnvironmentFailedError("timeout", f"the conversation took longer than {limits.seconds:g} s")
        return answer

    async def _fail(self, failure: EnvironmentFailedError) -> Step:
        """Ends the conversation without a reward and returns its final step."""
        self._note(failure)
        self._last = Step(Observation(), done=True, verdict=Verdict.failed(failure.reason, failure.detail))
        # An environment that refused a task or a message is in order; any other may be in any state.
        await self._leave(is_usable=failure.reason == "refused")
        return self._last

    def _note(self, failure: EnvironmentFailedError) -> None:
        self._host.failures[failure.reason] += 1
        log.info("task %s has no reward: %s", self.task.key, failure)

    async def _leave(self, is_usable: bool) -> None:
        environment, self._environment = self._environment, None
        if environment is None:
            return
        # Shielded, because a caller that is cancelled must not leave a process behind.
        leaving = asyncio.ensure_future(self._host._environments.give_back(environment, is_usable))
        self._host._leaving.add(leaving)
        leaving.add_done_callback(self._host._leaving.discard)
        await asyncio.shield(leaving)


def _check_equal(place: str, first: Step, second: Step) -> None:
    """Raises EnvironmentFailedError: two answers to the same action differ."""
    parts, again = step_value(first), step_value(second)
    for name, value in parts.items():
        if again[name] != value:
            raise EnvironmentFailedError("differs", f"{place}: another {name} when the conversation was held again")
