"""Reads rows of a prompt and its completion, as TRL has them: texts, or lists of turns.

    {"prompt": "What is 2 + 2?", "completion": "4"}
    {"prompt": [{"role": "user", "content": "What is 2 + 2?"}], "completion": [{"role": "assistant", "content": "4"}]}

Only the completion is learned. A prompt that is a text becomes a turn of the user, a completion that is one becomes the
answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dist_lm.chat.layouts.turns import conversation_of, style_of, turns_in
from dist_lm.chat.messages import ChatError, Conversation, Json, shown

PROMPT, COMPLETION = "prompt", "completion"
# Columns of the question and of the answer that are read together.
PAIRS = (
    (PROMPT, COMPLETION),
    (PROMPT, "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    (PROMPT, "generation"),
    ("problem", "solution"),
    ("inputs", "targets"),
)
LABELS = ("label", "labels", "kto_tag")  # say whether a completion is good: rows of preferences


def pair_of(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """Returns the columns of the prompt and the completion of a row; None if it has none, or is one of preferences."""
    if any(name in row for name in LABELS):
        return None
    return next((pair for pair in PAIRS if pair[0] in row and pair[1] in row), None)


def read(row: Mapping[str, Json], tools: Json = None, system: Json = None) -> Conversation:
    """Returns the conversation of a row for which `pair_of` gives columns: the turn of the system, if `system` is a
    text, then the turns of the prompt and those of the completion.

    A column holds a list of turns, the JSON of such a list, or any other text, which becomes one turn (of the user in
    the prompt, of the assistant in the completion). Turns of the assistant in the prompt have `learn` False.

    Args:
        tools, system: the values of the columns of tools and of the text of the system; None without such a column.

    Raises:
        ChatError: a column holds neither text nor a list, a turn is broken, or the completion does not begin with the
            assistant. A broken turn is named by its number, counted from 0 over prompt and completion together.
    """
    pair = pair_of(row)
    assert pair is not None
    prompt, completion = _turns(row[pair[0]], "user", pair[0]), _turns(row[pair[1]], "assistant", pair[1])

    # One transcript for both: the completion may call tools, and ids of calls go through.
    turns = [*prompt, *completion]
    conversation = conversation_of(turns, tools, system, style=style_of(turns))
    num_prompt_turns = len(conversation_of(prompt, tools, system, style=style_of(turns)).messages)
    messages = conversation.messages
    if num_prompt_turns == len(messages) or messages[num_prompt_turns].role != "assistant":
        raise ChatError(f"{pair[1]}: expected a first turn of the assistant")
    unlearned = [replace(message, learn=message.role != "assistant") for message in messages[:num_prompt_turns]]
    return replace(conversation, messages=(*unlearned, *messages[num_prompt_turns:]))


def _turns(value: Json, role: str, name: str) -> Sequence[Json]:
    """Returns the turns of a column: those of a list, or one of `role` with the text.

    A text that is the JSON of turns is such a list.

    Raises:
        ChatError: the column holds something else; the message begins with `name`.
    """
    if isinstance(value, list):
        return value
    if isinstance(value, str):
        return turns_in(value) or [{"role": role, "content": value}]
    raise ChatError(f"{name}: {shown(value)}; expected text, or a list of turns")
