"""Which split of a snapshot is read, and columns that folders give: test files never train silently."""

import json
from pathlib import Path

import pytest

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.inputs import Input, Inputs, changes, inputs_of
from dist_lm.data.propose import propose
from dist_lm.data.screening import SourceReader
from dist_lm.data.sources.rows import folder_columns
from dist_lm.data.sources.splits import kind_of, split_of
from dist_lm.document import Document
from dist_lm.errors import UserError


@pytest.mark.parametrize(
    ("name", "kind", "split"),
    [
        ("data/train-00000-of-00002.parquet", "train", "train"),
        ("data/test-00000-of-00001.parquet", "test", "test"),
        ("data/validation-00000-of-00001-8c2f.parquet", "validation", "validation"),
        ("data/train_sft-00000-of-00003.parquet", "train", "train_sft"),
        ("data/test_gen-00000-of-00003.parquet", "test", "test_gen"),
        ("train/0000.parquet", "train", "train"),
        ("test/data-00000-of-00002.arrow", "test", "test"),
        ("split=dev/a.jsonl", "validation", "validation"),
        ("TEST.jsonl", "test", "test"),
        ("hotpot_dev_v1.json", "validation", "validation"),
        ("dev2017.jsonl", "validation", "validation"),
        ("human-eval-train.jsonl", "train", "train"),
        ("test/train.jsonl", "test", "test"),
        ("gsm8k.eval.jsonl", "test", "test"),
        ("pretrained.jsonl", "", ""),
        ("latest.jsonl", "", ""),
        ("tests/a.jsonl", "", ""),
        ("contest.jsonl", "", ""),
        ("interval.jsonl", "", ""),
        ("prompts-00000-of-00001.parquet", "", "prompts"),
    ],
)
def test_a_name_tells_its_split(name, kind, split):
    assert (kind_of(name), split_of(name)) == (kind, split)


