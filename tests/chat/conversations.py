"""Conversations of every shape, as strategies, and what makes two of them the same."""

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from dist_lm.chat.messages import Call, Conversation, Json, Message, Tool
from tests.tokenizer.hard_texts import hard_text

some_text = hard_text.filter(bool)
numbers = st.one_of(
    st.integers(), st.integers(-(10**300), 10**300), st.floats(allow_nan=False, allow_infinity=False), st.booleans()
)
json_values: st.SearchStrategy[Json] = st.recursive(
    st.one_of(st.none(), numbers, hard_text),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(hard_text, inner, max_size=3)),
    max_leaves=6,
)
json_objects = st.dictionaries(hard_text, json_values, max_size=3)
TAKE_NULL: list[Json] = [{}, {"type": "null"}, {"type": ["string", "null"]}, {"enum": ["a", None]}]
TAKE_NONE: list[Json] = [{"type": "string"}, {"type": ["integer", "string"]}, {"enum": ["a", "b"]}]
schemas: st.SearchStrategy[Json] = st.recursive(
    st.sampled_from([*TAKE_NULL, *TAKE_NONE]),
    lambda inner: st.one_of(
        st.builds(lambda items: {"type": "array", "items": items}, inner),
        st.dictionaries(hard_text, inner, max_size=3).map(lambda parts: {"type": "object", "properties": parts}),
    ),
    max_leaves=6,
)
object_schemas = st.dictionaries(hard_text, schemas, max_size=4).map(
    lambda parts: {"type": "object", "properties": parts}
)
parameters = st.one_of(object_schemas, json_objects)
tools = st.lists(st.builds(Tool, some_text, hard_text, parameters), max_size=3, unique_by=lambda tool: tool.name)


@st.composite
def values_of(draw: Any, schema: Any) -> Json:
    """What one of `schemas` may hold, valid or not: null only where it takes null, properties it does not know, too."""
    if schema.get("type") == "array":
        return draw(st.lists(values_of(schema["items"]), max_size=3))
    if schema.get("type") == "object":
        known = schema["properties"]
        names = draw(st.lists(st.sampled_from(list(known)), unique=True)) if known else []
        others = {name: value for name, value in draw(json_objects).items() if name not in known}
        return others | {name: draw(values_of(known[name])) for name in names}
    return draw(json_values if schema in TAKE_NULL else json_values.filter(lambda value: value is not None))


@st.composite
def calls(draw: Any, offered: Sequence[Tool]) -> Call:
    """Of one of the tools, or of none."""
    if offered and draw(st.booleans()):
        tool = draw(st.sampled_from(offered))
        if set(tool.parameters) == {"type", "properties"} and isinstance(tool.parameters["properties"], dict):
            return Call(tool.name, draw(values_of(tool.parameters)))
    name = draw(some_text.filter(lambda name: name not in {tool.name for tool in offered}))
    return Call(name, draw(json_objects))


@st.composite
def conversations(draw: Any) -> Conversation:
    """What `render` accepts: any of the turns that may follow, a few times."""
    offered = tuple(draw(tools))
    messages = [Message("system", draw(some_text))] if draw(st.booleans()) else []
    messages.append(Message("user", draw(some_text)))
    for _ in range(draw(st.integers(0, 5))):
        before = messages[-1]
        if before.calls:
            count = len(before.calls)
            results = draw(st.lists(json_values, min_size=count, max_size=count))
            messages.append(Message("tool", results=tuple(results)))
        elif before.role == "assistant":
            messages.append(Message("user", draw(some_text)))
        else:
            asked = tuple(draw(st.lists(calls(offered), max_size=3)))
            messages.append(Message("assistant", draw(hard_text if asked else some_text), asked))
    return Conversation(tuple(messages), offered)


def spelled(value: object) -> str:
    """The same for the same value only: types of numbers and order of keys included, where == lets them pass."""
    return repr(value)
