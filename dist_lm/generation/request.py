"""What goes into an engine and what comes out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dist_lm.errors import UserError
from dist_lm.generation.params import SamplingParams

OnText = Callable[[str, int, int, str], None]
"""(request id, index of the answer, token, text that can be shown now)."""

FinishReason = Literal["eot", "stop", "length", "context", "cancelled"]


class RequestError(UserError):
    """A request that cannot be done; others are not harmed. `request`: its id; `reason`: why."""

    def __init__(self, request: str, message: str) -> None:
        super().__init__(f"request {request}: {message}")
        self.request = request
        self.reason = message


@dataclass(frozen=True)
class Request:
    """A prompt, and how it is to be gone on with."""

    id: str
    prompt: Sequence[int]  # token ids; begins with end-of-text where a document begins
    params: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0  # the answers are a function of prompt, params and seed
    n: int = 1  # answers, which share the prompt's place in the cache
    truncate: Literal["refuse", "left"] = "refuse"  # a prompt that leaves no room in the context


@dataclass(frozen=True)
class Answer:
    """One answer to a request."""

    request: str
    index: int  # among the request's answers
    prompt_tokens: int
    tokens: tuple[int, ...]  # all that were drawn, with the one that ended it
    text: str  # without the stop text; empty where the engine has no vocabulary
    logprobs: tuple[float, ...]  # of each token, nats: under the distribution it was drawn from
    raw_logprobs: tuple[float, ...]  # under the model's own
    finish: FinishReason
    seed: int
    version: int  # of the weights


@dataclass(frozen=True)
class Refusal:
    """A request that came to nothing, found while it ran."""

    request: str
    error: str
