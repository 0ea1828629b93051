"""Conversations in OpenAI's format: what they become, and what is refused by its turn."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_lm.chat.documents import read_conversation
from dist_lm.chat.layouts.turns import conversation_of
from dist_lm.chat.messages import Call, ChatError, Conversation, Message, Tool
from dist_lm.config.corpus import CorpusConfig, SourceConfig
from dist_lm.data.screening import IngestReport
from dist_lm.data.sources.messages import read_messages
from dist_lm.data.sources.reader import Rejected
from dist_lm.document import Document
from tests.data.reading import read_corpus

USER = {"role": "user", "content": "Weather in Bergen and Oslo?"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Weather", "parameters": SCHEMA}}]


def call(city: str, number: str) -> dict:
    function = {"name": "weather", "arguments": json.dumps({"city": city})}
    return {"id": number, "type": "function", "function": function}


CALLS = {"role": "assistant", "content": None, "tool_calls": [call("Bergen", "1"), call("Oslo", "2")]}
RESULTS = [
    {"role": "tool", "tool_call_id": "2", "content": "dry"},
    {"role": "tool", "tool_call_id": "1", "content": '{"rain": true}'},
]
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "Rain in "}, {"type": "text", "text": "Bergen."}]}
SYSTEM = {"role": "developer", "content": "Be short."}
WHOLE = [SYSTEM, USER, CALLS, *RESULTS, ANSWER]
EXPECTED = Conversation(
    (
        Message("system", "Be short."),
        Message("user", "Weather in Bergen and Oslo?"),
        Message("assistant", calls=(Call("weather", {"city": "Bergen"}), Call("weather", {"city": "Oslo"}))),
        Message("tool", results=({"rain": True}, "dry")),
        Message("assistant", "Rain in Bergen."),
    ),
    (Tool("weather", "Weather", SCHEMA),),
)


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), [TOOLS[0]["function"]]])
@pytest.mark.parametrize("messages", [WHOLE, json.dumps(WHOLE)])
def test_a_conversation_with_tools(messages, tools):
    assert conversation_of(messages, tools) == EXPECTED


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ({}, "messages: a dict; expected a list"),
        (["x"], "turn 0: 'x'; expected an object with role and content"),
        ([{"role": "human", "content": "x"}], "turn 0: role 'human'; expected one of system"),
        ([USER, {"role": "assistant", "content": "x", "reasoning_details": "y"}], "turn 1: reasoning_details is not s"),
        ([USER, {"role": "assistant", "content": "x", "weight": 0.5}], "turn 1: weight 0.5 is not supported"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "turn 0: content: expected text, or parts"),
        ([USER, {"role": "assistant", "tool_calls": [{"id": "1"}]}], "turn 1, call 0: expected an object with fun"),
        ([USER, CALLS, RESULTS[0], {**RESULTS[0], "tool_call_id": "3"}], "results of the calls 2, 3; expected those"),
        ([{"content": "x"}], "turn 0: no role; expected one of"),
        ([{"role": ["user"], "content": "x"}], "turn 0: role a list; expected one of"),
        ([{"role": "user", "content": 5}], "turn 0: content: expected text, or parts of type text"),
        ([USER | {"name": "Ann"}], "turn 0: name is not supported and would be lost: move it into content"),
        ([USER | {"train": True}], "turn 0: train of role user would be lost"),
        ([USER, {"role": "assistant", "function_call": {"name": "x"}}], "turn 1: function_call .*: write it as tool_c"),
        ([USER, CALLS | {"tool_calls": [call("Oslo", "1"), call("Bergen", "1")]}, RESULTS[1]], "have the ids 1, 1"),
        ([USER, CALLS, RESULTS[0] | {"name": "tides"}], "turn 2: name 'tides'; its call is one of 'weather'"),
        ([USER, CALLS | {"tool_calls": [{"type": "custom", "function": {}}]}], "turn 1, call 0: type 'custom'"),
        (
            [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "tides", "arguments": "{}"}}]}],
            "turn 1, call 0: there is no tool 'tides'; expected a call that the tools",
        ),
        (
            [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": 3}}}]}],
            "turn 1, call 0: argument city: expected string, found 3; expected a call",
        ),
    ],
)
def test_what_would_be_lost_is_refused_by_its_turn(messages, words):
    with pytest.raises(ChatError, match=words):
        conversation_of(messages, TOOLS)


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ([TOOLS[0] | {"cache": 1}], "tool 0: cache is not supported and would be lost"),
        ([TOOLS[0]["function"] | {"returns": SCHEMA}], "tool 0: returns is not supported and would be lost"),
        ([TOOLS[0]["function"] | {"input_schema": SCHEMA}], "tool 0: has parameters and input_schema"),
        ([{"type": "web_search", "name": "web"}], "tool 0: type 'web_search'; expected function"),
    ],
)
def test_what_a_tool_would_lose_is_refused(tools, words):
    with pytest.raises(ChatError, match=words):
        conversation_of([USER, ANSWER], tools)


def test_names_that_say_nothing_new_and_empty_values_are_no_loss():
    whole = [turn | {"refusal": None, "audio": {"id": None}, "annotations": []} for turn in WHOLE]
    whole[3] = whole[3] | {"name": "weather"}
    strict = {"type": "function", "function": TOOLS[0]["function"] | {"strict": True}}
    named = {"name": "weather", "description": "Weather", "input_schema": SCHEMA}
    assert conversation_of(whole, [strict]) == conversation_of(whole, [named]) == EXPECTED


def test_a_schema_that_cannot_be_checked_allows_every_call():
    schema = {"type": "object", "properties": {"city": {"type": "integer", "pattern": "B.*"}}}
    assert conversation_of(WHOLE, [{"name": "weather", "parameters": schema}]).messages == EXPECTED.messages


def read(tmp_path) -> list[Document | Rejected]:
    return list(read_messages(SourceConfig("messages", "chat", "MIT", path=str(tmp_path)), 0))


def test_rows_become_conversations_and_broken_ones_say_why(tmp_path):
    rows = [
        {"messages": WHOLE, "tools": TOOLS, "score": 3},
        {"messages": [USER, USER, ANSWER]},
        {"messages": [USER]},
        {"messages": [USER, ANSWER]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole, broken, unanswered, plain = read(tmp_path)
    assert isinstance(whole, Document)
    assert (whole.form, whole.language, whole.licence) == ("conversation", "chat", "MIT")
    assert read_conversation(whole.text) == EXPECTED
    assert isinstance(broken, Rejected)
    assert broken.source == f"{tmp_path}/a.jsonl:2"
    assert broken.error == "turn 1 (user): expected assistant after user"
    assert isinstance(unanswered, Rejected)
    assert (unanswered.reason, unanswered.error) == ("empty", "")
    assert isinstance(plain, Document)
    assert plain.group == whole.group  # the same question


def test_tools_by_their_older_name_are_kept_and_a_row_with_both_names_is_broken(tmp_path):
    functions = [TOOLS[0]["function"]]
    rows = [{"messages": WHOLE, "functions": functions}, {"messages": WHOLE, "functions": functions, "tools": TOOLS}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist([{key: json.dumps(rows[0][key]) for key in rows[0]}]), tmp_path / "b.parquet")
    one, both, other = read(tmp_path)
    assert isinstance(one, Document)
    assert isinstance(other, Document)
    assert read_conversation(one.text) == read_conversation(other.text) == EXPECTED
    assert isinstance(both, Rejected)
    assert both.error == "the row has tools and functions: expected one of them"


def test_rows_of_parquet_with_nulls_where_keys_are_missing(tmp_path):
    turns = [
        {"role": "user", "content": "Weather?", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call("Oslo", "1")]},
    ]
    pq.write_table(pa.Table.from_pylist([{"messages": turns, "tools": json.dumps(TOOLS)}]), tmp_path / "a.parquet")
    (one,) = read(tmp_path)
    assert isinstance(one, Document)
    assert read_conversation(one.text).messages[1].calls == (Call("weather", {"city": "Oslo"}),)


def test_addresses_of_conversations_are_replaced_inside_their_texts(tmp_path):
    """A line end before an address is an escape in the JSON that a corpus keeps."""
    talks = [[{"role": "user", "content": f"{i}: Write to\nbob@example.com"}, ANSWER] for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    config = CorpusConfig("own", {"c": [SourceConfig("messages", "chat", path=str(tmp_path))]}, 0.3)
    found = [read_conversation(one.text) for _, one in read_corpus(config, "c", 0, IngestReport())]
    assert {one.messages[0].content for one in found} == {f"{i}: Write to\n<EMAIL>" for i in range(40)}
