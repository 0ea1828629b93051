"""Reads conversations in the format of OpenAI's chat API: messages with roles, tool calls and their results.

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
# Only these keys may have a value: they are read, or say nothing about the content.
TURN = ("role", "content", "weight")
TURN_OF = {"assistant": ("tool_calls",), "tool": ("tool_call_id", "name")}
CALL = ("id", "type", "index", "function")
TOOL = ("name", "description", "parameters", "input_schema", "strict")  # strict: how the API samples arguments
WAY_OUT = {"function_call": "write it as tool_calls, and its result with role tool", "functions": "name it tools"}


def conversation_of(messages: Json, tools: Json = None) -> Conversation:
    """Returns the conversation that the values of `messages` and `tools` hold; both may be JSON text.

    Results are brought into the order of the calls by `tool_call_id`. The content of a result is JSON, or else a text.
    A call must be one that the tools allow, except that a schema with keywords that `chat.schema` refuses allows all.
    The order of the roles and the number of results are not checked: `check_conversation` does that.

    Args:
        messages: a list of objects, or its JSON.
        tools: as for `tools_of`; None: no tools, and then no call is allowed.

    Raises:
        ChatError: the message names the turn (from 0) and what was expected there.
    """
    offered = tools_of(tools)
    is_checked = {tool.name: _can_be_checked(tool) for tool in offered}
    turns: list[Message] = []
    calls: tuple[Call, ...] = ()  # calls of the last turn that is no result
    call_ids: list[str] = []  # ids of these calls
    results: list[tuple[str, Json]] = []  # (id of the call, content) of these calls

    def close_results() -> None:
        """Makes one turn of the collected results and empties their list."""
        # OpenAI has a message for each result, we have a turn for all results.
        if results:
            turns.append(Message("tool", results=_in_order(results, call_ids, f"turn {len(turns)} (tool)")))
            results.clear()

    for number, turn in enumerate(_list(_value(messages, "messages"), "messages")):
        where = f"turn {number}"
        if not isinstance(turn, Mapping):
            raise ChatError(f"{where}: {shown(turn)}; expected an object with role and content")
        role_name = turn.get("role")
        role = ROLES.get(str(role_name))
        if role is None:
            problem = "no role" if role_name is None else f"role {shown(role_name)}"
            raise ChatError(f"{where}: {problem}; expected one of {', '.join(ROLES)}")

        # Content that a conversation has no place for would be lost silently.
        _refuse_lost(turn, (*TURN, *TURN_OF.get(role, ())), where)
        if turn.get("weight") not in (None, 1):
            raise ChatError(f"{where}: weight {turn['weight']} is not supported: every answer is learned")
        content = _content(turn.get("content"), where)

        if role == "tool":
            # Without an id, results come in the order of the calls.
            call_id = str(turn.get("tool_call_id") or "")
            index = call_ids.index(call_id) if call_id in call_ids else len(results)
            if turn.get("name") and index < len(calls) and turn["name"] != calls[index].name:
                called = shown(calls[index].name)
                raise ChatError(f"{where}: name {shown(turn['name'])}; its call is one of {called}")
            results.append((call_id, _result(content)))
            continue

        # A call that its tool does not allow would teach a model to make such calls.
        close_results()
        call_objects = _list(turn.get("tool_calls") or [], f"{where}: tool_calls")
        calls = tuple(_call(call, f"{where}, call {index}") for index, call in enumerate(call_objects))
        for index, call in enumerate(calls):
            check_call(call, f"{where}, call {index}")
            if is_checked.get(call.name, True) and (reasons := problems(call, offered)):
                raise ChatError(
                    f"{where}, call {index}: {'; '.join(reasons)}; expected a call that the tools of the row allow"
                )
        turns.append(Message(role, content, calls))
        call_ids = [str(call.get("id") or "") for call in call_objects]
    close_results()
    return Conversation(tuple(turns), offered)


def tools_of(value: Json) -> tuple[Tool, ...]:
    """Returns the tools in the value of `tools`, with or without the frame `{"type": "function", "function": ...}`.

    The value may be JSON text; None or an empty list gives no tools. The parameters may have the name that Anthropic
    gives them, `input_schema`; a tool without parameters takes no argument.

    Raises:
        ChatError: the message names the tool (from 0) and what was expected there.
    """
    tools: list[Tool] = []
    for number, framed in enumerate(_list(_value(value, "tools") or [], "tools")):
        where = f"tool {number}"
        function = framed
        if isinstance(framed, Mapping):
            function = framed.get("function") or framed
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ChatError(f"{where}: expected a function with a name")

        if function is framed:
            _refuse_lost(framed, ("type", *TOOL), where)
        else:
            _refuse_lost(framed, ("type", "function"), where)
            _refuse_lost(function, TOOL, where)
        _require_function(framed, where)

        schema_keys = [key for key in ("parameters", "input_schema") if not _says_nothing(function.get(key))]
        if len(schema_keys) > 1:
            raise ChatError(f"{where}: has {' and '.join(schema_keys)}; expected one of them")
        parameters = None
        if schema_keys:
            parameters = _value(function[schema_keys[0]], f"{where}: {schema_keys[0]}")
        without_arguments = {"type": "object", "properties": {}}
        tools.append(Tool(function["name"], function.get("description") or "", parameters or without_arguments))
    return tuple(tools)


def _can_be_checked(tool: Tool) -> bool:
    """Whether `problems` can compare calls with the schema of a tool; schemas of others often are only descriptions."""
    try:
        check_tool(tool)
    except ChatError:
        return False
    return True


def _call(value: Json, where: str) -> Call:
    """Returns the call of an element of `tool_calls`; missing arguments are `{}`, a missing name is empty.

    Name and arguments are not checked: `check_call` does that.

    Raises:
        ChatError: the element is no call, has a key that would be lost, or arguments that are broken JSON; the message
            begins with `where`.
    """
    if not isinstance(value, Mapping) or not isinstance(value.get("function"), Mapping):
        raise ChatError(f"{where}: expected an object with function")
    function = value["function"]
    _refuse_lost(value, CALL, where)
    _refuse_lost(function, ("name", "arguments"), where)
    _require_function(value, where)

    arguments = _value(function.get("arguments"), f"{where}: arguments")
    if arguments in (None, ""):
        arguments = {}
    return Call(function.get("name") or "", arguments)


def _in_order(results: Sequence[tuple[str, Json]], call_ids: Sequence[str], where: str) -> tuple[Json, ...]:
    """Returns the results in the order of the calls; in their own order where a call or a result has no id.

    Args:
        results: (id of the call, content); an empty id: none.

    Raises:
        ChatError: two calls have the same id, or the results are of other calls; the message begins with `where`.
    """
    # Data sets of other tools leave ids out; then their order is all there is.
    answered_ids = [call_id for call_id, _ in results]
    if not all(answered_ids) or not all(call_ids):
        return tuple(content for _, content in results)

    if len({*call_ids}) < len(call_ids):
        ids = ", ".join(call_ids)
        raise ChatError(f"{where}: the calls of the turn before have the ids {ids}; expected different ones")
    if sorted(answered_ids) != sorted(call_ids):
        expected = ", ".join(call_ids) or "none"
        raise ChatError(f"{where}: results of the calls {', '.join(answered_ids)}; expected those of {expected}")

    content_of = dict(results)
    return tuple(content_of[call_id] for call_id in call_ids)


def _refuse_lost(value: Mapping[str, Any], read: Sequence[str], where: str) -> None:
    """Raises ChatError, which begins with `where`, for a key that is not in `read` and has a value."""
    for key in value:
        if key not in read and not _says_nothing(value[key]):
            way_out = WAY_OUT.get(key, "move it into content, or remove it")
            raise ChatError(f"{where}: {key} is not supported and would be lost: {way_out}")


def _says_nothing(value: Json) -> bool:
    if isinstance(value, Mapping):
        return all(_says_nothing(part) for part in value.values())
    return value is None or value in ("", [])


def _require_function(value: Mapping[str, Any], where: str) -> None:
    """Raises ChatError, which begins with `where`, for a `type` other than function; a missing one passes."""
    if value.get("type") not in (None, "function"):
        raise ChatError(f"{where}: type {shown(value['type'])}; expected function")


def _content(value: Json, where: str) -> str:
    """Returns the text of a message, which is given as a text, or as parts of type text, joined; empty for None.

    Raises:
        ChatError: there is anything else; the message begins with `where`.
    """
    if value is None or isinstance(value, str):
        return value or ""

    problem = f"{where}: content: expected text, or parts of type text"
    if not isinstance(value, list):
        raise ChatError(problem)

    # Parts of other types, such as images, have no place in a conversation of text.
    texts = []
    for part in value:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ChatError(problem)
        _refuse_lost(part, ("type", "text"), f"{where}: content")
        texts.append(part["text"])
    return "".join(texts)


def _result(content: str) -> Json:
    try:
        return json_text.read(content, "result")
    except ChatError:
        return content


def _value(value: Json, where: str) -> Json:
    """Returns `value`, read first if it is JSON text; empty text stays as it is.

    Raises:
        ChatError: the text is no JSON; the message begins with `where`.
    """
    if isinstance(value, str) and value.strip():
        return json_text.read(value, where)
    return value


def _list(value: Json, where: str) -> list:
    """Returns the value if it is a list; raises ChatError, which begins with `where`, if not."""
    if not isinstance(value, list):
        raise ChatError(f"{where}: {shown(value)}; expected a list")
    return value
