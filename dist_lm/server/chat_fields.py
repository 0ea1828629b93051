"""Fields of a chat: the conversation, its tools, and the calls that the answer may have."""

from collections.abc import Mapping
from dataclasses import dataclass

from dist_lm.chat.layouts.turns import conversation_of
from dist_lm.chat.messages import ChatError, Conversation
from dist_lm.chat.openai_errors import ProtocolError
from dist_lm.chat.openai_fields import Json, check_size, typed
from dist_lm.errors import UserError
from dist_lm.generation.call_grammar import ToolChoice, call_constraint
from dist_lm.generation.constraint import Constraint
from dist_lm.server.served import Served

LONGEST_NAME = 128  # characters of a tool's name


@dataclass(frozen=True)
class Chat:
    """What the body of a chat says beside its sampling."""

    conversation: Conversation
    prompt: list[int]
    n_remembered: int  # as in `Job`
    constraint: Constraint | None
    reads_calls: bool


def chat_of(body: Mapping[str, Json], served: Served, constraint: Constraint | None, client: str) -> Chat:
    """Returns the conversation with its prompt, and the constraint of the answer.

    Args:
        constraint: that of the whole answer.
        client: whose remembered ids are used.

    Raises:
        ProtocolError: the conversation or the tools are not well formed, or a schema cannot be held to.
    """
    tools = typed(body, "tools", list, [])
    if not all(isinstance(tool, dict) for tool in tools):
        raise ProtocolError("tools: expected objects with type and function", param="tools")
    if tools:
        check_size(tools, "tools", served.limits.schema_bytes)
    messages = typed(body, "messages", list, None)
    if not messages:
        raise ProtocolError("messages: expected at least one", param="messages")
    try:
        conversation = conversation_of(messages, tools or None, style="openai")
        ids, n_remembered = served.conversations.prompt(conversation, client)
    except UserError as error:
        param = "tools" if str(error).startswith("tool ") else "messages"
        raise ProtocolError(str(error), param=param) from error

    choice = _tool_choice(body, bool(conversation.tools))
    if not conversation.tools:
        return Chat(conversation, ids, n_remembered, constraint, reads_calls=False)
    if constraint:
        if choice.mode != "none":
            raise ProtocolError(
                "response_format: expected no tools beside it, or tool_choice=none", param="response_format"
            )
        return Chat(conversation, ids, n_remembered, constraint, reads_calls=False)

    # OpenAI's `strict` asks that the schema is held to exactly; otherwise a call may break what no grammar can say.
    is_strict = any((tool.get("function") or tool).get("strict") is True for tool in tools)
    try:
        constraint = call_constraint(conversation.tools, served.tokenizer, choice, strict=is_strict)
    except ChatError as error:
        param = "tool_choice" if str(error).startswith("tool_choice") else "tools"
        raise ProtocolError(str(error), param=param) from error
    return Chat(conversation, ids, n_remembered, constraint, reads_calls=True)


def _tool_choice(body: Mapping[str, Json], has_tools: bool) -> ToolChoice:
    """Returns which calls the answer may have.

    Raises:
        ProtocolError: it has another form, or asks for calls without tools.
    """
    parallel = typed(body, "parallel_tool_calls", bool, True)
    value = body.get("tool_choice")
    mode = "auto" if value is None else value
    if isinstance(value, dict):
        function = value.get("function")
        mode = function.get("name") if isinstance(function, dict) else None
    elif mode not in ("auto", "none", "required"):
        mode = None

    if not isinstance(mode, str) or len(mode) > LONGEST_NAME:
        raise ProtocolError(
            "tool_choice: expected auto, none, required or {type: function, function: {name: ...}}",
            param="tool_choice",
        )
    if not has_tools and mode not in ("auto", "none"):
        raise ProtocolError("tool_choice: expected tools beside it", param="tool_choice")
    return ToolChoice(mode, parallel)
