"""Rows of function calling data sets as conversations: what cannot be one is counted, and calls decide the group."""

import json
from pathlib import Path

import pytest

from dist_lm.chat.documents import read_conversation
from dist_lm.chat.messages import Call
from dist_lm.config.corpus import SourceConfig
from dist_lm.data.sources.reader import Rejected
from dist_lm.data.sources.tools import read_hub_tools
from dist_lm.document import Document
from dist_lm.errors import ConfigError

TOOLS = [
    {"name": "add", "description": "Add", "parameters": {"a": {"type": "int", "description": "first"}}},
    {"name": "now", "description": "Time", "parameters": {}},
]


def row(query: str, *calls: tuple[str, dict]) -> dict[str, str]:
    answers = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return {"query": query, "tools": json.dumps(TOOLS), "answers": json.dumps(answers)}


def source_of(directory: Path, *rows: dict) -> SourceConfig:
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return SourceConfig("hub_tools", "tools", licence="CC-BY-4.0", path=str(path))


def test_rows_become_conversations_and_bad_ones_are_counted(tmp_path):
    source = source_of(
        tmp_path,
        row("1 and 2", ("add", {"a": 1}), ("add", {"a": 2})),
        row("what", ("subtract", {})),
        row("unanswered"),
    )
    first, second, third = read_hub_tools(source, 0)
    assert isinstance(first, Document)
    assert isinstance(third, Document)
    assert second == Rejected("tools", f"{source.path[0]}:2", "invalid_calls")
    assert first.form == "conversation"
    assert first.language == "tools_hub"
    conversation = read_conversation(first.text)
    assert conversation.messages[-1].calls == (Call("add", {"a": 1}), Call("add", {"a": 2}))
    assert not read_conversation(third.text).messages[-1].calls


def test_rows_that_call_the_same_are_on_one_side(tmp_path):
    rows = [row("a", ("add", {"a": 1})), row("b", ("now", {})), row("c", ("add", {"a": 7}))]
    one, other, same = (document for document in read_hub_tools(source_of(tmp_path, *rows), 0))
    assert isinstance(one, Document)
    assert isinstance(other, Document)
    assert isinstance(same, Document)
    assert one.group == same.group != other.group


def test_other_columns_are_named(tmp_path):
    with pytest.raises(
        ConfigError, match=r"reader=hub_tools: .*column=answers: none of the first 1 rows .* are query, tools, text"
    ):
        next(read_hub_tools(source_of(tmp_path, {"query": "a", "tools": "[]", "text": "b"}), 0))
