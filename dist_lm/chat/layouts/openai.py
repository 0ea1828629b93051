"""Reads turns in the format of OpenAI's chat API: messages with roles, tool calls and their results.

{"role": "user", "content": "Is it raining?"}
{"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type": "function", "function": {...}}]}
{"role": "tool", "tool_call_id": "1", "content": "{\"rain\": true}"}
{"role": "assistant", "content": "Yes.", "reasoning_content": "The gauge says so.", "weight": 0}
"""

import json
from collections.abc import Mapping, Sequence

from dist_lm.chat.layouts.tools import require_function
from dist_lm.chat.layouts.transcript import (
    SWITCHES,
    Transcript,
    learned,
    list_of,
    refuse_lost,
    result_of,
    text_of,
    value_of,
)
from dist_lm.chat.messages import Call, ChatError, Json, Role, shown

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
THINKING = ("reasoning_content", "reasoning", "thinking")  # DeepSeek and Qwen, OpenRouter, gpt-oss and TRL
# Only these keys may have a value: they are read, or say nothing about the content.
TURN = ("role", "content", *SWITCHES)
TURN_OF = {"assistant": ("tool_calls", *THINKING), "tool": ("tool_call_id", "name")}
CALL = ("id", "type", "index", "function")
FUNCTION = ("name", "arguments")


def add_turns(transcript: Transcript, turns: Sequence[Json]) -> None:
    """Adds turns to a transcript; returns nothing.

    Results are brought into the order of the calls by `tool_call_id`. The content of a result is JSON, or else a text.

    Raises:
        ChatError: the message names the turn (from 0) and what was expected there.
    """
    for number, turn in enumerate(turns):
        where = f"turn {number}"
        if not isinstance(turn, Mapping):
            raise ChatError(f"{where}: {shown(turn)}; expected an object with role and content")
        role_name = turn.get("role")
        role = ROLES.get(str(role_name))
        if role is None:
            problem = "no role" if role_name is None else f"role {shown(role_name)}"
            raise ChatError(f"{where}: {problem}; expected one of {', '.join(ROLES)}")

        # Content that a conversation has no place for would be lost silently.
        refuse_lost(turn, (*TURN, *TURN_OF.get(role, ())), where)
        is_learned = learned(turn, role, where)
        content = text_of(turn.get("content"), where)

        if role == "tool":
            call_id, name = str(turn.get("tool_call_id") or ""), str(turn.get("name") or "")
            transcript.add_result(result_of(content), where, call_id=call_id, name=name)
            continue

        call_objects = list_of(value_of(turn.get("tool_calls"), f"{where}: tool_calls") or [], f"{where}: tool_calls")
        transcript.say(
            role,
            content,
            where,
            calls=tuple(call_of(call, f"{where}, call {index}") for index, call in enumerate(call_objects)),
            call_ids=[str(call.get("id") or "") for call in call_objects],
            thinking=_thinking(turn, where),
            learn=is_learned,
        )


def call_of(value: Json, where: str) -> Call:
    """Returns the call of an element of `tool_calls`; missing arguments are `{}`, a missing name is empty.

    A bare function with name and arguments is a call too. Name and arguments are not checked: `check_call` does that.

    Raises:
        ChatError: the element is no call, has a key that would be lost, or arguments that are broken JSON; the message
            begins with `where`.
    """
    if not isinstance(value, Mapping):
        raise ChatError(f"{where}: expected an object with function")
    function = value.get("function")
    if function is None and "name" in value:
        function = value
        refuse_lost(value, ("id", "type", "index", *FUNCTION), where)
    else:
        refuse_lost(value, CALL, where)
        if not isinstance(function, Mapping):
            raise ChatError(f"{where}: expected an object with function")
        refuse_lost(function, FUNCTION, where)
    require_function(value, where)

    arguments = value_of(function.get("arguments"), f"{where}: arguments")
    if arguments in (None, ""):
        arguments = {}
    return Call(function.get("name") or "", arguments)


def call_value(call: Call, call_id: str, index: int | None = None) -> dict[str, Json]:
    """Returns a call as an element of `tool_calls`; `index`: its place in a streamed turn."""
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    value = {"id": call_id, "type": "function", "function": function}
    return value if index is None else {"index": index} | value


def _thinking(turn: Mapping[str, Json], where: str) -> str:
    """Returns the text of the key for thinking; empty if there is none.

    Raises:
        ChatError: two keys have different texts, or one has no text; the message begins with `where`.
    """
    texts = {key: turn[key] for key in THINKING if turn.get(key)}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise ChatError(f"{where}: {key}: {shown(text)}; expected text")
    if len({*texts.values()}) > 1:
        raise ChatError(f"{where}: {' and '.join(texts)} have different texts; expected one of them")
    return next(iter(texts.values()), "")
