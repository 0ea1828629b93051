"""A tool that computes: a small function, from which the results in conversations really come."""

from collections.abc import Callable
from dataclasses import dataclass

from dist_lm.chat.messages import Json

Arguments = dict[str, Json]
VERBS = {
    "formula": (("calculate", "compute", "work out"), ("calculate", "work out", "compute", "tell me", "I need")),
    "service": (("check", "lookup", "query"), ("tell me", "check", "look up", "what is", "I want to know")),
}
"""By family: verbs of names, and of requests."""


@dataclass(frozen=True)
class Formula:
    """A function of its arguments, by their names in words."""

    key: str
    domain: str
    said: str  # in requests: `the area of a circle`
    takes: tuple[str, ...]  # `name kind`; with `?` optional
    run: Callable[[Arguments], Json]
    family: str = "formula"
