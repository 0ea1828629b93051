"""Conversations in the format of OpenAI's chat API: messages with roles, tool calls and their results.

What the format can say and a `Conversation` cannot is refused by name, not dropped: a key that is not listed here and
has a value is content that would be lost. `{}`, `[]`, `""` and null are no values: tables fill missing keys with them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dist_lm.chat import json_text
from dist_lm.chat.messages import Call, ChatError, Conversation, Json, Message, Role, Tool, check_call, shown
from dist_lm.chat.schema import check_tool, problems

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
# keys that are read, or that say nothing about the content
TURN = ("role", "content", "weight")
TURN_OF = {"assistant": ("tool_calls",), "tool": ("tool_call_id", "name")}
CALL = ("id", "type", "index", "function")
TOOL = ("name", "description", "parameters", "input_schema", "strict")  # strict: how the API samples arguments
WAY_OUT = {"function_call": "write it as tool_calls, and its result with role tool", "functions": "name it tools"}


def conversation_of(messages: Json, tools: Json = None) -> Conversation:
    """A conversation of the values of `messages` and `tools`; `tools` may be their JSON text.

    Results are brought into the order of the calls by `tool_call_id`. The content of a result is JSON, or else a text.
    A call must be one that the tools allow, except that a schema with keywords that `chat.schema` refuses allows all.

    Raises:
        ChatError: the message names the turn (from 0) and what was expected there.
    """
    offered = tools_of(tools)
    checked = {tool.name: _can_be_checked(tool) for tool in offered}
    turns = _list(_value(messages, "messages"), "messages")
    found: list[Message] = []
    results: list[tuple[str, Json]] = []  # of the calls of the last turn: id, value
    ids: list[str] = []  # of these calls
    made: tuple[Call, ...] = ()  # these calls

    def close_results() -> None:
        if results:
            found.append(Message("tool", results=_in_order(results, ids, f"turn {len(found)} (tool)")))
            results.clear()

    for number, turn in enumerate(turns):
        where = f"turn {number}"
        if not isinstance(turn, Mapping):
            raise ChatError(f"{where}: {shown(turn)}; expected an object with role and content")
        named = turn.get("role")
        role = ROLES.get(named) if isinstance(named, str) else None
        if role is None:
            found_role = "no role" if named is None else f"role {shown(named)}"
            raise ChatError(f"{where}: {found_role}; expected one of {', '.join(ROLES)}")
        _refuse_lost(turn, (*TURN, *TURN_OF.get(role, ())), where)
        if turn.get("weight") not in (None, 1):
            raise ChatError(f"{where}: weight {turn['weight']} is not supported: every answer is learned")
        content = _content(turn.get("content"), where)
        if role == "tool":
            answered = str(turn.get("tool_call_id") or "")
            place = ids.index(answered) if answered in ids else len(results)
            if turn.get("name") and place < len(made) and turn["name"] != made[place].name:
                raise ChatError(f"{where}: name {shown(turn['name'])}; its call is one of {shown(made[place].name)}")
            results.append((answered, _result(content)))
            continue
        close_results()
        calls = _list(turn.get("tool_calls") or [], f"{where}: tool_calls")
        made = tuple(_call(call, f"{where}, call {n}") for n, call in enumerate(calls))
        for n, call in enumerate(made):
            check_call(call, f"{where}, call {n}")
            if checked.get(call.name, True) and (wrong := problems(call, offered)):
                raise ChatError(
                    f"{where}, call {n}: {'; '.join(wrong)}; expected a call that the tools of the row allow"
                )
        found.append(Message(role, content, made))
        ids = [str(call.get("id") or "") for call in calls]
    close_results()
    return Conversation(tuple(found), offered)


def tools_of(value: Json) -> tuple[Tool, ...]:
    """The tools of the value of `tools`, with or without the frame `{"type": "function", "function": ...}`.

    The parameters may have the name that Anthropic gives them, `input_schema`.
    """
    found = []
    for number, one in enumerate(_list(_value(value, "tools") or [], "tools")):
        where = f"tool {number}"
        function = one.get("function") or one if isinstance(one, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ChatError(f"{where}: expected a function with a name")
        if function is one:
            _refuse_lost(one, ("type", *TOOL), where)
        else:
            _refuse_lost(one, ("type", "function"), where)
            _refuse_lost(function, TOOL, where)
        _require_function(one, where)
        schemas = [key for key in ("parameters", "input_schema") if not _says_nothing(function.get(key))]
        if len(schemas) > 1:
            raise ChatError(f"{where}: has {' and '.join(schemas)}; expected one of them")
        parameters = _value(function[schemas[0]], f"{where}: {schemas[0]}") if schemas else None
        found.append(
            Tool(
                function["name"], function.get("description") or "", parameters or {"type": "object", "properties": {}}
            )
        )
    return tuple(found)


def _can_be_checked(tool: Tool) -> bool:
    """Whether `problems` can compare calls with the schema of a tool; schemas of others often are only descriptions."""
    try:
        check_tool(tool)
    except ChatError:
        return False
    return True


def _call(value: Json, where: str) -> Call:
    function = value.get("function") if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping):
        raise ChatError(f"{where}: expected an object with function")
    _refuse_lost(value, CALL, where)
    _refuse_lost(function, ("name", "arguments"), where)
    _require_function(value, where)
    arguments = _value(function.get("arguments"), f"{where}: arguments")
    return Call(function.get("name") or "", {} if arguments in (None, "") else arguments)


def _in_order(results: Sequence[tuple[str, Json]], ids: Sequence[str], where: str) -> tuple[Json, ...]:
    """The results in the order of the calls; in their own where they have no ids."""
    given = [one for one, _ in results]
    if not all(given) or not all(ids):
        return tuple(value for _, value in results)
    if len({*ids}) < len(ids):
        raise ChatError(f"{where}: the calls of the turn before have the ids {', '.join(ids)}; expected different ones")
    if sorted(given) != sorted(ids):
        raise ChatError(
            f"{where}: results of the calls {', '.join(given)}; expected those of {', '.join(ids) or 'none'}"
        )
    by_id = dict(results)
    return tuple(by_id[one] for one in ids)


def _refuse_lost(value: Mapping[str, Any], read: Sequence[str], where: str) -> None:
    """Refuse keys that are not `read` and have a value."""
    for key in value:
        if key not in read and not _says_nothing(value[key]):
            way_out = WAY_OUT.get(key, "move it into content, or remove it")
            raise ChatError(f"{where}: {key} is not supported and would be lost: {way_out}")


def _says_nothing(value: Json) -> bool:
    if isinstance(value, Mapping):
        return all(_says_nothing(part) for part in value.values())
    return value is None or value in ("", [])


def _require_function(value: Mapping[str, Any], where: str) -> None:
    if value.get("type") not in (None, "function"):
        raise ChatError(f"{where}: type {shown(value['type'])}; expected function")


def _content(value: Json, where: str) -> str:
    """A text, or parts of type text."""
    if value is None or isinstance(value, str):
        return value or ""
    texts = []
    for part in value if isinstance(value, list) else [None]:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ChatError(f"{where}: content: expected text, or parts of type text")
        _refuse_lost(part, ("type", "text"), f"{where}: content")
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
