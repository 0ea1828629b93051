"""Defines a conversation as a value, turns, tools, calls and results, and checks the rules that it must obey."""

from dataclasses import dataclass, field
from typing import Any, Literal

from dist_lm.errors import UserError, utf8

Role = Literal["system", "user", "assistant", "tool"]
ROLES = ("system", "user", "assistant", "tool")
# These stand around the thinking of a turn, in our layout and in those of most models.
BEGIN_THINKING, END_THINKING = "<think>", "</think>"
Json = Any
"""A value that `json.loads` returns: None, bool, int, float, str, list, or dict with str keys."""


class ChatError(UserError):
    """Raised for a conversation that is not well formed, and for tokens that hold none; names the turn or the token."""


@dataclass(frozen=True)
class Tool:
    """A function that the assistant may call."""

    name: str
    description: str
    parameters: dict[str, Json]  # JSON schema of an object whose properties are the arguments


@dataclass(frozen=True)
class Call:
    """A call of a tool by the assistant."""

    name: str
    arguments: dict[str, Json] = field(default_factory=dict)


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    content: str = ""
    calls: tuple[Call, ...] = ()  # for role assistant: calls follow the text, and no result comes between them
    results: tuple[Json, ...] = ()  # for role tool: one result for each call of the previous turn, in the same order
    thinking: str = ""  # for role assistant: reasoning, which comes before the text
    learn: bool = True  # for role assistant: whether the loss counts the turn
    learn_thinking: bool = True  # whether the loss counts `thinking` where it counts the turn


