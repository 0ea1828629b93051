"""Reads conversations in OpenAI's chat format: rows with a column of messages and perhaps one of tools.

    {"messages": [{"role": "user", "content": "Is it raining?"}, {"role": "assistant", "tool_calls": [...]}, ...],
     "tools": [{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}]}

The group of a conversation is the hash of the user's text before the first answer.
"""

from collections.abc import Iterator, Sequence

from dist_lm.chat.documents import write_conversation
from dist_lm.chat.openai import conversation_of
from dist_lm.config.corpus import SourceConfig
from dist_lm.data.sources.formats import BadRow, Row
from dist_lm.data.sources.reader import Candidate, reader, text_hash
from dist_lm.data.sources.rows import (
    KEYS,
    NEEDS,
    Content,
    list_rows,
    missing_column,
    named_columns,
    row_documents,
    rows_of_files,
)
from dist_lm.data.sources.snapshot import Snapshot
from dist_lm.errors import UserError

MESSAGES, TOOLS, FUNCTIONS = "messages", "tools", "functions"  # columns; the last one is the older name of tools


@reader(
    form="conversation",
    keys=KEYS,
    needs=NEEDS,
    inputs=list_rows,
    takes_files=True,
    advice="check path and column; no row makes a conversation with an answer",
)
def read_messages(source: SourceConfig, seed: int, files: Snapshot | None = None) -> Iterator[Candidate]:
    """Yields every row of JSON lines, parquet or CSV as a conversation or `Rejected`. `seed` is not used.

    Raises:
        ConfigError, ArtefactError: as `list_files`, `rows_of_files` and `row_documents`.
    """
    # These columns have no key of the source, so a file may lack them.
    columns = [*named_columns(source, MESSAGES), ("", TOOLS), ("", FUNCTIONS)]
    rows = rows_of_files(files or Snapshot.of(source), columns, whole_rows=True)
    yield from row_documents(source, rows, MESSAGES, _content_of, "conversation", (TOOLS, FUNCTIONS))


def _content_of(row: Row, column: str, columns: Sequence[str]) -> Content | BadRow | None:
    """Returns the text of a conversation and its group, the problem of a row, or None if nobody answers.

    It is also None if the column is null. A conversation that is not well formed is a problem, not an error.

    Args:
        column: that of the messages.
        columns: those of the file, for the message.
    """
    if column not in row:
        return missing_column(column, columns)
    if row[column] is None:
        return None
    # The tools of one of the two columns would be lost.
    if row.get(TOOLS) and row.get(FUNCTIONS):
        return BadRow("no_conversation", f"the row has {TOOLS} and {FUNCTIONS}: expected one of them")

    try:
        conversation = conversation_of(row[column], row.get(TOOLS) or row.get(FUNCTIONS))
        text = write_conversation(conversation)
    except UserError as error:
        return BadRow("no_conversation", str(error))

    roles = [message.role for message in conversation.messages]
    if "assistant" not in roles:
        return None
    # Conversations that begin alike are in one split, however they continue.
    opening_messages = conversation.messages[: roles.index("assistant")]
    return text, text_hash("\n".join(message.content for message in opening_messages if message.role == "user"))
