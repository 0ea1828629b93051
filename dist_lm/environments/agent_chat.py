"""Chats of a program with the model in the form of OpenAI's API: requests read and compared, answers written.

A program sends the whole conversation with each request. Where it sends again what it has said and heard before, in any
form of the same content, only what is new becomes an observation, and the ids of earlier turns stay as they are. Where
it has written its history anew, the conversation begins anew with all that it sends.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dist_lm.chat.layouts.openai import ROLES, call_of, call_value
from dist_lm.chat.layouts.tools import tools_of
from dist_lm.chat.layouts.transcript import list_of, text_of, value_of
from dist_lm.chat.layouts.turns import conversation_of
from dist_lm.chat.messages import ChatError, Json, Message, check_conversation, shown
from dist_lm.chat.openai_errors import ProtocolError
from dist_lm.chat.openai_fields import check_fields, typed
from dist_lm.environments.protocol import Action, EnvironmentFailedError, Observation

READ = {"model", "messages", "tools", "stream"}
# How turns are drawn is the run's, so that its losses are of the distribution that it draws from.
IGNORED = {
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"),
    *("max_tokens", "max_completion_tokens", "seed", "logit_bias", "stream_options", "reasoning_effort", "verbosity"),
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
}
# A program would rely on these, and a turn as it was drawn need not obey them.
DEFAULTS: dict[str, Sequence[Json]] = {
    "n": (1, None),
    "stop": (None, []),
    "tool_choice": ("auto", None),
    "parallel_tool_calls": (True, None),
    "response_format": ({"type": "text"}, None),
    "logprobs": (False, None),
    "top_logprobs": (0, None),
}
NO_ROOM = ("tokens", "context")  # limits that end a turn in the middle


@dataclass(frozen=True)
class HeardTurn:
    """The content of a turn, equal for all forms in which a program may send it."""

    role: str
    text: str
    calls: tuple[tuple[str, Json], ...] = ()  # name and arguments
    call_id: str = ""  # of the call whose result this is


@dataclass(frozen=True)
class ChatRequest:
    """A request for the next turn of the model."""

    messages: Sequence[Json]  # as they came
    turns: tuple[HeardTurn, ...]  # their content
    tools: Json
    model: str
    stream: bool


def chat_request(body: Mapping[str, Json]) -> ChatRequest:
    """Returns the request of a body.

    Raises:
        ProtocolError: a field is not supported or has another type, or a message has another form.
    """
    check_fields(body, READ | IGNORED, DEFAULTS)
    messages = typed(body, "messages", list, [])
    if not messages:
        raise ProtocolError("messages: expected at least one", param="messages")
    try:
        turns = tuple(_heard(message, f"turn {number}") for number, message in enumerate(messages))
    except ChatError as error:
        raise ProtocolError(str(error), param="messages") from error
    tools = typed(body, "tools", list, [])
    return ChatRequest(messages, turns, tools, typed(body, "model", str, ""), typed(body, "stream", bool, False))


def _heard(message: Json, where: str) -> HeardTurn:
    if not isinstance(message, Mapping) or ROLES.get(str(message.get("role"))) is None:
        raise ChatError(f"{where}: {shown(message)}; expected an object with a role of {', '.join(ROLES)}")
    role, text = ROLES[message["role"]], text_of(message.get("content"), where)
    if role == "tool":
        return HeardTurn(role, text, call_id=str(message.get("tool_call_id") or ""))
    if role != "assistant":
        return HeardTurn(role, text)

    # Clients add keys to the answers that they keep, and some strip the text; the ids are recorded anyway.
    call_objects = list_of(value_of(message.get("tool_calls"), where) or [], where)
    calls = [call_of(value, f"{where}, call {index}") for index, value in enumerate(call_objects)]
    return HeardTurn(role, text.strip(), tuple((call.name, call.arguments) for call in calls))


def opening_of(request: ChatRequest) -> Observation:
    """Returns the observation that a request is which begins a conversation: its turns, and its tools.

    Raises:
        ProtocolError: they are no conversation, or its next turn is not the model's.
    """
    try:
        tools = tools_of(request.tools or None)
    except ChatError as error:
        raise ProtocolError(str(error), param="tools") from error
    try:
        # Without tools: wrong calls of the model, and calls of tools that it has no more, may stand in a history.
        conversation = conversation_of(request.messages, style="openai")
        check_conversation(conversation)
        if conversation.messages[-1].role not in ("user", "tool"):
            raise ChatError("the last turn is the model's own; expected one of user or tool, which it answers")
    except ChatError as error:
        raise ProtocolError(str(error), param="messages") from error
    return Observation(conversation.messages, tools)


# --- answers ---


@dataclass(frozen=True)
class ChatAnswer:
    """The model's turn, as the answer to a request."""

    request: ChatRequest
    action: Action
    number: int  # of the turn, from 0

    @property
    def message(self) -> dict[str, Json]:
        """The turn as a message. Equal turns have equal ids of their calls, so that a program repeats itself."""
        message: dict[str, Json] = {"role": "assistant", "content": self.action.text, "refusal": None}
        if self.action.calls:
            message["content"] = self.action.text or None
            ids = (f"call_{self.number}_{index}" for index in range(len(self.action.calls)))
            message["tool_calls"] = [call_value(call, id) for call, id in zip(self.action.calls, ids, strict=True)]
        return message

    @property
    def finish(self) -> str:
        """Why the turn ended, in OpenAI's words."""
        if self.action.cut in NO_ROOM:
            return "length"
        return "tool_calls" if self.action.calls else "stop"

    @property
    def response(self) -> dict[str, Json]:
        """The whole response."""
        choice = {"index": 0, "message": self.message, "finish_reason": self.finish, "logprobs": None}
        return self._head("chat.completion") | {"choices": [choice]}

    def chunks(self) -> Iterator[dict[str, Json]]:
        """Yields the chunks of a streamed response: the turn, and the reason of its end."""
        delta = self.message
        if calls := delta.get("tool_calls"):
            delta["tool_calls"] = [{"index": index} | call for index, call in enumerate(calls)]
        for part, finish in ((delta, None), ({}, self.finish)):
            choice = {"index": 0, "delta": part, "finish_reason": finish, "logprobs": None}
            yield self._head("chat.completion.chunk") | {"choices": [choice]}

    def _head(self, kind: str) -> dict[str, Json]:
        created = int(time.time())
        return {"id": f"chatcmpl-{self.number}", "object": kind, "created": created, "model": self.request.model}

    def rewritten(self, request: ChatRequest) -> str:
        """Returns how the next request changes what was said and heard so far, in words: its tools, the first turn that
        differs, or missing turns; empty: it goes on from there.
        """
        if request.tools != self.request.tools:
            return "the tools differ from those of the request before"

        said = (*self.request.turns, _heard(self.message, "answer"))
        for number, (before, now) in enumerate(zip(said, request.turns, strict=False)):
            if before != now:
                return f"turn {number} ({now.role}) differs from what it was"
        if len(request.turns) < len(said):
            return f"{len(request.turns)} turns, where {len(said)} have been"
        return ""

    def continuation(self, request: ChatRequest) -> Observation:
        """Returns what the next request adds to the conversation; for one that has rewritten nothing.

        Raises:
            EnvironmentFailedError: what it adds has another form (`bad_observation`).
        """
        # Results are ordered by the ids of the calls, so the turn with the calls goes before them.
        turn = self.message if self.action.calls else {"role": "assistant", "content": "."}
        n_said = len(self.request.turns) + 1
        added = request.messages[n_said:]
        try:
            conversation = conversation_of([{"role": "user", "content": "."}, turn, *added], style="openai")
        except ChatError as error:
            raise EnvironmentFailedError("bad_observation", f"after turn {n_said - 1}: {error}") from None
        messages: tuple[Message, ...] = conversation.messages[2:]
        return Observation(messages)
