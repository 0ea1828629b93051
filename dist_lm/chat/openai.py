"""Conversations in the format of OpenAI's chat API: messages with roles, tool calls and their results.

What the format can say and a `Conversation` cannot is refused by name, not dropped.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dist_lm.chat import json_text
from dist_lm.chat.messages import Call, ChatError, Conversation, Json, Message, Role, Tool, shown

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
# keys of a message whose value would be lost
REFUSED = ("function_call", "refusal", "audio", "images", "reasoning", "reasoning_content", "thinking")


def conversation_of(messages: Json, tools: Json = None) -> Conversation:
    """A conversation of the values of `messages` and `tools`; `tools` may be their JSON text.

    Results are brought into the order of the calls by `tool_call_id`. The content of a result is JSON, or else a text.

    Raises:
        ChatError: the message names the turn (from 0) and what was expected there.
    """
    turns = _list(_value(messages, "messages"), "messages")
    found: list[Message] = []
    results: list[tuple[str, Json]] = []  # of the calls of the last turn: id, value
    ids: list[str] = []  # of these calls

    def close_results() -> None:
        if results:
            found.append(Message("tool", results=_in_order(results, ids, f"turn {len(found)} (tool)")))
            results.clear()

    for number, turn in enumerate(turns):
        where = f"turn {number}"
        if not isinstance(turn, Mapping):
            raise ChatError(f"{where}: {shown(turn)}; expected an object with role and content")
        role = ROLES.get(turn.get("role") or "")
        if role is None:
            raise ChatError(f"{where}: role {shown(turn.get('role'))}; expected one of {', '.join(ROLES)}")
        _refuse_lost(turn, where)
        content = _content(turn.get("content"), where)
        if role == "tool":
            results.append((str(turn.get("tool_call_id") or ""), _result(content)))
            continue
        close_results()
        calls = _list(turn.get("tool_calls") or [], f"{where}: tool_calls")
        found.append(Message(role, content, tuple(_call(call, f"{where}, call {n}") for n, call in enumerate(calls))))
        ids = [str(call.get("id") or "") for call in calls]
    close_results()
    return Conversation(tuple(found), tools_of(tools))


def tools_of(value: Json) -> tuple[Tool, ...]:
    """The tools of the value of `tools`, with or without the frame `{"type": "function", "function": ...}`."""
    found = []
    for number, one in enumerate(_list(_value(value, "tools") or [], "tools")):
        function = one.get("function") or one if isinstance(one, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ChatError(f"tool {number}: expected a function with a name")
        parameters = _value(function.get("parameters"), f"tool {number}: parameters")
        found.append(
            Tool(
                function["name"], function.get("description") or "", parameters or {"type": "object", "properties": {}}
            )
        )
    return tuple(found)


def _call(value: Json, where: str) -> Call:
    function = value.get("function") if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping):
        raise ChatError(f"{where}: expected an object with function")
    arguments = _value(function.get("arguments"), f"{where}: arguments")
    return Call(function.get("name") or "", {} if arguments in (None, "") else arguments)


def _in_order(results: Sequence[tuple[str, Json]], ids: Sequence[str], where: str) -> tuple[Json, ...]:
    """The results in the order of the calls; in their own where they have no ids."""
    given = [one for one, _ in results]
    if not all(given) or not all(ids):
        return tuple(value for _, value in results)
    if sorted(given) != sorted(ids) or len({*ids}) < len(ids):
        raise ChatError(
            f"{where}: results of the calls {', '.join(given)}; expected those of {', '.join(ids) or 'none'}"
        )
    by_id = dict(results)
    return tuple(by_id[one] for one in ids)


def _refuse_lost(turn: Mapping[str, Any], where: str) -> None:
    for key in REFUSED:
        if turn.get(key):
            raise ChatError(f"{where}: {key} is not supported: move it into content, or remove it")
    if turn.get("weight") == 0:
        raise ChatError(f"{where}: weight 0 is not supported: every answer is learned")


def _content(value: Json, where: str) -> str:
    """A text, or parts of type text."""
    if value is None or isinstance(value, str):
        return value or ""
    texts = []
    for part in _list(value, f"{where}: content"):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ChatError(f"{where}: content: expected text, or parts of type text")
        texts.append(part["text"])
    return "".join(texts)


def _result(content: str) -> Json:
    try:
        return json_text.read(content, "result")
    except ChatError:
        return content


def _value(value: Json, where: str) -> Json:
    """`value`, read where it is JSON text."""
    return json_text.read(value, where) if isinstance(value, str) and value.strip() else value


def _list(value: Json, where: str) -> list:
    if not isinstance(value, list):
        raise ChatError(f"{where}: {shown(value)}; expected a list")
    return value
