"""What an endpoint is: how it reads a body, and how it writes answers, whole or as a stream."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dist_lm.chat.openai_errors import error_value
from dist_lm.chat.openai_fields import Json
from dist_lm.generation.request import Answer
from dist_lm.server.answers import response_of
from dist_lm.server.engine_thread import Event
from dist_lm.server.job import Job
from dist_lm.server.requests import job_of
from dist_lm.server.served import Served
from dist_lm.server.stream import Chunks


class EventStream(Protocol):
    """The server-sent events of one response, as texts."""

    def of(self, event: Event) -> Iterator[str]:
        """Yields what new tokens or a complete answer say."""
        ...

    def end(self) -> Iterator[str]:
        """Yields what stands behind all answers."""
        ...

    def error(self, message: str, status: int) -> str:
        """Returns the last event of a response that fails."""
        ...


@dataclass(frozen=True)
class Api:
    """One endpoint that answers with text."""

    read: Callable[[Mapping[str, Json], Served, str], Job]  # (body, model, client); raises ProtocolError
    response: Callable[
        [Job, Sequence[Sequence[Answer]], int], Json
    ]  # (job, answers of each prompt, seconds since 1970)
    stream: Callable[[Job, int], EventStream]


class ChunkStream:
    """The stream of /v1/chat/completions and /v1/completions: chunks, and `[DONE]` at the end."""

    def __init__(self, job: Job, created: int) -> None:
        """
        Args:
            created: seconds since 1970.
        """
        self._chunks = Chunks(job, created)

    def of(self, event: Event) -> Iterator[str]:
        """Yields the chunks of an event."""
        yield from map(_line, self._chunks.of(event))

    def end(self) -> Iterator[str]:
        """Yields the counts of tokens, if they were asked for, and the mark of the end."""
        yield from map(_line, self._chunks.end())
        yield "data: [DONE]\n\n"

    def error(self, message: str, status: int) -> str:
        """Returns an error in OpenAI's form."""
        return _line(error_value(message, status))


def _line(value: Json) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


CHAT = Api(lambda body, served, client: job_of("chat", body, served, client), response_of, ChunkStream)
COMPLETIONS = Api(lambda body, served, client: job_of("completions", body, served, client), response_of, ChunkStream)