@dataclass(frozen=True)
class Conversation:
    """Turns in their order, and the tools that every turn of the assistant may call."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()


def check_conversation(conversation: Conversation) -> None:
    """Refuses a conversation that the template cannot lay out; returns nothing.

    Turns must follow one another as roles allow, and results must be as many as the calls before. A system turn may
    stand anywhere but between calls and their results, and behind the last answer; it changes nothing in the order of
    the others. Arguments of calls are not compared with the tools, and whether JSON can hold results and arguments is
    not checked.

    Raises:
        ChatError: the message names the turn (from 0) and what was expected there.
    """
    check_tools(conversation.tools)
    if type(conversation.messages) is not tuple:
        raise ChatError(f"messages: a {type(conversation.messages).__name__}; expected a tuple of {__name__}.Message")

    previous: Message | None = None  # the last turn that is none of the system
    for number, message in enumerate(conversation.messages):
        where = turn_name(number, message)
        check_message(message, where)
        if message.role == "system" and not (previous and previous.calls):
            continue

        roles = _next_roles(previous)
        if message.role not in roles:
            after = ""
            if previous:
                after = f" after {previous.role}{' with calls' if previous.calls else ''}"
            raise ChatError(f"{where}: expected {' or '.join(roles)}{after}")
        if message.role == "tool" and previous is not None and len(message.results) != len(previous.calls):
            num_results, num_calls = len(message.results), len(previous.calls)
            raise ChatError(f"{where}: {num_results} results of {num_calls} calls; expected as many")
        previous = message

    # A turn of the system alone, or behind the last answer, asks nothing.
    if previous is None or (conversation.messages[-1].role == "system" and previous.role == "assistant"):
        raise ChatError(f"turn {len(conversation.messages)}: missing; expected a turn of the user")


def later_system_turn(conversation: Conversation) -> int | None:
    """Returns the index of the first turn of the system that is not the first turn; None: there is none."""
    for number, message in enumerate(conversation.messages):
        if number and message.role == "system":
            return number
    return None


def check_tools(tools: tuple[Tool, ...]) -> None:
    """Refuses tools without a name, with the same name, or of the wrong type. Their schemas are not checked.

    Raises:
        ChatError: the message names the tool.
    """
    if type(tools) is not tuple:
        raise ChatError(f"tools: a {type(tools).__name__}; expected a tuple of {__name__}.Tool")

    names = set()
    for number, tool in enumerate(tools):
        if not isinstance(tool, Tool):
            raise ChatError(f"tool {number}: a {type(tool).__name__}; expected a {__name__}.Tool")
        # Calls name their tool, so names must be there and differ.
        if type(tool.name) is not str or not tool.name:
            raise ChatError(f"tool {number}: no name")
        if tool.name in names:
            raise ChatError(f"tool {number}: another tool has the name {shown(tool.name)}")
        names.add(tool.name)

        if type(tool.description) is not str:
            raise ChatError(f"tool {number}: the description is a {type(tool.description).__name__}; expected text")
        if type(tool.parameters) is not dict:
            raise ChatError(f"tool {number}: parameters is a {type(tool.parameters).__name__}; expected a JSON schema")


def check_message(message: Message, where: str) -> None:
    """Refuses a turn that is empty or whose fields do not fit its role, whatever comes before and after the turn.

    Results, and arguments below the top, are not checked: `json_text.write` does that.

    Raises:
        ChatError: the message begins with `where`.
    """
    if not isinstance(message, Message) or message.role not in ROLES:
        raise ChatError(f"{where}: expected a Message with one of the roles {', '.join(ROLES)}")
    if type(message.content) is not str:
        raise ChatError(f"{where}: content is a {type(message.content).__name__}; expected text")
    check_text(message.content, where)
    if type(message.thinking) is not str:
        raise ChatError(f"{where}: thinking is a {type(message.thinking).__name__}; expected text")
    check_text(message.thinking, where)
    for name in ("calls", "results"):
        if type(getattr(message, name)) is not tuple:
            raise ChatError(f"{where}: {name} is a {type(getattr(message, name)).__name__}; expected a tuple")

    # Each role has fields of its own: only the assistant calls, and only tools return.
    if message.calls and message.role != "assistant":
        raise ChatError(f"{where}: has calls; only the assistant calls tools")
    if message.thinking and message.role != "assistant":
        raise ChatError(f"{where}: has thinking; only the assistant thinks")
    if END_THINKING in message.thinking:
        raise ChatError(f"{where}: thinking has {END_THINKING} in it, which would end it early")
    if message.results and message.role != "tool":
        raise ChatError(f"{where}: has results; only the role tool has results")
    if message.role == "tool" and message.content:
        raise ChatError(f"{where}: has text; expected results only")
    if not (message.content or message.calls or message.results):
        raise ChatError(f"{where}: is empty")

    for number, call in enumerate(message.calls):
        check_call(call, f"{where}, call {number}")


def check_call(call: Call, where: str) -> None:
    """Refuses a call without a name, or whose arguments are not an object, by a ChatError that begins with `where`."""
    if not isinstance(call, Call) or type(call.name) is not str or not call.name:
        raise ChatError(f"{where}: no name of a tool")
    if type(call.arguments) is not dict:
        raise ChatError(f"{where}: arguments is a {type(call.arguments).__name__}; expected an object")


def check_text(text: str, where: str) -> None:
    """Refuses text with a lone surrogate by a ChatError that begins with `where`."""
    try:
        utf8(text, where)
    except UserError as error:
        raise ChatError(str(error)) from None


def turn_name(number: int, message: Message) -> str:
    """Returns the name of a turn in error messages: `turn 3 (tool)`."""
    return f"turn {number} ({getattr(message, 'role', type(message).__name__)})"


def shown(value: Json) -> str:
    """Returns a text in quotes, cut to 40 characters for an error message; for any other value its type."""
    if type(value) is not str:
        return f"a {type(value).__name__}"
    if len(value) > 40:
        return repr(value[:40] + "…")
    return repr(value)


def _next_roles(previous: Message | None) -> tuple[str, ...]:
    """Returns the roles that may follow `previous`, a turn not of the system; None: those of the first turn."""
    if previous is None:
        return ("system", "user")
    if previous.role == "assistant":
        if previous.calls:
            return ("tool",)
        return ("user",)
    # A user may go on at once after results, as some clients send both in one message.
    if previous.role == "tool":
        return ("assistant", "user")
    return ("assistant",)
