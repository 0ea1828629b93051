"""Values of an environment: a task, the model's actions, observations, and a verdict that is valid or has no number.

An environment is a class with three async methods. Everything that it gets and returns is one of the values here; they
hold no pointer into the environment, so each can be written down and read back.
"""

import hashlib
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, get_args

from dist_lm.chat import json_text
from dist_lm.chat.messages import Call, Json, Message, Tool
from dist_lm.errors import UserError, one_line, require

Failure = Literal[
    "timeout",  # `reset` or `step` exceeded its seconds, or the whole episode did
    "crashed",  # the environment raised, or its process ended
    "memory",  # its process exceeded the limit of memory
    "bad_reward",  # a reward is no finite number of fp32
    "bad_observation",  # the observation is no list of turns that a conversation can hold
    "bad_step",  # `step` returned something else than a Step, or `reset` something else than an Observation
    "bad_message",  # something else than an answer came from the environment's process
    "no_verdict",  # the conversation ended, or was cut, and the environment gave no verdict
    "too_long",  # the observation has more bytes than allowed
    "refused",  # the environment does not take this task
    "infrastructure",  # the sandbox or the machine failed, which says nothing about the model
    "differs",  # its process ended, and when the conversation was held again, an answer was another one than before
    "rewritten",  # in older records: a program sent turns that were no continuation of its conversation
]
"""Why a conversation has no reward; a closed list, so that failures can be counted by reason."""

FAILURES: tuple[Failure, ...] = get_args(Failure)
LAST_TURN = "turns"  # why the last turn that the limits allow is cut: it is whole, and none follows
MOST_DETAIL = 500  # characters of the text that says what failed
LARGEST_REWARD = (2 - 2**-23) * 2.0**127  # largest number of fp32: rewards are computed with in that


class RefusedTaskError(UserError):
    """Raised by `Environment.reset` for a task that this environment does not take; the message names the field."""


class BadRewardError(ValueError):
    """Raised for a reward that is no finite number, or one that leaves the range of fp32."""


class EnvironmentFailedError(Exception):
    """Ends a conversation without a reward.

    Args:
        reason: for the counts.
        detail: for people; kept as one line, in which a character that a terminal would obey stands as its escape.
    """

    def __init__(self, reason: Failure, detail: str = "") -> None:
        self.reason: Failure = reason
        self.detail = one_line(detail)[:MOST_DETAIL]
        super().__init__(f"{reason}: {self.detail}" if self.detail else reason)


class EnvironmentDiedError(EnvironmentFailedError):
    """Raised if the process of an environment ends. This need not be its doing, so the conversation is held again."""

    def __init__(self, detail: str) -> None:
        super().__init__("crashed", detail)


@dataclass(frozen=True)
class Task:
    """One task, immutable: its data is kept as text, and every reader gets a copy of its own."""

    key: str  # names the task among others, such as the number of its row
    text: str  # the data as JSON, keys sorted
    digest: str  # SHA-256 of key and data, in hex: equal tasks have equal digests on every machine

    @classmethod
    def of(cls, key: str, data: Mapping[str, Json]) -> Self:
        """Returns the task with this key and these data.

        Raises:
            ChatError: JSON cannot express the data; the message names the key.
        """
        text = json_text.write(_sorted(dict(data)), f"task {key}")
        return cls(key, text, hashlib.sha256(f"{key}\0{text}".encode()).hexdigest())

    @property
    def data(self) -> dict[str, Json]:
        """Returns a new copy of the data; what a reader does to it changes no task."""
        return json_text.read(self.text, f"task {self.key}")


@dataclass(frozen=True)
class Action:
    """One turn of the model."""

    text: str  # the text beside the calls, as the chat format parses it
    calls: tuple[Call, ...] = ()
    # Why no turn of the model can follow: a limit, or a turn that does not parse. The step must then be the last one,
    # with the verdict on what has been done. None: the model ended its turn, and may go on.
    cut: str | None = None


