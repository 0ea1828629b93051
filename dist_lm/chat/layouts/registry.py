"""The layouts of rows that hold conversations: by which columns and shapes each is recognised, and what reads it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from dist_lm.chat.layouts import alpaca, completion
from dist_lm.chat.layouts.tools import TOOLS
from dist_lm.chat.layouts.transcript import MEDIA, is_empty, one_of
from dist_lm.chat.layouts.turns import SYSTEMS, conversation_of, style_of, turns_in
from dist_lm.chat.messages import ChatError, Conversation, Json

Row = Mapping[str, Any]
# Usual names of the column of turns, the likeliest first.
TURNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
CHOSEN = "chosen"  # column of the better answer in rows of preferences


@dataclass(frozen=True)
class Layout:
    """A layout of rows."""

    name: str
    description: str  # the columns that it reads, for people
    read: Callable[[Row, str], Conversation]  # takes a row and the column of turns; raises ChatError


def _read_turns(row: Row, column: str, style: str) -> Conversation:
    return conversation_of(row[column], one_of(row, TOOLS), one_of(row, SYSTEMS), style=style, name=column)


def _read_columns(read: Callable[[Row, Json, Json], Conversation]) -> Callable[[Row, str], Conversation]:
    """Returns the reader of a layout without a column of turns; `read` gets a row, its tools and its system text."""
    return lambda row, _: read(row, one_of(row, TOOLS), one_of(row, SYSTEMS))


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("openai", "messages of role and content, with tools", partial(_read_turns, style="openai")),
        Layout(
            "sharegpt", "conversations of from and value, with system and tools", partial(_read_turns, style="sharegpt")
        ),
        Layout(
            "anthropic", "messages of content blocks, with system and tools", partial(_read_turns, style="anthropic")
        ),
        Layout("completion", "prompt and completion, texts or turns", _read_columns(completion.read)),
        Layout("alpaca", "instruction, input, output, with system and history", _read_columns(alpaca.read)),
    )
}

# All columns that a layout reads, so that a table is asked for no other.
COLUMNS = tuple(
    dict.fromkeys(
        [*TURNS, *TOOLS, *SYSTEMS, *MEDIA, *completion.LABELS, CHOSEN]
        + [name for pair in completion.PAIRS for name in pair]
        + [alpaca.INSTRUCTION, alpaca.HISTORY, *alpaca.INPUTS, *alpaca.OUTPUTS]
    )
)


def layout_of(row: Row, column: str = "") -> tuple[Layout, str] | None:
    """Returns the layout of a row, and its column of turns (empty where the layout has none); None: no conversation.

    Turns are recognised by a list of objects with `role` or `from`, or the JSON of one, in a column of a usual name;
    the other layouts by their columns.

    Args:
        column: that of the turns, whatever it holds; empty: by the usual names.
    """
    for name in (column,) if column else TURNS:
        if name in row and (turns := turns_in(row[name])) is not None:
            return LAYOUTS[style_of(turns)], name
    if column:
        # A value that is no list of turns is an error of the row, which the layout names.
        return (LAYOUTS["openai"], column) if column in row else None
    if completion.pair_of(row):
        return LAYOUTS["completion"], ""
    if alpaca.fits(row):
        return LAYOUTS["alpaca"], ""
    return None


def read_row(row: Row, column: str = "") -> Conversation | None:
    """Returns the conversation of a row; None if its column of turns is null.

    Args:
        column: as in `layout_of`.

    Raises:
        ChatError: the row has no layout of a conversation, is one of preferences, or holds images, audio or videos; or
            the layout refuses it.
    """
    for name, kind in MEDIA.items():
        if name != column and not is_empty(row.get(name)):
            raise ChatError(f"column {name}: {kind} cannot be read: remove the column, or these rows")

    # Learning an answer that the row calls bad would be worse than not reading it.
    for name in completion.LABELS:
        if isinstance(row.get(name), bool):
            raise ChatError(f"column {name} says whether the answer is good: rows of preferences have another reader")

    recognised = layout_of(row, column)
    if recognised is None:
        names = [column] if column else [name for name in TURNS if name in row]
        if names and all(row.get(name) is None for name in names):
            return None
        if names:
            recognised = LAYOUTS["openai"], names[0]
        else:
            raise ChatError(f"no layout of conversations: expected {expected_columns()}")
    layout, turns_column = recognised
    if turns_column and row[turns_column] is None:
        return None
    conversation = layout.read(row, turns_column)
    # Such a row asks in its turns, and has its answers elsewhere.
    if not is_empty(row.get(CHOSEN)) and conversation.messages and conversation.messages[-1].role != "assistant":
        raise ChatError(f"column {CHOSEN} holds the answer: rows of preferences have another reader")
    return conversation


def expected_columns() -> str:
    """Returns what a row must have, in words for people."""
    return "; or ".join(layout.description for layout in LAYOUTS.values())


def common_layout(rows: Iterable[Row], column: str = "") -> tuple[Layout, str] | None:
    """Returns the layout and the column of turns that most of `rows` have; None if no row is a conversation."""
    votes: dict[tuple[str, str], int] = {}
    for row in rows:
        if recognised := layout_of(row, column):
            key = recognised[0].name, recognised[1]
            votes[key] = votes.get(key, 0) + 1
    if not votes:
        return None
    name, turns_column = max(votes, key=lambda key: votes[key])
    return LAYOUTS[name], turns_column
