"""Conversations of every shape: as hypothesis strategies, from a seeded generator, and as OpenAI's API has them."""

import json
from random import Random
from typing import Any

from hypothesis import strategies as st

from dist_lm.chat.messages import END_THINKING, Call, Conversation, Json, Message, Tool
from tests.chat.hostile import hostile_text
from tests.tokenizer.hard_texts import hard_text

some_text = hard_text.filter(bool)
thoughts = some_text.filter(lambda text: END_THINKING not in text)
numbers = st.one_of(
    st.integers(), st.integers(-(10**300), 10**300), st.floats(allow_nan=False, allow_infinity=False), st.booleans()
)
json_values: st.SearchStrategy[Json] = st.recursive(
    st.one_of(st.none(), numbers, hard_text),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(hard_text, inner, max_size=3)),
    max_leaves=6,
)
json_objects = st.dictionaries(hard_text, json_values, max_size=3)
tools = st.lists(st.builds(Tool, some_text, hard_text, json_objects), max_size=3, unique_by=lambda tool: tool.name)
calls = st.builds(Call, some_text, json_objects)


@st.composite
def conversations(draw: Any) -> Conversation:
    """Any conversation that `render` accepts, with up to seven turns."""
    messages = [Message("system", draw(some_text))] if draw(st.booleans()) else []
    messages.append(Message("user", draw(some_text)))
    for _ in range(draw(st.integers(0, 5))):
        before = messages[-1]
        # A turn of the system may stand between any two turns but calls and their results.
        if not before.calls and draw(st.integers(0, 9)) == 0:
            messages.append(Message("system", draw(some_text)))
        if before.calls:
            count = len(before.calls)
            results = draw(st.lists(json_values, min_size=count, max_size=count))
            messages.append(Message("tool", results=tuple(results)))
        elif before.role == "assistant":
            messages.append(Message("user", draw(some_text)))
        else:
            asked = tuple(draw(st.lists(calls, max_size=3)))
            thinking = draw(thoughts) if draw(st.booleans()) else ""
            messages.append(Message("assistant", draw(hard_text if asked else some_text), asked, thinking=thinking))
    return Conversation(tuple(messages), tuple(draw(tools)))


def hostile_conversation(random: Random) -> Conversation:
    """Any conversation that `render` accepts, of hostile texts: fast enough for ten thousand."""
    messages = [Message("system", hostile_text(random))] if random.random() < 0.5 else []
    messages.append(Message("user", hostile_text(random)))
    for _ in range(random.randrange(6)):
        before = messages[-1]
        if not before.calls and random.random() < 0.1:
            messages.append(Message("system", hostile_text(random)))
        if before.calls:
            messages.append(Message("tool", results=tuple(hostile_value(random) for _ in before.calls)))
        elif before.role == "assistant":
            messages.append(Message("user", hostile_text(random)))
        else:
            asked = tuple(Call(hostile_text(random), hostile_object(random)) for _ in range(random.randrange(4)))
            text = "" if asked and random.random() < 0.5 else hostile_text(random)
            thinking = hostile_text(random) if random.random() < 0.3 else ""
            messages.append(Message("assistant", text, asked, thinking=thinking))
    names = {hostile_text(random) for _ in range(random.randrange(3))}
    offered = (Tool(name, hostile_text(random), hostile_object(random)) for name in sorted(names))
    return Conversation(tuple(messages), tuple(offered))


def hostile_object(random: Random) -> dict[str, Json]:
    return {hostile_text(random): hostile_value(random) for _ in range(random.randrange(3))}


def hostile_value(random: Random, depth: int = 0) -> Json:
    match random.randrange(8 if depth < 2 else 6):
        case 0:
            return random.choice((None, True, False))
        case 1:
            return random.randrange(-(10 ** random.randint(1, 300)), 10 ** random.randint(1, 300))
        case 2:
            return random.uniform(-1, 1) * 10.0 ** random.randint(-300, 300)
        case 6:
            return [hostile_value(random, depth + 1) for _ in range(random.randrange(4))]
        case 7:
            return {hostile_text(random): hostile_value(random, depth + 1) for _ in range(random.randrange(4))}
        case _:
            return hostile_text(random)


def for_openai(conversation: Conversation) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(messages, tools) as OpenAI's API and `apply_chat_template` take them."""
    messages = list[dict[str, Any]]()
    for message in conversation.messages:
        if message.role == "tool":
            messages += [
                {"role": "tool", "content": json.dumps(result, ensure_ascii=False)} for result in message.results
            ]
        else:
            messages.append({"role": message.role, "content": message.content})
        if message.thinking:
            messages[-1]["reasoning_content"] = message.thinking
        if message.calls:
            made = [{"name": call.name, "arguments": call.arguments} for call in message.calls]
            messages[-1]["tool_calls"] = [{"type": "function", "function": call} for call in made]
    functions = [
        {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
        for tool in conversation.tools
    ]
    return messages, [{"type": "function", "function": function} for function in functions]


def spelled(value: object) -> str:
    """The same text for the same value only: == ignores types of numbers and the order of keys."""
    return repr(value)
