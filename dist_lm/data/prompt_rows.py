"""Reads rows of prompts for reinforcement learning, with all their columns: .txt with one request a line, or rows of
.jsonl, .json and parquet as TRL, verl and OpenRLHF have them.

    {"prompt": "Name a colour."}
    {"prompt": [{"role": "system", "content": "..."}, {"role": "user", "content": "2 + 2?"}], "ground_truth": "4", ...}

A text is one turn of the user. Turns may be a whole conversation, up to the turn that the assistant answers.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_lm.chat.layouts.tools import TOOLS
from dist_lm.chat.layouts.transcript import MEDIA, one_of
from dist_lm.chat.layouts.turns import JSON_TURNS, conversation_of, turns_in
from dist_lm.chat.messages import ChatError, Conversation, Message, check_conversation
from dist_lm.data.inputs import Input, Inputs
from dist_lm.data.prompts import find_prompts
from dist_lm.data.sources.formats import BadRow
from dist_lm.data.sources.rows import json_value, rows_of_files
from dist_lm.data.sources.snapshot import Snapshot

ROW_KINDS = (".jsonl", ".txt", ".json", ".parquet", ".jsonl.gz", ".jsonl.zst")
PROMPT = "prompt"
# Columns of a prompt where there is no `prompt`: OpenRLHF reads `input` unless it is told another name.
OTHER_COLUMNS = ("messages", "context_messages", "input", "question", "problem", "query", "instruction")


@dataclass(frozen=True)
class FileRow:
    """One row of a file."""

    place: str  # `FILE line N`, or `FILE row N` where a file is one list; N of a parquet file counts its rows
    columns: Mapping[str, Any] = field(default_factory=dict)  # JSON values
    error: str = ""  # why the row cannot be read; empty: it can


def find_rows(where: str, key: str) -> list[Path]:
    """Returns the files of rows that a key names, in alphabetical order. They are not read.

    Raises:
        ConfigError: no file matches, or one has another suffix than `ROW_KINDS`.
    """
    return find_prompts(where, key, ROW_KINDS)


def read_rows(files: Sequence[Path]) -> Iterator[FileRow]:
    """Yields every row, broken ones included, one at a time. Blank lines are passed over.

    Raises:
        ArtefactError: a file is damaged, or of another format than its suffix says.
        OSError: a file cannot be read.
    """
    for file in files:
        if file.suffix.lower() == ".txt":
            yield from _lines_of_text(file)
            continue

        status = file.stat()
        listed = Input(str(file), status.st_size, status.st_mtime_ns)
        for source_row in rows_of_files(Snapshot(lambda listed=listed: Inputs((listed,)))):
            number = source_row.location.rpartition(":")[2]
            place = f"{file.name} {number}" if number.startswith("row ") else f"{file.name} line {number}"
            if isinstance(source_row.row, BadRow):
                yield FileRow(place, error=source_row.row.words)
            else:
                yield _checked(FileRow(place, source_row.row))


def prompt_of(columns: Mapping[str, Any]) -> Conversation:
    """Returns the conversation that a row asks the assistant to go on with, and its tools.

    Raises:
        ChatError: there is no prompt, or several; it is empty or not well formed; or it ends with a turn of the
            assistant, who would have nothing to answer.
    """
    for name in MEDIA:
        if columns.get(name):
            raise ChatError(f"the column {name} is not read: only text is; leave such rows out")
    value = columns[prompt_column(columns)]
    if value in (None, "", []):
        raise ChatError("the prompt is empty: write a request, or remove the line")

    tools = one_of(columns, TOOLS) if any(columns.get(name) for name in TOOLS) else None
    if isinstance(value, str) and not is_turns(value):
        conversation = Conversation((Message("user", value),))
        if tools:
            conversation = conversation_of([{"role": "user", "content": value}], tools)
    else:
        conversation = conversation_of(value, tools)

    check_conversation(conversation)
    last = conversation.messages[-1]
    if last.role not in ("user", "tool"):
        raise ChatError(
            f"turn {len(conversation.messages) - 1} ({last.role}): is last; expected a last turn of user or tool, "
            "which the assistant answers: move an answer into a column of its own"
        )
    return conversation


def prompt_column(columns: Mapping[str, Any]) -> str:
    """Returns the column that holds the prompt: `prompt`, else the only one of `OTHER_COLUMNS`.

    Raises:
        ChatError: no column, or more than one of the others, can be the prompt; the message names the columns.
    """
    if PROMPT in columns:
        return PROMPT
    names = [name for name in OTHER_COLUMNS if name in columns]
    if len(names) == 1:
        return names[0]
    column_names = ", ".join(columns) or "none"
    if names:
        raise ChatError(f"the columns {', '.join(names)} may all be the prompt: name one of them {PROMPT}")
    raise ChatError(f"no column {PROMPT} (or {', '.join(OTHER_COLUMNS)}); the columns there are {column_names}")


def is_turns(text: str) -> bool:
    """Tells whether a text is a list of turns as JSON, which tables and scripts write."""
    return bool(JSON_TURNS.match(text)) and turns_in(text) is not None


def _lines_of_text(file: Path) -> Iterator[FileRow]:
    """Yields the lines of a .txt as prompts."""
    with file.open("rb") as opened:
        for number, line in enumerate(opened, 1):
            if not line.strip():
                continue
            place = f"{file.name} line {number}"
            try:
                yield FileRow(place, {PROMPT: line.rstrip(b"\r\n").decode()})
            except UnicodeDecodeError:
                yield FileRow(place, error="not UTF-8")


def _checked(row: FileRow) -> FileRow:
    """Returns the row with JSON values only, or a row without columns that has its error: bytes, such as images, a lone
    surrogate, or a value that is nested too deeply. Nothing is raised.
    """
    columns = {}
    for name, cell in row.columns.items():
        try:
            columns[name] = json_value(cell)
            json.dumps([name, columns[name]], ensure_ascii=False).encode()
        except TypeError:
            error = f"the column {name} holds bytes, such as an image: only text is read; remove it"
            return FileRow(row.place, error=error)
        except UnicodeEncodeError:
            return FileRow(row.place, error=f"the column {name} holds a lone surrogate")
        except RecursionError:
            return FileRow(row.place, error=f"the column {name} is nested too deeply")
    return FileRow(row.place, columns)
