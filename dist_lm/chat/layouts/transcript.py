"""Collects the turns of a conversation as foreign layouts give them, and the helpers that all layouts read with.

What a layout can say and a `Conversation` cannot is refused by name, not dropped: a key that is not read and has a
value is content that would be lost. `{}`, `[]`, `""` and null are no values: tables fill missing keys with them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dist_lm.chat import json_text
from dist_lm.chat.messages import Call, ChatError, Conversation, Json, Message, Role, Tool, check_call, shown
from dist_lm.chat.schema import check_tool, problems

THINKING = re.compile(r"\s*<think>\n?(.*?)\n?</think>\s*", re.DOTALL)  # at the beginning of an answer
# Keys of a turn that say whether the loss counts it: OpenAI and axolotl, axolotl, ms-swift.
SWITCHES = ("weight", "train", "training", "loss")
# Columns of a row that hold something else than text, and what it is.
MEDIA = {
    "image": "images",
    "images": "images",
    "img": "images",
    "picture": "images",
    "pixel_values": "images",
    "audio": "audio",
    "audios": "audio",
    "speech": "audio",
    "waveform": "audio",
    "video": "videos",
    "videos": "videos",
}
# Types of parts of a turn that are no text, and what they are called.
MEDIA_PARTS = {
    "image": "images",
    "image_url": "images",
    "input_image": "images",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
    "video": "videos",
    "video_url": "videos",
    "document": "documents",
    "file": "files",
    "input_file": "files",
}
WAY_OUT = {"function_call": "write it as tool_calls, and its result with role tool", "functions": "name it tools"}


class Transcript:
    """The turns of one conversation, in their order."""

    def __init__(self, tools: tuple[Tool, ...] = ()) -> None:
        """`tools`: those that the row offers. Without any, every call is allowed: many data sets leave tools out."""
        self._tools = tools
        self._is_checked = {tool.name: _can_be_checked(tool) for tool in tools}
        self._messages: list[Message] = []
        self._calls: tuple[Call, ...] = ()  # calls of the last turn that is no result
        self._call_ids: Sequence[str] = ()  # ids of these calls
        self._results: list[tuple[str, Json]] = []  # (id of the call, content) of these calls

    @property
    def open_calls(self) -> int:
        """Number of calls of the last turn that have no result yet."""
        return len(self._calls) - len(self._results)

    def say(
        self,
        role: Role,
        text: str,
        where: str,
        *,
        calls: tuple[Call, ...] = (),
        call_ids: Sequence[str] = (),
        thinking: str = "",
        learn: bool = True,
    ) -> None:
        """Adds a turn that is no result.

        An answer that begins with `<think>...</think>` has its thinking taken out of the text.

        Args:
            where: names the turn in errors.
            calls: those of the assistant.
            call_ids: one for each of `calls`; empty ones and none mean that results come in the order of the calls.
            learn: whether the loss counts the turn, if it is one of the assistant.

        Raises:
            ChatError: a call has no name, or is not one that the tools of the row allow; or results before are of
                other calls. A schema with keywords that `chat.schema` refuses allows all.
        """
        self._close_results()
        if role == "assistant" and not thinking:
            thinking, text = split_thinking(text)

        # A call that its tool does not allow would teach a model to make such calls.
        for index, call in enumerate(calls):
            check_call(call, f"{where}, call {index}")
            is_checked = self._tools and self._is_checked.get(call.name, True)
            if is_checked and (reasons := problems(call, self._tools)):
                raise ChatError(
                    f"{where}, call {index}: {'; '.join(reasons)}; expected a call that the tools of the row allow"
                )
        self._messages.append(Message(role, text, calls, thinking=thinking, learn=learn or role != "assistant"))
        self._calls, self._call_ids = calls, call_ids

    def add_calls(self, calls: tuple[Call, ...], where: str, *, thinking: str = "", learn: bool = True) -> None:
        """Adds calls to the assistant's text just before them, or as a turn of their own.

        Raises:
            ChatError: as `say`; or one of the two is learned and the other is not.
        """
        before = self._messages[-1] if self._messages else None
        continues = before is not None and before.role == "assistant" and not before.calls and not self._results
        if not continues:
            self.say("assistant", "", where, calls=calls, thinking=thinking, learn=learn)
            return

        assert before is not None
        if before.learn != learn:
            raise ChatError(f"{where}: the text before the calls is of the same turn: expected the same loss for both")
        if thinking:
            raise ChatError(f"{where}: thinking between a text and its calls: expected it before the text")
        self._messages.pop()
        self.say("assistant", before.content, where, calls=calls, thinking=before.thinking, learn=learn)

    def add_result(self, content: Json, where: str, *, call_id: str = "", name: str = "") -> None:
        """Adds the result of a call of the turn before.

        Args:
            call_id: that of the call; empty: results come in the order of the calls.
            name: that of the called tool; empty: not given.

        Raises:
            ChatError: `name` is not that of the call.
        """
        index = len(self._results)
        if call_id in self._call_ids:
            index = list(self._call_ids).index(call_id)
        if name and index < len(self._calls) and name != self._calls[index].name:
            called = shown(self._calls[index].name)
            raise ChatError(f"{where}: name {shown(name)}; its call is one of {called}")
        self._results.append((call_id, content))

    def conversation(self) -> Conversation:
        """Returns the conversation. The order of the roles and the number of results are not checked:
        `check_conversation` does that.

        Raises:
            ChatError: the last results are of other calls.
        """
        self._close_results()
        return Conversation(tuple(self._messages), self._tools)

    def _close_results(self) -> None:
        """Makes one turn of the collected results and empties their list."""
        # Foreign layouts have a message for each result, we have a turn for all results.
        if self._results:
            where = f"turn {len(self._messages)} (tool)"
            self._messages.append(Message("tool", results=_in_order(self._results, self._call_ids, where)))
            self._results = []


def split_thinking(text: str) -> tuple[str, str]:
    """Returns (thinking, the text behind it) of an answer; the thinking is empty if the answer begins with none."""
    match = THINKING.match(text)
    if not match or not match[1].strip():
        return "", text
    return match[1], text[match.end() :]


def learned(turn: Mapping[str, Any], role: str, where: str) -> bool:
    """Returns whether the loss counts a turn by its `SWITCHES`; true without one.

    Raises:
        ChatError: a switch is neither on nor off, two contradict, or a turn of another role than assistant is on by a
            key other than `weight`; the message begins with `where`.
    """
    is_learned = True
    for key in SWITCHES:
        value = turn.get(key)
        if value is None:
            continue
        if value not in (0, 1):
            raise ChatError(f"{where}: {key} {value} is not supported: expected 0, 1, true or false")
        # Our loss counts answers only, so a learned turn of the user would lose its loss.
        if value and role != "assistant" and key != "weight":
            raise ChatError(f"{where}: {key} of role {role} would be lost: only turns of the assistant are learned")
        is_learned = is_learned and bool(value)
    return is_learned


def text_of(value: Json, where: str) -> str:
    """Returns the text of a message, which is given as a text, or as parts of type text, joined; empty for None.

    Raises:
        ChatError: there is anything else, such as an image; the message begins with `where`.
    """
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise ChatError(f"{where}: content: expected text, or parts of type text")

    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        # Tables give every part all keys, and leave the text of an image empty.
        if kind != "text" or not isinstance(part.get("text"), str):
            raise not_text(kind, where)
        refuse_lost(part, ("type", "text", "cache_control"), f"{where}: content")
        texts.append(part["text"])
    return "".join(texts)


def plain_text(value: Json, where: str) -> str:
    """Returns a value that is a text; empty for None. Raises ChatError, which begins with `where`, for another one."""
    if value is None or isinstance(value, str):
        return value or ""
    raise ChatError(f"{where}: {shown(value)}; expected text")


def one_of(row: Mapping[str, Any], names: Sequence[str]) -> Json:
    """Returns the cell of the one column of `names` that holds something; None if none does.

    Raises:
        ChatError: two do, one of which would be lost.
    """
    present = [name for name in names if not is_empty(row.get(name))]
    if len(present) > 1:
        raise ChatError(f"the row has {' and '.join(present)}: expected one of them")
    return row[present[0]] if present else None


def is_empty(cell: Any) -> bool:
    """Returns whether a cell holds nothing; JSON of an empty list is nothing too."""
    return cell is None or (isinstance(cell, str | bytes | list | dict) and (not cell or cell in ("[]", "null")))


def not_text(kind: Json, where: str) -> ChatError:
    """Returns the error about a part of a message that is no text; it names images, audio and the like."""
    problem = f"{where}: content: expected text, or parts of type text"
    if isinstance(kind, str) and kind in MEDIA_PARTS:
        return ChatError(f"{problem}; found {kind}: {MEDIA_PARTS[kind]} cannot be read")
    if isinstance(kind, str) and kind != "text":
        return ChatError(f"{problem}; found {shown(kind)}")
    return ChatError(problem)


def result_of(text: str) -> Json:
    """Returns the value of a result that is JSON, or else its text."""
    try:
        return json_text.read(text, "result")
    except ChatError:
        return text


def value_of(value: Json, where: str) -> Json:
    """Returns `value`, read first if it is JSON text; empty text stays as it is.

    Raises:
        ChatError: the text is no JSON; the message begins with `where`.
    """
    if isinstance(value, str) and value.strip():
        return json_text.read(value, where)
    return value


def list_of(value: Json, where: str) -> list:
    """Returns the value if it is a list; raises ChatError, which begins with `where`, if not."""
    if not isinstance(value, list):
        raise ChatError(f"{where}: {shown(value)}; expected a list")
    return value


def refuse_lost(value: Mapping[str, Any], read: Sequence[str], where: str) -> None:
    """Raises ChatError, which begins with `where`, for a key that is not in `read` and has a value."""
    for key in value:
        if key not in read and not says_nothing(value[key]):
            way_out = WAY_OUT.get(key, "move it into content, or remove it")
            raise ChatError(f"{where}: {key} is not supported and would be lost: {way_out}")


def says_nothing(value: Json) -> bool:
    """Returns whether a value is one that tables fill missing keys with."""
    if isinstance(value, Mapping):
        return all(says_nothing(part) for part in value.values())
    return value is None or value in ("", [])


def _can_be_checked(tool: Tool) -> bool:
    """Whether `problems` can compare calls with the schema of a tool; schemas of others often are only descriptions."""
    try:
        check_tool(tool)
    except ChatError:
        return False
    return True


def _in_order(results: Sequence[tuple[str, Json]], call_ids: Sequence[str], where: str) -> tuple[Json, ...]:
    """Returns the results in the order of the calls; in their own order where a call or a result has no id.

    Args:
        results: (id of the call, content); an empty id: none.

    Raises:
        ChatError: two calls have the same id, or the results are of other calls; the message begins with `where`.
    """
    # Data sets of other tools leave ids out; then their order is all there is.
    answered_ids = [call_id for call_id, _ in results]
    if not all(answered_ids) or not call_ids or not all(call_ids):
        return tuple(content for _, content in results)

    if len({*call_ids}) < len(call_ids):
        ids = ", ".join(call_ids)
        raise ChatError(f"{where}: the calls of the turn before have the ids {ids}; expected different ones")
    if sorted(answered_ids) != sorted(call_ids):
        expected = ", ".join(call_ids) or "none"
        raise ChatError(f"{where}: results of the calls {', '.join(answered_ids)}; expected those of {expected}")

    content_of = dict(results)
    return tuple(content_of[call_id] for call_id in call_ids)
