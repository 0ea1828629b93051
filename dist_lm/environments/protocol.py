"""What an environment is: a task, the model's actions, what it observes, and a verdict that is valid or has no number.

An environment is a class with three async methods. Everything that it gets and returns is one of the values here; they
hold no pointer into the environment, so each can be written down and read back.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, Self, get_args, runtime_checkable

from dist_lm.chat import json_text
from dist_lm.chat.messages import Call, Json, Message, Tool
from dist_lm.errors import UserError

Failure = Literal[
    "timeout",  # `reset` or `step` exceeded its seconds, or the whole episode did
    "crashed",  # the environment raised, or its process ended
    "memory",  # its process exceeded the limit of memory
    "bad_reward",  # a reward is no finite number
    "bad_observation",  # the observation is no list of turns that a conversation can hold
    "bad_message",  # something else than an answer came from the environment's process
    "too_long",  # the observation has more bytes than allowed
    "refused",  # the environment does not take this task
    "infrastructure",  # the sandbox or the machine failed, which says nothing about the model
]
"""Why a conversation has no reward; a closed list, so that failures can be counted by reason."""

FAILURES: tuple[Failure, ...] = get_args(Failure)


class RefusedTaskError(UserError):
    """Raised by `Environment.reset` for a task that this environment does not take; the message names the field."""


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
    cut: str | None = None  # why the turn ended early (a limit, or it could not be parsed); None: the model ended it


@dataclass(frozen=True)
class Observation:
    """The turns that follow the model's one; from `reset`, those that open the conversation, and the tools."""

    messages: tuple[Message, ...] = ()
    tools: tuple[Tool, ...] = ()  # from `reset` only: what the model may call until the end


@dataclass(frozen=True)
class Verdict:
    """The judgement of a conversation: a finite reward, or the reason why there is none. Made by `of` and `failed`."""

    reward: float | None
    valid: bool
    failure_reason: Failure | None
    detail: str = ""  # for people: what happened, cut short

    def __post_init__(self) -> None:
        # A failure never becomes a number, whoever builds the verdict.
        is_number = type(self.reward) is float and math.isfinite(self.reward)
        if self.valid and (not is_number or self.failure_reason is not None):
            raise ValueError(f"a valid verdict with {self.reward!r}, {self.failure_reason!r}: use Verdict.of")
        if not self.valid and (self.reward is not None or self.failure_reason not in FAILURES):
            raise ValueError(f"a failed verdict with {self.reward!r}, {self.failure_reason!r}: use Verdict.failed")

    @classmethod
    def of(cls, reward: float) -> Self:
        """Returns the valid verdict with this reward.

        Raises:
            ValueError: the reward is not finite.
        """
        if not math.isfinite(reward):
            raise ValueError(f"reward {reward}: expected a finite number")
        return cls(float(reward), True, None)

    @classmethod
    def failed(cls, reason: Failure, detail: str = "") -> Self:
        """Returns the verdict of a conversation that cannot be judged, for one of the reasons in `FAILURES`."""
        return cls(None, False, reason, detail)


@dataclass(frozen=True)
class Step:
    """What follows a turn of the model."""

    observation: Observation
    done: bool
    verdict: Verdict | None = None  # with `done` only
    turn_reward: float = 0.0  # reward of this turn alone, beside that of the verdict; finite


@runtime_checkable
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

        The same task and the same actions must give the same steps: resume and replay rely on it.
        """
        ...

    async def close(self) -> None:
        """Ends everything that the environment holds; may be called at any time, and twice."""
        ...


@dataclass(frozen=True)
class Limits:
    """Limits of one conversation. The host holds all of them but `tokens`, which the caller counts."""

    turns: int = 16  # turns of the model
    tokens: int = 4096  # of the whole conversation
    seconds_a_step: float = 30.0  # of `reset` and of each `step`
    seconds: float = 600.0  # of all steps together, by the clock, without the model's time
    observation_bytes: int = 65_536  # of one observation, as JSON
    memory_bytes: int = 2 << 30  # of a process with a user's environment


def _sorted(value: Json) -> Json:
    """Returns a JSON value with the keys of all objects in order, so that equal data have one text."""
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [_sorted(part) for part in value]
    return value
