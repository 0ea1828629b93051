r"""The constraint of a turn that calls tools: every call names a tool, and its arguments fit the tool's schema.

    TEXT\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>

The turn is free text up to the mark of a call. Behind it comes JSON as `dist_lm.chat.template` writes it, and behind a
call another call or the end of the turn.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from dist_lm.chat.messages import ChatError, Tool
from dist_lm.chat.schema import arguments_schema
from dist_lm.generation.constraint import Constraint
from dist_lm.generation.grammar import JSON_OPTIONS
from dist_lm.generation.schema_keywords import SchemaError, bounded, check_schema
from dist_lm.tokenizer.symbols import CALL, END_CALL
from dist_lm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class ToolChoice:
    """Which calls a turn may have, as in OpenAI's `tool_choice` and `parallel_tool_calls`."""

    mode: str = "auto"  # auto: text, calls, or both; required: calls; none: text; or the name of the only tool to call
    parallel: bool = True  # a turn may have several calls; with a name it has one


def call_constraint(tools: Sequence[Tool], tokenizer: Tokenizer, choice: ToolChoice | None = None) -> Constraint:
    """Returns the constraint of the assistant's next turn, without the mark that ends it.

    Raises:
        ChatError: a schema is one that `check_tool` refuses, or has a keyword that answers would not hold to; or there
            is no tool of the chosen name. The message names the tool.
        UserError: the tokenizer lacks the marks of calls.
    """
    choice = choice or ToolChoice()
    if choice.mode == "none" or (choice.mode == "auto" and not tools):
        return Constraint("lark", "start: TEXT\nTEXT: /(.|\\n)+/")

    callable_tools, parallel = list(tools), choice.parallel
    if choice.mode not in ("auto", "required"):
        callable_tools, parallel = [tool for tool in tools if tool.name == choice.mode], False
    if not callable_tools:
        names = ", ".join(tool.name for tool in tools) or "there are none"
        raise ChatError(f"tool_choice={choice.mode}: expected auto, none, required or the name of a tool ({names})")

    begin, end = tokenizer.mark_id(CALL), tokenizer.mark_id(END_CALL)
    rules = [f"call_{index}: %json {_call_schema(tool)}" for index, tool in enumerate(callable_tools)]
    bodies = " | ".join(f"call_{index}" for index in range(len(rules)))
    more = ' ("\\n" call)*' if parallel else ""
    start = "calls" if choice.mode != "auto" else "TEXT | TEXT? calls"
    lines = [
        f"start: {start}",
        f"calls: call{more}",
        f'call: <[{begin}]> "\\n" ({bodies}) "\\n" <[{end}]>',
        "TEXT: /(.|\\n)+/",
        *rules,
    ]
    return Constraint("lark", "\n".join(lines))


def _call_schema(tool: Tool) -> str:
    """Returns the schema of a call as JSON: its name, then its arguments.

    Raises:
        ChatError: as `call_constraint`.
    """
    arguments = arguments_schema(tool)
    try:
        check_schema(arguments)
    except SchemaError as error:
        raise ChatError(f"tool {tool.name}, parameters{str(error).removeprefix('#')}") from error
    properties = {"name": {"const": tool.name}, "arguments": arguments}
    call = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        "x-guidance": JSON_OPTIONS,
    }
    return json.dumps(bounded(call))
