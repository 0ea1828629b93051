"""An oracle: which calls vLLM's Hermes tool parser (`--tool-call-parser hermes`) finds in a model's text.

Its rules, for a whole answer:

1. A text without `<tool_call>` has no calls.
2. A call opens at `<tool_call>` and ends at the nearest `</tool_call>` after it, even inside a string of its JSON; if
   there is none, at the end of the text. The search for the next call begins there.
3. The text between must be one JSON value (white space around it is free) that has `name` and `arguments`; other keys
   are ignored, and of a key given twice the last value counts.
4. One call that breaks rule 3 makes the whole answer plain text, without calls.
"""

import json
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def hermes_calls(text: str) -> list[tuple[Any, Any]]:
    """(name, arguments) of every call."""
    found = []
    at = text.find(OPEN)
    while at >= 0:
        begin = at + len(OPEN)
        end = text.find(CLOSE, begin)
        try:
            value = json.loads(text[begin : end if end >= 0 else len(text)])
            found.append((value["name"], value["arguments"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            return []
        at = text.find(OPEN, end + len(CLOSE)) if end >= 0 else -1
    return found
