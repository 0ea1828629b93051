"""A corpus keeps the rows of its conversations and rankings beside its tars, in the order of the documents."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_lm.chat.documents import read_kept_row, row_of, write_conversation
from dist_lm.chat.messages import Conversation, Message
from dist_lm.config.corpus import CorpusConfig, SourceConfig
from dist_lm.data.inspect import inspect_corpus
from dist_lm.data.journal import rows_path
from dist_lm.data.manifest import Recipe, read_manifest
from dist_lm.data.screening import IngestReport
from dist_lm.data.shard_writer import CorpusWriter, read_kept_rows
from dist_lm.data.sources.hub_rankings import read_hub_rankings
from dist_lm.data.sources.messages import read_messages
from dist_lm.document import Document, TokenizedDocument
from dist_lm.errors import ArtefactError
from tests.data.reading import read_corpus

RECIPE = Recipe("0" * 64, 256, "made", documents_per_member=3, shard_tokens=40)


def conversation(number: int) -> Conversation:
    return Conversation((Message("user", f"Say {number}"), Message("assistant", str(number))))


def tokenized(number: int, row: str) -> TokenizedDocument:
    tokens = np.arange(1, 8, dtype=np.uint16)
    mask = (tokens > 4).astype(np.uint8)
    return TokenizedDocument(tokens, 7, "chat", f"chats:{number}", "own", mask, row=row)


def write(directory: Path, rows: list[str]) -> None:
    """Every fifth document is val."""
    with CorpusWriter(directory, RECIPE) as writer:
        for number, row in enumerate(rows):
            writer.write("val" if number % 5 == 4 else "train", tokenized(number, row), text=bytes([number]))
        writer.finish({})


def files_in(directory: Path) -> dict[str, bytes]:
    """All but the indices, which hold the times of their tars."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".index"}


def test_rows_come_back_in_the_order_of_the_documents_over_all_tars(tmp_path):
    rows = [
        "" if number % 7 == 3 else json.dumps({"n": number, "text": "ä\nb"}, ensure_ascii=False) for number in range(40)
    ]
    write(tmp_path / "a", rows)
    assert len(read_manifest(tmp_path / "a").splits["train"].shards) > 2
    for split, expected in (("train", [row for n, row in enumerate(rows) if n % 5 != 4]), ("val", rows[4::5])):
        assert list(read_kept_rows(tmp_path / "a", split)) == expected
    write(tmp_path / "b", rows)
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")
    assert inspect_corpus(tmp_path / "a")["problems"] == []


def test_a_corpus_without_rows_is_as_ever(tmp_path):
    write(tmp_path / "a", [""] * 20)
    assert not list((tmp_path / "a").glob("*.rows.jsonl.zst"))
    assert "rows" not in (tmp_path / "a" / "manifest.json").read_text()
    assert list(read_kept_rows(tmp_path / "a", "val")) == [""] * 4


@pytest.mark.parametrize("damage", ["gone", "cut", "edited"])
def test_damaged_rows_are_found_and_built_again(tmp_path, damage):
    directory = tmp_path / "a"
    write(directory, [json.dumps({"n": number}) for number in range(40)])
    before = files_in(directory)
    path = rows_path(directory / read_manifest(directory).splits["train"].shards[1].name)
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[:-3] if damage == "cut" else content[:-3] + b"abc")
    with pytest.raises(ArtefactError, match=rf"{path.name}: (missing|other contents)"):
        list(read_kept_rows(directory, "train"))
    assert [problem for problem in inspect_corpus(directory)["problems"] if problem.startswith("rows of train-000001")]

    # A build keeps the tars before it and writes the others.
    with CorpusWriter(directory, RECIPE) as writer:
        kept = dict(writer.kept)
        assert kept["train"] == read_documents(before)
        for number in range(40):
            split = "val" if number % 5 == 4 else "train"
            if kept[split]:
                kept[split] -= 1
                writer.pass_over(split, bytes([number]))
            else:
                writer.write(split, tokenized(number, json.dumps({"n": number})), text=bytes([number]))
        writer.finish({})
    assert files_in(directory) == before


def read_documents(files: dict[str, bytes]) -> int:
    """Documents of the first tar of train."""
    return json.loads(files["manifest.json"])["splits"]["train"]["shards"][0]["counts"]["documents"]


def test_a_row_has_the_document_and_the_other_columns():
    text = write_conversation(Conversation((Message("system", "Be brief."), *conversation(1).messages)))
    document = Document(text, "chat", "s", "own", "", "conversation", row='{"level": 3}')
    prompt, columns = read_kept_row(row_of(document))
    assert prompt.messages == (Message("system", "Be brief."), Message("user", "Say 1"))
    assert [turn["role"] for turn in columns.pop("messages")] == ["system", "user", "assistant"]
    assert columns == {"level": 3}
    assert row_of(replace(document, row="")) == ""


def rows_file(path: Path, rows: list[dict[str, Any]]) -> SourceConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(reader="messages", path=str(path), language="chat")


def test_readers_keep_the_columns_that_are_no_part_of_the_text(tmp_path):
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    source = rows_file(tmp_path / "a.jsonl", [{"messages": turns, "tools": [], "answer": 4, "of": {"a": [None]}}])
    (document,) = read_messages(source, 0)
    assert isinstance(document, Document)
    assert json.loads(document.row) == {"answer": 4, "of": {"a": [None]}}

    pair = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c", "margin": 2.5}
    (tmp_path / "hh.jsonl").write_text(json.dumps(pair) + "\n")
    source = SourceConfig(
        reader="hub_rankings", path=str(tmp_path / "hh.jsonl"), language="people", rows="hh-rlhf", licence="MIT"
    )
    (document,) = read_hub_rankings(source, 0)
    assert isinstance(document, Document)
    prompt, columns = read_kept_row(row_of(document))
    assert prompt.messages == (Message("user", "a"),)
    assert columns == {"margin": 2.5, "completions": ["b", "c"], "ranks": [0, 1], "judgements": []}


def test_what_is_kept_of_a_row_is_as_clean_as_the_text(tmp_path):
    """A corpus holds no address or key, in no file."""
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    rows = [{"messages": turns, "by": "ann@example.org"}]
    source = rows_file(tmp_path / "a.jsonl", rows)
    more = [{"messages": [{"role": "user", "content": f"Say {i}"}, turns[1]], "by": "nobody"} for i in range(40)]
    held_out = replace(rows_file(tmp_path / "b.jsonl", more), held_out=True)
    config = CorpusConfig(name="made", corpora={"chats": [source, held_out]})
    documents = [document for _, document in read_corpus(config, "chats", 0, IngestReport())]
    assert [json.loads(document.row)["by"] for document in documents] == ["<EMAIL>", *["nobody"] * 40]
