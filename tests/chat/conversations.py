"""Conversations of every shape, as strategies, and what makes two of them the same."""

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
calls = st.builds(Call, some_text, json_objects)
tools = st.lists(st.builds(Tool, some_text, hard_text, json_objects), max_size=3, unique_by=lambda tool: tool.name).map(
    tuple
)


@st.composite
def conversations(draw: Any) -> Conversation:
    """What `render` accepts: any of the turns that may follow, a few times."""
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
            asked = tuple(draw(st.lists(calls, max_size=3)))
            messages.append(Message("assistant", draw(hard_text if asked else some_text), asked))
    return Conversation(tuple(messages), draw(tools))


def spelled(value: object) -> str:
    """The same for the same value only: types of numbers and order of keys included, where == lets them pass."""
    return repr(value)