def put(folder: Path, *names: str) -> None:
    """A file for each name, with ten rows that hold it."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps({"text": f"{name} {number}"}) + "\n" for number in range(10)))


def names_read(path: Path, **keys: object) -> set[str]:
    source = SourceConfig(**{"reader": "jsonl", "language": "english", "path": str(path), **keys})
    candidates = SourceReader(0).read(source)
    return {candidate.text.split()[0] for candidate in candidates if isinstance(candidate, Document)}


SNAPSHOT = ("data/train-00000-of-00001.jsonl", "data/validation-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl")


@pytest.mark.parametrize(
    ("place", "keys", "numbers"),
    [
        ("", {}, {0}),
        ("data", {}, {0}),
        ("data/*.jsonl", {}, {0}),
        ("**/*", {}, {0}),
        ("*", {}, {0}),
        ("", {"split": "train"}, {0}),
        ("", {"split": "test"}, {2}),
        ("", {"split": "val"}, {1}),
        ("", {"split": "validation"}, {1}),
        ("data/test-*.jsonl", {}, {2}),
        ("data/test-00000-of-00001.jsonl", {}, {2}),
        ("", {"held_out": True}, {0, 1, 2}),
        ("", {"held_out": True, "split": "test"}, {2}),
    ],
)
def test_train_is_read_unless_a_split_is_named(tmp_path, place, keys, numbers):
    put(tmp_path, *SNAPSHOT)
    assert names_read(tmp_path / place, **keys) == {SNAPSHOT[number] for number in numbers}


def test_folders_that_a_glob_matches_have_splits(tmp_path):
    put(tmp_path, "set/train/0.jsonl", "set/test/0.jsonl")
    assert names_read(tmp_path / "set" / "*") == {"set/train/0.jsonl"}
    assert names_read(tmp_path / "set" / "test") == {"set/test/0.jsonl"}
    assert names_read(tmp_path / "*" / "test") == {"set/test/0.jsonl"}


def test_files_without_a_split_are_train(tmp_path):
    put(tmp_path, "a.jsonl", "test.jsonl", "b/c.jsonl")
    assert names_read(tmp_path) == {"a.jsonl", "b/c.jsonl"}
    assert names_read(tmp_path, split="test") == {"test.jsonl"}


def test_a_folder_of_test_files_alone_is_refused_with_the_way_out(tmp_path):
    put(tmp_path, "test-00000-of-00001.jsonl")
    for place in ("", "*.jsonl"):
        with pytest.raises(UserError, match=r"1 left out \(split test: 1\).*names the split: split: test"):
            names_read(tmp_path / place)
    with pytest.raises(UserError, match="split test"):
        propose(str(tmp_path))


def test_several_splits_of_train_are_not_mixed(tmp_path):
    put(tmp_path, "train_gen-00000-of-00001.jsonl", "train_sft-00000-of-00001.jsonl", "test_sft-00000-of-00001.jsonl")
    with pytest.raises(UserError, match="holds the splits train_gen, train_sft: name one, as split: train_gen"):
        names_read(tmp_path)
    assert names_read(tmp_path, split="train_sft") == {"train_sft-00000-of-00001.jsonl"}
    assert names_read(tmp_path, split="test_sft") == {"test_sft-00000-of-00001.jsonl"}


def test_source_files_have_no_splits(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_a.py").write_text("x = 1\n")
    assert names_read(tmp_path, reader="files", language="") == {"x"}
    (proposal,) = propose(str(tmp_path))
    assert len(proposal.inputs.taken) == 1


def test_data_new_names_what_it_leaves_out(tmp_path):
    put(tmp_path, *SNAPSHOT)
    (proposal,) = propose(str(tmp_path))
    assert [Path(file.name).name for file in proposal.inputs.taken] == ["train-00000-of-00001.jsonl"]
    assert any("other splits than train (test: 1, validation: 1)" in note for note in proposal.notes)


def test_a_corpus_of_an_earlier_release_is_not_built_again():
    """It read every split, and left out what this release can read."""
    train, test = Input("d/train.jsonl", 10, 1), Input("d/test.jsonl", 20, 2)
    packed, archive = Input("d/a.jsonl.xz", 5, 3, left_out="suffix .xz"), Input("d/b.zip", 5, 3, left_out="suffix .zip")
    before = Inputs((packed, archive, test, train))
    now = Inputs(
        (
            Input("d/a.jsonl.xz", 5, 3),
            Input("d/b.zip/x/c.jsonl", 3, 3, "crc32 00000000"),
            Input("d/test.jsonl", 20, 2, left_out="split test"),
            train,
        )
    )
    assert changes(before, now) == []
    added = Input("d/c.jsonl.xz", 5, 3)
    assert changes(before, Inputs((*now.files, added))) == ["1 file new: d/c.jsonl.xz"]


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("/data/lang=java/a.parquet", {"lang": "java"}),
        ("/data/lang=c%2B%2B/year=2024/a.jsonl", {"lang": "c++", "year": "2024"}),
        ("/data/lang=__HIVE_DEFAULT_PARTITION__/a.jsonl", {"lang": None}),
        ("s3://bucket/lang=go/a.parquet", {"lang": "go"}),
        ("https://h/x/a.jsonl?lang=go/b", {}),
        ("/data/lang=java", {}),
        ("/data/=java/a.jsonl", {}),
    ],
)
def test_folders_are_columns(name, columns):
    assert folder_columns(name) == columns


def test_rows_have_the_columns_of_their_folders(tmp_path):
    put(tmp_path, "lang=java/a.jsonl", "lang=Go/b.jsonl")
    with (tmp_path / "lang=Go" / "b.jsonl").open("a") as file:
        file.write(json.dumps({"text": "own", "lang": "rust"}) + "\n")
    source = SourceConfig("jsonl", path=str(tmp_path), language_column="lang")
    documents = [candidate for candidate in SourceReader(0).read(source) if isinstance(candidate, Document)]
    languages = {document.text.split("/")[0]: document.language for document in documents}
    assert languages == {"lang=java": "java", "lang=Go": "go", "own": "rust"}
    (proposal,) = propose(str(tmp_path))
    assert proposal.source["language_column"] == "lang"
    assert len(inputs_of(proposal.typed()).taken) == 2
