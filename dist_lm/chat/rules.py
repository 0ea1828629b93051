"""Which conversations are well formed: whose turn it is, and what a turn may hold."""

from dist_lm.chat.errors import ChatError
from dist_lm.chat.json_text import shown
from dist_lm.chat.messages import Call, Conversation, Message, Tool

ROLES = ("system", "user", "assistant", "tool")


def check_conversation(conversation: Conversation) -> None:
    """Refuse a conversation that the template has no place for.

    Raises:
        ChatError: the message names the turn (from 0) and what was expected there.
    """
    check_tools(conversation.tools)
    if type(conversation.messages) is not tuple:
        raise ChatError(f"messages: a {type(conversation.messages).__name__}; expected a tuple")
    before: Message | None = None
    for number, message in enumerate(conversation.messages):
        where = turn_name(number, message)
        check_message(message, where)
        expected = _next_roles(before)
        if message.role not in expected:
            raise ChatError(f"{where}: expected {' or '.join(expected)} there{_after(before)}")
        if message.role == "tool" and before is not None and len(message.results) != len(before.calls):
            raise ChatError(f"{where}: {len(message.results)} results of {len(before.calls)} calls; expected as many")
        before = message
    if before is None or before.role == "system":
        raise ChatError(f"turn {len(conversation.messages)}: nobody asks anything; expected a turn of the user")


def check_tools(tools: tuple[Tool, ...]) -> None:
    """Refuse tools that cannot be told apart, or are none.

    Raises:
        ChatError: the message names the tool.
    """
    if type(tools) is not tuple:
        raise ChatError(f"tools: a {type(tools).__name__}; expected a tuple")
    names = set()
    for number, tool in enumerate(tools):
        if not isinstance(tool, Tool):
            raise ChatError(f"tool {number}: a {type(tool).__name__}; expected a Tool")
        if type(tool.name) is not str or not tool.name:
            raise ChatError(f"tool {number}: no name")
        if tool.name in names:
            raise ChatError(f"tool {number}: another tool is named {shown(tool.name)} too")
        if type(tool.description) is not str:
            raise ChatError(f"tool {number}: the description is a {type(tool.description).__name__}; expected text")
        if type(tool.parameters) is not dict:
            raise ChatError(f"tool {number}: parameters is a {type(tool.parameters).__name__}; expected a JSON schema")
        names.add(tool.name)


def check_message(message: Message, where: str) -> None:
    """Refuse a turn that its role cannot have, wherever it stands.

    Raises:
        ChatError: the message begins with `where`.
    """
    if not isinstance(message, Message) or message.role not in ROLES:
        raise ChatError(f"{where}: expected a Message of the role {', '.join(ROLES)}")
    if type(message.content) is not str:
        raise ChatError(f"{where}: content is a {type(message.content).__name__}; expected text")
    for name in ("calls", "results"):
        if type(getattr(message, name)) is not tuple:
            raise ChatError(f"{where}: {name} is a {type(getattr(message, name)).__name__}; expected a tuple")
    if message.calls and message.role != "assistant":
        raise ChatError(f"{where}: only the assistant calls tools")
    if message.results and message.role != "tool":
        raise ChatError(f"{where}: only the role tool has results")
    if message.role == "tool" and message.content:
        raise ChatError(f"{where}: has text; expected results only")
    if not (message.content or message.calls or message.results):
        raise ChatError(f"{where}: is empty")
    for number, call in enumerate(message.calls):
        check_call(call, f"{where}, call {number}")


def check_call(call: Call, where: str) -> None:
    """Refuse a call without a name, or whose arguments are no object."""
    if not isinstance(call, Call) or type(call.name) is not str or not call.name:
        raise ChatError(f"{where}: no name of a tool")
    if type(call.arguments) is not dict:
        raise ChatError(f"{where}: arguments is a {type(call.arguments).__name__}; expected an object")


def turn_name(number: int, message: Message) -> str:
    """How messages call a turn: `turn 3 (tool)`."""
    return f"turn {number} ({getattr(message, 'role', type(message).__name__)})"


def _next_roles(before: Message | None) -> tuple[str, ...]:
    if before is None:
        return ("system", "user")
    if before.role == "assistant":
        return ("tool",) if before.calls else ("user",)
    return ("user",) if before.role == "system" else ("assistant",)


def _after(before: Message | None) -> str:
    if before is None:
        return ""
    return f" (after {before.role}{' with calls' if before.calls else ''})"
