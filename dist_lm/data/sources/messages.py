"""Reads conversations: rows of any layout in `dist_lm.chat.layouts.registry`, found by their columns.

    {"messages": [{"role": "user", "content": "Is it raining?"}, {"role": "assistant", "tool_calls": [...]}, ...],
     "tools": [{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}]}
    {"conversations": [{"from": "human", "value": "Is it raining?"}, {"from": "gpt", "value": "No."}], "system": "..."}
    {"instruction": "Name a river.", "input": "", "output": "The Glomma."}
    {"prompt": "Name a river.", "completion": "The Glomma."}

The group of a conversation is the hash of the user's text before the first answer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from dist_lm.chat.documents import write_conversation
from dist_lm.chat.layouts.completion import COMPLETION, PROMPT
from dist_lm.chat.layouts.registry import COLUMNS, TURNS, read_row
from dist_lm.chat.layouts.tools import TOOLS
from dist_lm.chat.layouts.turns import SYSTEMS
from dist_lm.chat.messages import ChatError, Conversation, Message, later_system_turn
from dist_lm.config.corpus import SourceConfig
from dist_lm.data.sources.formats import BadRow, Row
from dist_lm.data.sources.hub import HUB_KEYS, data_set_rows, list_data_set
from dist_lm.data.sources.reader import Candidate, reader, text_hash
from dist_lm.data.sources.rows import KEYS, Content, missing_column, named_columns, row_documents
from dist_lm.data.sources.snapshot import Snapshot
from dist_lm.errors import UserError


@reader(
    form="conversation",
    keys=(
        *dict.fromkeys((*KEYS, *HUB_KEYS)),
        *("question_column", "answer_column", "thinking", "opening_answers", "later_system"),
    ),
    needs=("language|language_column", "dataset|path"),
    inputs=list_data_set,
    takes_files=True,
    advice="check path or dataset, and column; no row makes a conversation with an answer",
)
def read_messages(source: SourceConfig, seed: int, files: Snapshot | None = None) -> Iterator[Candidate]:
    """Yields every row of a data set of the hub, or of files, as a conversation or `Rejected`. `seed` is not used.

    Raises:
        ConfigError, ArtefactError: as `data_set_rows` and `row_documents`.
    """
    # These columns have no key of the source, so a file may lack them.
    columns = [*named_columns(source), *(("", name) for name in COLUMNS)]
    if source.question_column:
        columns += [("question_column", source.question_column), ("answer_column", source.answer_column)]
    rows = data_set_rows(source, files, columns)
    content_of = partial(_content_of, source=source)
    yield from row_documents(source, rows, "", content_of, "conversation", (*TURNS, *TOOLS, *SYSTEMS))


def _content_of(row: Row, column: str, columns: Sequence[str], source: SourceConfig) -> Content | BadRow | None:
    """Returns the text of a conversation and its group, the problem of a row, or None if nobody answers.

    It is also None if the column of turns is null. A conversation that is not well formed is a problem, not an error.

    Args:
        column: that of the turns; empty: by the usual names.
        columns: those of the file, for the message.
        source: says what becomes of thinking, of answers before the first question and of later turns of the system.
    """
    for name in (column, source.question_column, source.answer_column):
        if name and name not in row:
            return missing_column(name, columns)
    if source.question_column:
        row = _question_with_answer(row, source)

    try:
        conversation = read_row(row, column)
        if conversation is None:
            return None
        conversation = with_thinking(conversation, source.thinking)
        conversation = from_first_question(conversation, drops=source.opening_answers == "drop")
        if later_system_turn(conversation) is not None:
            if source.later_system == "drop_row":
                return BadRow("later_system", "")
            if source.later_system == "user":
                conversation = with_later_system_in_questions(conversation)
        text = write_conversation(conversation)
    except UserError as error:
        return BadRow("no_conversation", str(error))

    roles = [message.role for message in conversation.messages]
    if "assistant" not in roles:
        return None
    # Such a row is as it was meant, but would be a document without a loss.
    if not any(message.learn for message in conversation.messages if message.role == "assistant"):
        return BadRow("nothing_learned", "")
    # Conversations that begin alike are in one split, however they continue.
    opening_messages = conversation.messages[: roles.index("assistant")]
    return text, text_hash("\n".join(message.content for message in opening_messages if message.role == "user"))


def _question_with_answer(row: Row, source: SourceConfig) -> Row:
    """Returns a row of `layouts.completion`, with the columns of a question and of its answer that a source names, and
    those of tools and of the system."""
    named = {name: cell for name, cell in row.items() if name in (*TOOLS, *SYSTEMS)}
    return {PROMPT: row[source.question_column], COMPLETION: row[source.answer_column], **named}


def from_first_question(conversation: Conversation, drops: bool) -> Conversation:
    """Returns the conversation without the answers before the first turn of the user; turns of the system stay.

    Raises:
        ChatError: there are such answers, and `drops` is False.
    """
    messages = conversation.messages
    roles = [message.role for message in messages]
    if "user" not in roles or not {*roles[: roles.index("user")]} - {"system"}:
        return conversation
    begin = roles.index("user")
    if not drops:
        number = next(number for number, role in enumerate(roles) if role != "system")
        raise ChatError(
            f"turn {number} ({roles[number]}): expected a question first; `opening_answers: drop` of the source leaves "
            "out what stands before it"
        )
    system = tuple(message for message in messages[:begin] if message.role == "system")
    return replace(conversation, messages=(*system, *messages[begin:]))


def with_later_system_in_questions(conversation: Conversation) -> Conversation:
    """Returns the conversation with the text of each turn of the system behind the first turn before that of the user's
    turn that follows, with an empty line between them.

    Raises:
        ChatError: an answer, or nothing, follows such a turn.
    """
    messages: list[Message] = []
    waiting: dict[int, str] = {}  # index of a turn of the system -> its text, which the next turn of the user takes
    for number, message in enumerate(conversation.messages):
        if number and message.role == "system":
            waiting[number] = message.content
            continue
        if waiting:
            # Before an answer, no turn of the user is left that the text could open.
            if message.role != "user":
                break
            message = replace(message, content="\n\n".join([*waiting.values(), message.content]))
            waiting = {}
        messages.append(message)

    if waiting:
        raise ChatError(
            f"turn {next(iter(waiting))} (system): `later_system: user` of the source needs a turn of the user behind "
            "it; `later_system: drop_row` leaves such rows out"
        )
    return replace(conversation, messages=tuple(messages))


def with_thinking(conversation: Conversation, thinking: str) -> Conversation:
    """Returns the conversation with its thinking learned (`learn` or empty), without loss (`context`), or taken out
    (`drop`)."""
    if thinking in ("", "learn"):
        return conversation
    messages = []
    for message in conversation.messages:
        if message.thinking and thinking == "drop":
            message = replace(message, thinking="")
        elif message.thinking:
            message = replace(message, learn_thinking=False)
        messages.append(message)
    return replace(conversation, messages=tuple(messages))
