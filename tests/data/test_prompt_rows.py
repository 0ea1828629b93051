"""Prompts for reinforcement learning in the layouts of TRL, verl and OpenRLHF, with all their columns."""

import datetime
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_lm.chat.messages import Call, ChatError, Message
from dist_lm.data.prompt_rows import FileRow, find_rows, prompt_of, read_rows
from dist_lm.errors import ArtefactError, ConfigError

SYSTEM, QUESTION = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}
# After the scripts in examples/data_preprocess of verl.
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [QUESTION],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "4"},
    "extra_info": {"split": "train", "index": 0, "answer": "2 + 2 = 4 #### 4", "question": "2 + 2?"},
}
TRL = {"prompt": [SYSTEM, QUESTION], "solution": "$4$", "level": 1}
OPENRLHF = {"input": "2 + 2?", "label": "4", "datasource": "math"}
OPENRLHF_CHAT = {"context_messages": [SYSTEM, QUESTION], "answer": "4"}
CONVERSATION = [QUESTION, {"role": "assistant", "content": "4"}, {"role": "user", "content": "And 3 + 3?"}]


def rows_in(*files: Path) -> list[FileRow]:
    return list(read_rows(files))


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "rows.jsonl.gz"])
@pytest.mark.parametrize("row", [VERL, TRL, OPENRLHF, OPENRLHF_CHAT], ids=["verl", "trl", "openrlhf", "chat"])
def test_all_columns_of_a_row_come_with_its_prompt(tmp_path, name, row):
    (found,) = rows_in(written(tmp_path / name, [row]))
    assert (found.columns, found.error) == (row, "")
    assert found.place == f"{name} {'row' if name == 'rows.json' else 'line'} 1"
    turns = prompt_of(found.columns).messages
    assert turns[-1] == Message("user", "2 + 2?")
    assert [turn.role for turn in turns] == (["system", "user"] if row in (TRL, OPENRLHF_CHAT) else ["user"])


def test_a_whole_conversation_is_a_prompt_with_its_tools_and_as_json_text():
    assert [turn.role for turn in prompt_of({"prompt": CONVERSATION}).messages] == ["user", "assistant", "user"]
    assert prompt_of({"prompt": json.dumps(CONVERSATION)}) == prompt_of({"prompt": CONVERSATION})
    tool = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
    found = prompt_of({"prompt": [QUESTION, call, {"role": "tool", "content": "4"}], "tools": [tool]})
    assert found.messages[1].calls == (Call("add", {}),)
    assert [one.name for one in prompt_of({"prompt": "2 + 2?", "tools": [tool]}).tools] == ["add"]


def test_a_text_that_begins_like_a_list_is_a_text():
    for text in ("[1, 2] + [3]?", "[", "[]?", '["a"]', "[[[["):
        assert prompt_of({"prompt": text}).messages == (Message("user", text),)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": None}, "the prompt is empty"),
        ({"answer": "4"}, r"no column prompt \(or messages, .*\); the columns there are answer"),
        ({"question": "a", "instruction": "b"}, "the columns question, instruction may all be the prompt"),
        ({"prompt": CONVERSATION[:2]}, r"turn 1 \(assistant\): is last; expected a last turn of user or tool"),
        ({"prompt": [SYSTEM]}, "turn 1: missing; expected a turn of the user"),
        ({"prompt": "What is this?", "images": [{"path": "a.png"}]}, "the column images is not read"),
        ({"prompt": 3}, "expected a list"),
    ],
)
def test_a_row_without_a_prompt_says_why(columns, words):
    with pytest.raises(ChatError, match=words):
        prompt_of(columns)


def test_an_empty_column_of_images_is_none():
    """verl's scripts give text rows one."""
    assert prompt_of({"prompt": "x", "images": []}).messages == (Message("user", "x"),)


def test_a_broken_row_keeps_its_place_and_the_others_are_read(tmp_path):
    file = tmp_path / "rows.jsonl"
    deep = "[" * 100_000
    file.write_text(
        f'{{"prompt": "a"}}\n\n{{"prompt"\n[1]\n{{"prompt": "\\ud800"}}\n{{"prompt": {deep}\n{{"prompt": "b"}}\n'
    )
    found = rows_in(file)
    assert [row.place for row in found] == [f"rows.jsonl line {number}" for number in (1, 3, 4, 5, 6, 7)]
    assert [bool(row.error) for row in found] == [False, True, True, True, True, False]
    (tmp_path / "b.txt").write_bytes(b"Say it\r\n\n\xff\n")
    assert [(row.columns, row.error) for row in rows_in(tmp_path / "b.txt")] == [
        ({"prompt": "Say it"}, ""),
        ({}, "not UTF-8"),
    ]


def test_bytes_are_refused_by_their_column_and_dates_become_text(tmp_path):
    day = datetime.date(2026, 1, 31)
    rows = [{"prompt": "a", "day": day, "image": None}, {"prompt": "b", "day": day, "image": {"bytes": b"\x89PNG"}}]
    first, second = rows_in(written(tmp_path / "rows.parquet", rows))
    assert first.columns == {"prompt": "a", "day": "2026-01-31", "image": None}
    assert second.error.startswith("the column image holds bytes")


def test_a_damaged_file_is_named(tmp_path):
    file = written(tmp_path / "rows.parquet", [VERL])
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ArtefactError, match=r"rows\.parquet: cannot be read"):
        rows_in(file)
    with pytest.raises(ConfigError, match=r"rows\.csv is none of \.jsonl, \.txt"):
        find_rows(str(written(tmp_path / "rows.csv", [VERL])), "rlhf.prompts_from")