@dataclass(frozen=True)
class Observation:
    """The turns that follow the model's one; from `reset`, those that open the conversation, and the tools.

    An agent that rewrites its history, as by a summary, returns the whole of it with `begins_anew`.
    """

    messages: tuple[Message, ...] = ()
    # What the model may call, until the end or until the conversation begins anew; from `reset` and with `begins_anew`.
    tools: tuple[Tool, ...] = ()
    # From `step` only: these turns take the place of all before, and the model reads them as a sequence of their own.
    begins_anew: bool = False

    @classmethod
    def user(cls, text: str) -> Self:
        """Returns the observation of one turn of the user."""
        return cls((Message("user", text),))

    @classmethod
    def results(cls, *results: Json) -> Self:
        """Returns the observation of the results of the model's calls, one for each, in their order."""
        return cls((Message("tool", results=results),))


@dataclass(frozen=True)
class Verdict:
    """The judgement of a conversation: a finite reward, or the reason why there is none. Made by `of` and `failed`."""

    reward: float | None
    valid: bool
    failure_reason: Failure | None
    detail: str = ""  # for people: what happened, cut short

    def __post_init__(self) -> None:
        # A failure never becomes a number, whoever builds the verdict.
        if not self.is_sound:
            raise BadRewardError(
                f"a verdict with reward {self.reward!r} and reason {self.failure_reason!r}: use Verdict.of or "
                "Verdict.failed"
            )

    @property
    def is_sound(self) -> bool:
        """Whether this is a finite reward, or a known reason without a reward."""
        if self.valid is True:
            return type(self.reward) is float and math.isfinite(self.reward) and self.failure_reason is None
        return self.valid is False and self.reward is None and self.failure_reason in FAILURES

    @classmethod
    def of(cls, reward: float) -> Self:
        """Returns the valid verdict with this reward.

        Raises:
            BadRewardError: the reward is no finite number of fp32.
        """
        return cls(finite(reward), True, None)

    @classmethod
    def failed(cls, reason: Failure, detail: str = "") -> Self:
        """Returns the verdict of a conversation that cannot be judged, for one of the reasons in `FAILURES`."""
        return cls(None, False, reason, detail[:MOST_DETAIL])


@dataclass(frozen=True)
class Step:
    """The answer of an environment to a turn of the model."""

    observation: Observation
    done: bool
    verdict: Verdict | None = None  # with `done` only
    turn_reward: float = 0.0  # reward of this turn alone, beside that of the verdict; finite


class Environment(Protocol):
    """One conversation at a time: `reset`, then `step` until `done`; then `reset` again or `close`.

    An implementation may raise anything: `dist_lm.environments.host` turns it into a failed verdict.
    """

    async def reset(self, task: Task) -> Observation:
        """Begins a conversation and returns its first turns (system, user) and its tools.

        Raises:
            RefusedTaskError: the environment does not take this task.
        """
        ...

    async def step(self, action: Action) -> Step:
        """Executes a turn of the model and returns what follows.

        The same task and the same actions must give the same steps: resume and replay rely on it. A step that is
        `done` has the verdict.
        """
        ...

    async def close(self) -> None:
        """Ends everything that the environment holds; may be called at any time, and twice."""
        ...


@dataclass(frozen=True)
class Limits:
    """Limits of one conversation. The host holds all of them but `tokens`, which the caller counts."""

    turns: int = 16  # turns of the model
    tokens: int = 4096  # the whole conversation; where it begins anew, from there
    seconds_a_step: float = 30.0  # `reset`, and each `step`
    seconds: float = 600.0  # all steps together, by the clock, without the model's time
    observation_bytes: int = 65_536  # one observation, as JSON
    memory_bytes: int = 2 << 30  # a process with a user's environment

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require(value > 0, f"limits.{name}", value, "more than 0")
        # Results of many calls must fit, however short they are.
        require(self.observation_bytes >= 4096, "limits.observation_bytes", self.observation_bytes, "at least 4096")


def finite(reward: Any) -> float:
    """Returns a reward as a float.

    Raises:
        BadRewardError: it is no number, or none that fp32 can hold: NaN, an infinity, 1e39.
    """
    is_number = isinstance(reward, numbers.Real) and not isinstance(reward, bool)
    # Other kinds of numbers, such as fractions, are compared as they are; NaN compares with nothing.
    if is_number and -LARGEST_REWARD <= reward <= LARGEST_REWARD:
        return float(reward)
    raise BadRewardError(f"reward {reward!r:.100}: expected a finite number of fp32")


def _sorted(value: Json) -> Json:
    """Returns a JSON value with the keys of all objects in order, so that equal data have one text."""
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [_sorted(part) for part in value]
    return value
