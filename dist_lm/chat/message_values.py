"""Turns as JSON values, and back: in the text of documents, and between processes."""

from collections.abc import Mapping

from dist_lm.chat.messages import Call, Json, Message


def message_value(message: Message) -> dict[str, Json]:
    """Returns a turn as a JSON value; thinking and loss switches are in it only where they are not the default."""
    value = {
        "role": message.role,
        "content": message.content,
        "calls": [[call.name, call.arguments] for call in message.calls],
        "results": list(message.results),
    }
    # Conversations without these have the text that they always had, so that equal ones stay equal.
    if message.thinking:
        value["thinking"] = message.thinking
    if not message.learn:
        value["learn"] = False
    if not message.learn_thinking:
        value["learn_thinking"] = False
    return value


def message_of(value: Mapping[str, Json]) -> Message:
    """Returns the turn of a value that `message_value` made; the value is not checked."""
    return Message(
        role=value["role"],
        content=value["content"],
        calls=tuple(Call(*call) for call in value["calls"]),
        results=tuple(value["results"]),
        thinking=value.get("thinking", ""),
        learn=value.get("learn", True),
        learn_thinking=value.get("learn_thinking", True),
    )
