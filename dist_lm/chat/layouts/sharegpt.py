"""Reads turns in ShareGPT's format, as LLaMA-Factory and axolotl have it: `from` and `value`.

    {"from": "human", "value": "Is it raining?"}
    {"from": "function_call", "value": "{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\"}}"}
    {"from": "observation", "value": "{\"rain\": true}"}
    {"from": "gpt", "value": "Yes."}

Calls and results may also stand in the text, as in the Hermes data sets: `<tool_call>JSON</tool_call>` in a turn of the
assistant, `<tool_response>JSON</tool_response>` in one of the tool.
"""

from collections.abc import Mapping, Sequence

from dist_lm.chat import json_text
from dist_lm.chat.layouts.openai import call_of
from dist_lm.chat.layouts.transcript import (
    SWITCHES,
    Transcript,
    learned,
    plain_text,
    refuse_lost,
    result_of,
    split_thinking,
)
from dist_lm.chat.messages import Call, ChatError, Json, Role, shown

SPEAKERS: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
}
CALLERS = ("function_call", "tool_call")
OBSERVERS = ("observation", "tool", "tool_response", "function_response")
TURN = ("from", "value", *SWITCHES)
CALL_MARKS = ("<tool_call>", "</tool_call>")
RESPONSE_MARKS = ("<tool_response>", "</tool_response>")


def add_turns(transcript: Transcript, turns: Sequence[Json]) -> None:
    """Adds turns to a transcript; returns nothing. A text of the assistant and calls behind it are one turn.

    Raises:
        ChatError: the message names the turn (from 0) and what was expected there.
    """
    for number, turn in enumerate(turns):
        where = f"turn {number}"
        if not isinstance(turn, Mapping):
            raise ChatError(f"{where}: {shown(turn)}; expected an object with from and value")
        speaker = str(turn.get("from")).lower()
        value = turn.get("value")
        refuse_lost(turn, TURN, where)

        if speaker in CALLERS:
            thinking, calls = _calls(value, where)
            transcript.add_calls(calls, where, thinking=thinking, learn=learned(turn, "assistant", where))
        elif speaker in OBSERVERS:
            # Checks the switches alone: results are never learned.
            learned(turn, "tool", where)
            for result in _results(value, transcript.open_calls, where):
                transcript.add_result(result, where)
        elif speaker in SPEAKERS:
            role = SPEAKERS[speaker]
            is_learned = learned(turn, role, where)
            text, calls = plain_text(value, f"{where}: value"), ()
            if role == "assistant":
                text, calls = _text_and_calls(text, where)
            transcript.say(role, text, where, calls=calls, learn=is_learned)
        else:
            expected = ", ".join((*SPEAKERS, *CALLERS, *OBSERVERS))
            raise ChatError(f"{where}: from {shown(turn.get('from'))}; expected one of {expected}")


def _calls(value: Json, where: str) -> tuple[str, tuple[Call, ...]]:
    """Returns (thinking, calls) of a turn of calls: JSON of a call or of a list of calls, perhaps behind thinking.

    Raises:
        ChatError: the value is something else; the message begins with `where`.
    """
    thinking = ""
    if isinstance(value, str):
        thinking, text = split_thinking(value)
        value = json_text.read(text, where)
    call_objects = value if isinstance(value, list) else [value]
    if not call_objects:
        raise ChatError(f"{where}: no call; expected JSON with name and arguments")
    return thinking, tuple(call_of(call, f"{where}, call {index}") for index, call in enumerate(call_objects))


def _text_and_calls(text: str, where: str) -> tuple[str, tuple[Call, ...]]:
    """Returns (text, calls) of a turn of the assistant; calls stand at its end between marks.

    Raises:
        ChatError: a call is no JSON with name and arguments, or text follows a call; the message begins with `where`.
    """
    before, blocks, after = _blocks(text, *CALL_MARKS)
    if not blocks:
        return text, ()
    if after:
        raise ChatError(f"{where}: text after a call; expected it before the calls")
    calls = []
    for index, block in enumerate(blocks):
        call = json_text.read(block, f"{where}, call {index}")
        calls.append(call_of(call, f"{where}, call {index}"))
    return before.rstrip("\n"), tuple(calls)


def _results(value: Json, num_calls: int, where: str) -> list[Json]:
    """Returns the results of a turn: those between marks, the elements of a list that has one for each of `num_calls`
    open calls, or the value as one result.

    Raises:
        ChatError: text stands beside the marks; the message begins with `where`.
    """
    result = value
    if isinstance(value, str):
        before, blocks, after = _blocks(value, *RESPONSE_MARKS)
        if blocks and (before.strip() or after):
            raise ChatError(f"{where}: text beside the results; expected none")
        if blocks:
            return [result_of(block) for block in blocks]
        result = result_of(value)

    # Several calls have one turn of results, which then is a list of as many.
    if num_calls > 1 and isinstance(result, list) and len(result) == num_calls:
        return result
    return [result]


def _blocks(text: str, opening: str, closing: str) -> tuple[str, list[str], str]:
    """Returns (text before, contents, text behind) of blocks between marks, with only white space between the blocks.

    Text without a whole block is `text before`. The time grows linearly with the text: no pattern searches from every
    mark.
    """
    begin = text.find(opening)
    before, contents = text[:begin], []
    while begin >= 0 and (end := text.find(closing, begin)) >= 0:
        contents.append(text[begin + len(opening) : end].strip())
        rest = end + len(closing)
        while rest < len(text) and text[rest].isspace():
            rest += 1
        if not text.startswith(opening, rest):
            return before, contents, text[rest:]
        begin = rest
    if not contents:
        return text, [], ""
    return before, contents, text[begin:]
