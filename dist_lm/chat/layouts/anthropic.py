"""Reads turns in the format of Anthropic's Messages API: content in blocks, with calls and results among them.

{"role": "assistant", "content": [{"type": "thinking", "thinking": "..."}, {"type": "text", "text": "Let me look."},
                                  {"type": "tool_use", "id": "1", "name": "weather", "input": {"city": "Oslo"}}]}
{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "rain"}]}
"""

from collections.abc import Mapping, Sequence

from dist_lm.chat.layouts.transcript import (
    SWITCHES,
    Transcript,
    learned,
    not_text,
    refuse_lost,
    result_of,
    text_of,
    value_of,
)
from dist_lm.chat.messages import Call, ChatError, Json, Role, shown

ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
TURN = ("role", "content", *SWITCHES)
BLOCKS = ("tool_use", "tool_result", "thinking", "redacted_thinking")  # types that no other layout has
# These say nothing about the content: what the API keeps in memory, and the seal of its thinking.
IGNORED = ("cache_control", "signature")


def add_turns(transcript: Transcript, turns: Sequence[Json]) -> None:
    """Adds turns to a transcript; returns nothing.

    Results in a turn of the user come before its text. A result that is an error becomes `{"error": CONTENT}`.

    Raises:
        ChatError: the message names the turn (from 0) and what was expected there.
    """
    for number, turn in enumerate(turns):
        where = f"turn {number}"
        if not isinstance(turn, Mapping):
            raise ChatError(f"{where}: {shown(turn)}; expected an object with role and content")
        role = ROLES.get(str(turn.get("role")))
        if role is None:
            raise ChatError(f"{where}: role {shown(turn.get('role'))}; expected one of {', '.join(ROLES)}")
        refuse_lost(turn, TURN, where)
        is_learned = learned(turn, role, where)

        content = turn.get("content")
        blocks = content if isinstance(content, list) else [{"type": "text", "text": text_of(content, where)}]
        if role == "assistant":
            _add_answer(transcript, blocks, where, is_learned)
        else:
            _add_request(transcript, role, blocks, where)


def _add_answer(transcript: Transcript, blocks: Sequence[Json], where: str, learn: bool) -> None:
    """Adds a turn of the assistant: thinking, then text, then calls.

    Raises:
        ChatError: a block is of another type or in another order, or a call is refused; begins with `where`.
    """
    thinking: list[str] = []
    texts: list[str] = []
    calls: list[Call] = []
    call_ids: list[str] = []

    for block in blocks:
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "thinking":
            refuse_lost(block, ("type", "thinking", *IGNORED), where)
            if texts or calls:
                raise ChatError(f"{where}: thinking behind text or calls; expected it first")
            thinking.append(text_of(block.get("thinking"), where))
            continue

        # A turn of ours has one order: thinking, text, calls.
        if kind == "redacted_thinking":
            raise ChatError(f"{where}: redacted_thinking cannot be read: remove the block")
        elif kind == "tool_use":
            refuse_lost(block, ("type", "id", "name", "input", *IGNORED), where)
            arguments = value_of(block.get("input"), f"{where}, call {len(calls)}: input")
            calls.append(Call(block.get("name") or "", {} if arguments is None else arguments))
            call_ids.append(str(block.get("id") or ""))
        else:
            text = text_of([block], where)
            if calls and text:
                raise ChatError(f"{where}: text after a call; expected it before the calls")
            texts.append(text)

    transcript.say(
        "assistant",
        "".join(texts),
        where,
        calls=tuple(calls),
        call_ids=call_ids,
        thinking="\n".join(thinking),
        learn=learn,
    )


def _add_request(transcript: Transcript, role: Role, blocks: Sequence[Json], where: str) -> None:
    """Adds the results and then the text of a turn of the user or the system.

    Raises:
        ChatError: a block is of another type, or a result follows text; begins with `where`.
    """
    texts: list[str] = []
    has_results = False
    for block in blocks:
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind != "tool_result":
            texts.append(text_of([block], where))
            continue
        if role != "user":
            raise not_text(kind, where)
        if texts:
            raise ChatError(f"{where}: a result after text; expected results first")

        refuse_lost(block, ("type", "tool_use_id", "content", "is_error", *IGNORED), where)
        result = result_of(text_of(block.get("content"), where))
        if block.get("is_error"):
            result = {"error": result}
        transcript.add_result(result, where, call_id=str(block.get("tool_use_id") or ""))
        has_results = True
    if texts or not has_results:
        transcript.say(role, "".join(texts), where)
