"""What `data inspect` shows of a corpus, whole, damaged, or not there."""

import io
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.inputs import Input, Inputs
from dist_lm.data.inspect import inspect_corpus, origin_of, print_corpus
from dist_lm.data.manifest import read_manifest, write_manifest
from dist_lm.data.screening import IngestReport, Screened
from dist_lm.document import Document
from dist_lm.errors import ArtefactError
from dist_lm.storage.run_directory import WorkDirectory
from tests.data.synthetic_corpus import LANGUAGES, documents, lengths, write

LENGTHS = lengths(30, 50)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "work" / "corpora" / "code"
    return write(path, documents(LENGTHS), val=documents([6, 7, 8], seed=1))


def shown(directory: Path) -> tuple[bool, str]:
    console = Console(file=io.StringIO(), width=120)
    whole = print_corpus(directory, console)
    return whole, console.file.getvalue()  # pyright: ignore


def test_summary_is_json_and_adds_up(directory: Path) -> None:
    summary = json.loads(json.dumps(inspect_corpus(directory)))
    assert summary["splits"]["train"]["total"]["tokens"] == sum(LENGTHS)
    assert sum(row["tokens"] for row in summary["splits"]["train"]["languages"].values()) == sum(LENGTHS)
    assert sum(row["documents"] for row in summary["licences"]) == len(LENGTHS) + 3
    assert {row["origin"] for row in summary["origins"]} == {f"/text/{language}" for language in LANGUAGES}
    assert {shard["state"] for shard in summary["shards"]} == {"ok"}
    assert summary["ingest"] == {"dropped": 3}


def test_tables_show_it(directory: Path) -> None:
    whole, text = shown(directory)
    assert whole
    for expected in (
        "train-000000.tar",
        "val-000000.tar",
        "python",
        "MIT",
        "/text/sql",
        f"{sum(LENGTHS):,}",
        "ok",
    ):
        assert expected in text, expected
    assert "No samples" in text  # there is no tokenizer


def test_what_became_of_a_source_is_shown(directory: Path) -> None:
    report = IngestReport()
    source = SourceConfig("jsonl", "python", path="/data/a.jsonl")
    document = Document("x", "python", "/data/a.jsonl:1", "MIT", "")
    report.reject(document, source, "contains_val")
    report.keep(Screened(document, source, b"", "", 1), "train", {"<KEY>": 2})
    write_manifest(directory, replace(read_manifest(directory), ingest=asdict(report)))
    text = " ".join(shown(directory)[1].split())
    assert "documents kept source 2 1 jsonl /data/a.jsonl python dropped: contains_val 1 replaced: <KEY> 2" in text


@pytest.mark.parametrize("width", [80, 200])
def test_no_path_is_cut_or_broken(directory: Path, tmp_path: Path, width: int) -> None:
    """Finds a table that ends a long path with dots, and a line break inside one: neither could be copied."""
    folder = f"/data/{'a_folder_with_a_long_name/' * 9}"
    report = IngestReport()
    source = SourceConfig("jsonl", "python", path=f"{folder}a.jsonl")
    document = Document("x", "python", f"{folder}a.jsonl:1", "MIT", "")
    report.keep(Screened(document, source, b"", "", 1), "train", {})
    inputs = Inputs((Input(f"{folder}a.jsonl", 1), Input(f"{folder}b.7z", 1, left_out="suffix .7z")))
    manifest = replace(read_manifest(directory), ingest=asdict(report), inputs=[inputs.to_json()])
    write_manifest(directory, manifest)
    deep = tmp_path / folder.strip("/") / "corpora" / "code"
    shutil.copytree(directory, deep)
    (deep / "train-000000.index").write_bytes(b"")
    (deep / "train-000001.tar").write_bytes(b"damaged")

    console = Console(file=io.StringIO(), width=width)
    print_corpus(deep, console)
    lines = console.file.getvalue().splitlines()  # pyright: ignore
    for path in (str(deep), f"jsonl {folder}a.jsonl", f"{folder}a.jsonl ...:", f"{folder}b.7z"):
        assert [line for line in lines if path in line], path
    assert [line for line in lines if "not opened: 1 archive" in line]
    assert not [line for line in lines if "…" in line]


@pytest.mark.parametrize("name", ["code.tar", "folder"])
def test_data_that_is_no_corpus_is_sent_to_the_verb_that_looks_at_data(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "code.tar").write_bytes(b"anything")
    with pytest.raises(ArtefactError, match=rf"not a corpus.*dist-lm data new {tmp_path}/{name} --out"):
        inspect_corpus(tmp_path / name)


def test_a_document_of_each_language_is_shown(tiny_work: WorkDirectory) -> None:
    whole, text = shown(tiny_work.corpus("code"))
    assert whole
    assert "SELECT" in text
    assert "#!/bin/bash" in text
    assert "return" in text


def test_conversations_that_do_not_fit_are_counted(tiny_work: WorkDirectory) -> None:
    assert "Conversations left out" not in shown(tiny_work.corpus("code"))[1]
    whole, text = shown(tiny_work.corpus("tools"))
    assert whole
    rows = text[text.index("Conversations left out") :].splitlines()
    assert next(row.split() for row in rows if "4,096" in row)[1::2] == ["4,096", "0", "0.0%"]


def test_damage_is_shown_and_reported(directory: Path) -> None:
    tar = directory / "train-000001.tar"
    content = bytearray(tar.read_bytes())
    content[2000] ^= 1
    tar.write_bytes(content)
    (directory / "val-000000.tar").unlink()
    whole, text = shown(directory)
    assert not whole
    assert "sha256" in text
    assert "missing" in text
    assert "damaged" in text


@pytest.mark.parametrize("name", ["nowhere", "work", "work/corpora", "work/corpora/code/manifest.json"])
def test_a_path_that_is_no_corpus_is_one_line(directory: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtefactError) as error:
        inspect_corpus(tmp_path / name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_the_corpora_nearby_are_named(directory: Path) -> None:
    with pytest.raises(ArtefactError, match=r"not a corpus; these are: .*corpora/code"):
        inspect_corpus(directory.parent / "cod")


@pytest.mark.parametrize(
    ("source", "origin"),
    [
        ("/usr/lib/python3.11/ast.py", "/usr/lib/python3.11"),
        ("/usr/lib/python3.11/ast.py:parse", "/usr/lib/python3.11"),
        ("roneneldan/TinyStories#12", "roneneldan/TinyStories"),
        ("roneneldan/TinyStories:train:12", "roneneldan/TinyStories"),
        ("generated", "generated"),
    ],
)
def test_origin(source: str, origin: str) -> None:
    assert origin_of(source) == origin
