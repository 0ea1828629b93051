"""A conversation as a value: who said what, which tools there are, what was called and what came of it."""

from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
Json = Any
"""What `json.loads` returns: None, bool, int, float, str, list, or dict with str keys."""


@dataclass(frozen=True)
class Tool:
    """A function that the assistant may call."""

    name: str
    description: str
    parameters: dict[str, Json]  # JSON schema of an object: its properties are the arguments


@dataclass(frozen=True)
class Call:
    """The assistant asks for a tool."""

    name: str
    arguments: dict[str, Json] = field(default_factory=dict)


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    content: str = ""
    calls: tuple[Call, ...] = ()  # of the assistant: after its text, all of them before any result comes
    results: tuple[Json, ...] = ()  # of the role tool: one a call of the turn before, in their order


@dataclass(frozen=True)
class Conversation:
    """Turns in their order, beneath the tools that may be called in any of them."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
