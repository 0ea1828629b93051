"""A request as a value: what the engine gets, and what the response needs beside the answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from dist_lm.chat.messages import Conversation
from dist_lm.chat.openai_fields import Json
from dist_lm.generation.request import Request
from dist_lm.server.served import Served

Endpoint = Literal["chat", "completions"]


@dataclass(frozen=True)
class Job:
    """A request for the engine, and what its response needs."""

    id: str
    endpoint: Endpoint
    served: Served
    requests: tuple[Request, ...]  # one for each prompt
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False
    return_token_ids: bool = False
    reads_calls: bool = False  # whether answers are turns that may have calls
    conversation: Conversation | None = None  # the chat, if it is one
    n_remembered: int = 0  # tokens of the prompt that are those of the conversation's last answer and all before it
    client: str = ""  # the key that the client has sent; what is remembered of others is not for it
    asked: Mapping[str, Json] = field(default_factory=dict)  # further fields of the request that the response repeats

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt) for request in self.requests)

    def with_asked(self, asked: Mapping[str, Json]) -> "Job":
        """Returns the job with fields of the request that its response repeats."""
        return replace(self, asked=asked)
