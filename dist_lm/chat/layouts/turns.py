"""Reads a list of turns in any style: OpenAI's, ShareGPT's or Anthropic's, found by the keys of the turns."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from dist_lm.chat import json_text
from dist_lm.chat.layouts import anthropic, openai, sharegpt
from dist_lm.chat.layouts.tools import tools_of
from dist_lm.chat.layouts.transcript import Transcript, list_of, text_of, value_of
from dist_lm.chat.messages import ChatError, Conversation, Json, Message

SYSTEMS = ("system", "system_prompt", "system_message")  # columns of the text of the system
JSON_TURNS = re.compile(r"\s*\[\s*\{")  # how a list of turns begins as JSON text
STYLES: dict[str, Callable[[Transcript, Sequence[Json]], None]] = {
    "openai": openai.add_turns,
    "sharegpt": sharegpt.add_turns,
    "anthropic": anthropic.add_turns,
}


def conversation_of(
    turns: Json, tools: Json = None, system: Json = None, *, style: str = "", name: str = "messages"
) -> Conversation:
    """Returns the conversation that the values of `turns` and `tools` hold; both may be JSON text.

    Results are brought into the order of the calls by their ids. The content of a result is JSON, or else a text. A
    call must be one that the tools allow, except that a schema with keywords that `chat.schema` refuses allows all;
    without tools every call is allowed. The order of the roles and the number of results are not checked:
    `check_conversation` does that.

    Args:
        turns: a list of objects, or its JSON.
        tools: as for `tools_of`; None: no tools.
        system: text of the system, or parts of type text, before the turns; None or empty: none.
        style: one of `STYLES`; empty: that of `style_of`.
        name: that of `turns` in errors.

    Raises:
        ChatError: the message names the turn (from 0) and what was expected there.
    """
    turn_list = list_of(value_of(turns, name), name)
    transcript = Transcript(tools_of(tools))
    STYLES[style or style_of(turn_list)](transcript, turn_list)
    return with_system(transcript.conversation(), text_of(system, "system"))


def turns_in(value: Json) -> list | None:
    """Returns a list of turns, or the list that a JSON text holds; None for any other value, an empty list included.

    A list is one of turns if its first entry is an object with `role` or `from`; the others are not looked at.
    """
    if isinstance(value, str):
        if not JSON_TURNS.match(value):
            return None
        try:
            value = json_text.read(value, "turns")
        except ChatError:
            return None

    if not isinstance(value, list) or not value:
        return None
    first = value[0]
    if isinstance(first, Mapping) and ("role" in first or "from" in first):
        return value
    return None


def style_of(turns: Sequence[Json]) -> str:
    """Returns the style of a list of turns: `sharegpt` if one has `from`, `anthropic` if one has a block of a type that
    only Anthropic's API has, or else `openai`."""
    for turn in turns:
        if not isinstance(turn, Mapping):
            continue
        if "from" in turn and "role" not in turn:
            return "sharegpt"
        content = turn.get("content")
        parts = content if isinstance(content, list) else []
        if any(isinstance(part, Mapping) and part.get("type") in anthropic.BLOCKS for part in parts):
            return "anthropic"
    return "openai"


def with_system(conversation: Conversation, text: str) -> Conversation:
    """Returns the conversation with a first turn of the system; as it is if `text` is empty, or says the same.

    Raises:
        ChatError: the conversation begins with another text of the system, one of which would be lost.
    """
    messages = conversation.messages
    if not text:
        return conversation
    if messages and messages[0].role == "system":
        if messages[0].content == text:
            return conversation
        raise ChatError("turn 0 (system): the row has another text of the system beside it: expected one of them")
    return replace(conversation, messages=(Message("system", text), *messages))
