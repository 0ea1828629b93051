"""Reads the tools of a row: OpenAI's frame, a bare function, or Anthropic's `input_schema`."""

from collections.abc import Mapping
from typing import Any

from dist_lm.chat.layouts.transcript import list_of, refuse_lost, says_nothing, value_of
from dist_lm.chat.messages import ChatError, Json, Tool, shown

TOOLS = ("tools", "functions", "available_tools")  # columns of a row; the second is OpenAI's older name
TOOL = ("name", "description", "parameters", "input_schema", "strict")  # strict: how the API samples arguments
IGNORED = ("cache_control",)  # says what Anthropic's API keeps in memory


def tools_of(value: Json) -> tuple[Tool, ...]:
    """Returns the tools in the value of `tools`, with or without the frame `{"type": "function", "function": ...}`.

    The value may be JSON text; None or an empty list gives no tools. The parameters may have the name that Anthropic
    gives them, `input_schema`; a tool without parameters takes no argument.

    Raises:
        ChatError: the message names the tool (from 0) and what was expected there.
    """
    tools: list[Tool] = []
    for number, element in enumerate(list_of(value_of(value, "tools") or [], "tools")):
        where = f"tool {number}"
        # Tables hold tools of different schemas as JSON texts.
        framed = value_of(element, where)
        function = framed
        if isinstance(framed, Mapping):
            function = framed.get("function") or framed
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ChatError(f"{where}: expected a function with a name")

        if function is framed:
            refuse_lost(framed, ("type", *TOOL, *IGNORED), where)
        else:
            refuse_lost(framed, ("type", "function"), where)
            refuse_lost(function, TOOL, where)
        require_function(framed, where)

        schema_keys = [key for key in ("parameters", "input_schema") if not says_nothing(function.get(key))]
        if len(schema_keys) > 1:
            raise ChatError(f"{where}: has {' and '.join(schema_keys)}; expected one of them")
        parameters = None
        if schema_keys:
            parameters = value_of(function[schema_keys[0]], f"{where}: {schema_keys[0]}")
        without_arguments = {"type": "object", "properties": {}}
        tools.append(Tool(function["name"], function.get("description") or "", parameters or without_arguments))
    return tuple(tools)


def require_function(value: Mapping[str, Any], where: str) -> None:
    """Raises ChatError, which begins with `where`, for a `type` other than function; a missing one passes.

    Anthropic's own kind `custom` is a function where a schema of Anthropic's name stands beside it.
    """
    kind = value.get("type")
    if kind == "custom" and "input_schema" in value:
        return
    if kind not in (None, "function"):
        raise ChatError(f"{where}: type {shown(kind)}; expected function")
