r"""The constraint of a turn that calls tools: every call names a tool, and its arguments fit the tool's schema.

    TEXT\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>

The turn is free text up to the mark of a call. Behind it comes JSON as `dist_lm.chat.template` writes it, and behind a
call another call or the end of the turn. A mark that the tokenizer of an imported model lacks is written as text, and
the free text spells none of these.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from dist_lm.chat.messages import ChatError, Tool
from dist_lm.chat.schema import arguments_schema
from dist_lm.generation.constraint import Constraint
from dist_lm.generation.grammar import JSON_OPTIONS
from dist_lm.generation.schema_keywords import SchemaError, bounded, check_schema, loosened
from dist_lm.tokenizer.symbols import CALL, END_CALL
from dist_lm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class ToolChoice:
    """Which calls a turn may have, as in OpenAI's `tool_choice` and `parallel_tool_calls`."""

    mode: str = "auto"  # auto: text, calls, or both; required: calls; none: text; or the name of the only tool to call
    parallel: bool = True  # a turn may have several calls; with a name it has one


def call_constraint(
    tools: Sequence[Tool], tokenizer: Tokenizer, choice: ToolChoice | None = None, *, strict: bool = True
) -> Constraint:
    """Returns the constraint of the assistant's next turn, without the mark that ends it.

    Args:
        strict: refuse schemas with keywords that no grammar holds to. Otherwise the constraint leaves these keywords
            out, and the caller compares calls with the schema (`dist_lm.chat.schema.problems`).

    Raises:
        ChatError: a schema is one that `check_tool` refuses, or has a keyword that answers would not hold to; or there
            is no tool of the chosen name. The message names the tool.
    """
    choice = choice or ToolChoice()
    text = f"TEXT: {_free_text(tokenizer.lacking())}"
    if choice.mode == "none" or (choice.mode == "auto" and not tools):
        return Constraint("lark", f"start: TEXT\n{text}")

    callable_tools, parallel = list(tools), choice.parallel
    if choice.mode not in ("auto", "required"):
        callable_tools, parallel = [tool for tool in tools if tool.name == choice.mode], False
    if not callable_tools:
        names = ", ".join(tool.name for tool in tools) or "there are none"
        raise ChatError(f"tool_choice={choice.mode}: expected auto, none, required or the name of a tool ({names})")

    rules = [f"call_{index}: %json {_call_schema(tool, strict)}" for index, tool in enumerate(callable_tools)]
    bodies = " | ".join(f"call_{index}" for index in range(len(rules)))
    more = ' ("\\n" call)*' if parallel else ""
    start = "calls" if choice.mode != "auto" else "TEXT | TEXT? calls"
    lines = [
        f"start: {start}",
        f"calls: call{more}",
        f'call: {_mark(CALL, tokenizer)} "\\n" ({bodies}) "\\n" {_mark(END_CALL, tokenizer)}',
        text,
        *rules,
    ]
    return Constraint("lark", "\n".join(lines))


def _free_text(spelled_marks: Sequence[str]) -> str:
    """Returns the regular expression, in Lark, of a text that spells none of these marks."""
    anything = "/(.|\\n)+/"
    if not spelled_marks:
        return anything
    marks = "|".join(re.escape(mark).replace("/", r"\/") for mark in spelled_marks)
    return f"{anything} & ~/(.|\\n)*({marks})(.|\\n)*/"


def _mark(name: str, tokenizer: Tokenizer) -> str:
    """Returns a mark in Lark: its token, or its name as text if the tokenizer lacks it."""
    mark_id = tokenizer.special_ids.get(name)
    return json.dumps(name) if mark_id is None else f"<[{mark_id}]>"


def _call_schema(tool: Tool, strict: bool) -> str:
    """Returns the schema of a call as JSON: its name, then its arguments.

    Raises:
        ChatError: as `call_constraint`.
    """
    arguments = arguments_schema(tool)
    if not strict:
        arguments = loosened(arguments)
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
