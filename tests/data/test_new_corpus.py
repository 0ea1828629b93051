"""`dist-lm data new`: the corpus file that it writes is one that a launch takes, for the data that is there."""

import csv
import gzip
import json
from pathlib import Path

import pytest
import zstandard
from rich.console import Console

from dist_lm.data.ingest import Texts
from dist_lm.data.new import new_corpus, next_commands
from dist_lm.data.propose import columns_of, propose
from dist_lm.errors import ConfigError, UserError
from dist_lm.launcher.compose import compose_config

ROWS = [{"content": f"def f{i}():\n    return {i}\n" * 9, "lang": "Python", "license": "MIT"} for i in range(30)]
CHAT = {
    "messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Three."}],
    "tools": [],
}
PROSE = "It rained all day, and nobody went out to see what the river had done to the bridge.\n"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    code = folder / "repo"
    code.mkdir(parents=True)
    for place in range(4):
        (code / f"m{place}.py").write_text(f"import m{place}\n\nx = {place}\n" * 5)
    (code / "logo.png").write_bytes(b"\x89PNG" * 50)
    (code / ".hidden.py").write_text("secret = 1\n")
    rows = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (folder / "rows.jsonl.zst").write_bytes(zstandard.compress(rows))
    (folder / "chat.jsonl.gz").write_bytes(gzip.compress(json.dumps(CHAT).encode() + b"\n"))
    with (folder / "notes.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "body"], *([f"n{i}", f"{i} {PROSE}"] for i in range(20))])
    return folder


def written(data: Path, *names: str, **options) -> tuple[Path, str]:
    """The corpus file, and what is printed."""
    out = data.parent / "lab" / "corpus" / "ours.yaml"
    console = Console(record=True, width=100)
    new_corpus([str(data / name) for name in names], out, console, **{"sample_bytes": 1 << 20} | options)
    return out, console.export_text()


def test_a_corpus_file_is_one_that_a_launch_takes(data):
    out, text = written(data, "repo", "rows.jsonl.zst", "chat.jsonl.gz", "notes.csv")
    config = compose_config([f"hydra.searchpath=[{out.parent.parent}]", "corpus=ours", "stage=code"]).corpus
    assert {name: [one.reader for one in sources] for name, sources in config.corpora.items()} == {
        "language": ["csv"],
        "code": ["files", "jsonl"],
        "tools": ["messages"],
    }
    csv_source, rows = config.corpora["language"][0], config.corpora["code"][1]
    assert (csv_source.column, csv_source.id_column) == ("body", "id")
    assert (rows.column, rows.language_column, rows.licence_column) == ("content", "lang", "license")
    documents = [item.document for item in Texts(config, 0).screened("code")]
    assert {document.language for document in documents} == {"python"}
    assert len(documents) == 34
    assert "licences: MIT 30, not given 4" in text
    assert "suffix .png" in text
    assert "suffix .png" in out.read_text()


def test_next_commands_compose(data):
    out, text = written(data, "repo", "notes.csv", "chat.jsonl.gz")
    commands = list(next_commands(out, ["language", "code", "tools"]))
    assert all(command in text for command in commands)
    for command in [*commands, *next_commands(out, ["code"]), *next_commands(out, ["tools"])]:
        folder, *overrides = command.split()[4:]
        compose_config([f"hydra.searchpath=[{folder}]", *overrides])


def test_what_would_be_dropped_is_counted(data):
    (data / "again.jsonl").write_text("".join(json.dumps({"text": PROSE}) + "\n" for _ in range(4)))
    _, text = written(data, "again.jsonl")
    assert "would be dropped: duplicate 3" in text


def test_a_sample_is_called_one(data):
    _, text = written(data, "rows.jsonl.zst", sample_bytes=1000)
    assert "the first" in text


def test_a_place_without_data_says_what_is_there(data, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"pictures.*\.png: 1"):
        propose(str(tmp_path / "pictures"))
    with pytest.raises(ConfigError, match="no such file"):
        propose(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.tar", "a.csv"])
def test_a_damaged_file_is_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(b'"damaged')
    with pytest.raises(UserError, match=name) as refused:
        propose(str(tmp_path / name))
    assert "\n" not in str(refused.value)


def test_an_output_that_no_launch_would_find_is_refused(data):
    written(data, "notes.csv")
    with pytest.raises(ConfigError, match="--force"):
        written(data, "notes.csv")
    written(data, "notes.csv", force=True)
    with pytest.raises(ConfigError, match=r"DIR/corpus/NAME\.yaml"):
        new_corpus([str(data / "notes.csv")], data / "ours.yaml", Console(), sample_bytes=1)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "a", "id": "x"}, ({"column": "text", "id_column": "id"}, False)),
        ({"prompt": "short", "story": "longer than the other"}, ({"column": "story"}, False)),
        ({"turns": [{"role": "user", "content": "a"}]}, ({"column": "turns"}, True)),
        ({"stars": 3}, ({}, False)),
    ],
)
def test_columns_are_guessed_from_rows(row, expected):
    assert columns_of([row]) == expected
