"""The inputs of a source: comparison in words, and the way to the manifest and back."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.inputs import Input, Inputs, changes, hashed, inputs_of
from dist_lm.data.sources.reader import reader_of
from dist_lm.errors import ArtefactError, ConfigError

A = Input("d/a.jsonl", 10, 1)
B = Input("d/b.jsonl", 20, 2)
URL = Input("https://h/x.parquet", 5, etag='"1"')
NOTES = Input("d/README.md", 3, 3, left_out="suffix .md")


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ((A, B, NOTES), (A, B), []),  # what is left out changes no text
        ((A,), (A, B), ["1 file new: d/b.jsonl"]),
        ((A, B), (A,), ["1 file gone or left out: d/b.jsonl"]),
        ((A, B), (A, Input("d/b.jsonl", 20, 2, left_out="hidden")), ["1 file gone or left out: d/b.jsonl"]),
        ((A,), (Input("d/a.jsonl", 3010, 1),), ["d/a.jsonl: 3,010 bytes, was 10"]),
        ((A,), (Input("d/a.jsonl", 10, 5),), ["d/a.jsonl: changed at another time (mtime), the size is the same"]),
        ((URL,), (Input(URL.name, 5, etag='"2"'),), ['https://h/x.parquet: ETag "2", was "1"']),
        ((A, B), (B, A), ["the same files in another order"]),
        ((Input("a", 1, 1, sha256="x"),), (Input("a", 1, 9, sha256="x"),), []),
        ((Input("a", 1, 1, sha256="x"),), (Input("a", 1, 1, sha256="y"),), ["a: other contents (sha256)"]),
        ((), tuple(Input(f"{i}", 1) for i in range(9)), ["9 files new: 0, 1, 2 and 6 more"]),
    ],
)
def test_two_listings_are_compared_in_words(before, now, words):
    assert changes(Inputs(before), Inputs(now)) == words


def test_a_listing_goes_through_json_and_says_what_it_leaves_out():
    listing = Inputs((A, NOTES, URL))
    assert Inputs.from_json(json.loads(json.dumps(listing.to_json()))) == listing
    assert listing.summary() == "2 files taken (15 bytes), 1 left out (suffix .md: 1)"


def test_hashes_are_those_of_the_contents(tmp_path):
    path = tmp_path / "a"
    path.write_text("a")
    before = hashed(Inputs((Input(str(path), 1, 1), NOTES)))
    assert before.left_out == (NOTES,)
    path.write_text("b")
    assert changes(before, hashed(Inputs((Input(str(path), 1, 1),)))) == [f"{path}: other contents (sha256)"]


def test_generated_text_has_no_inputs():
    assert inputs_of(SourceConfig("tools", "tools")) == Inputs()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            SourceConfig("tools", "t", split="test"),
            r"reader=tools: split=test: .*not take split; it takes reader",
        ),
        (
            SourceConfig("tests.data.own_readers:read_numbers", "t", dataset="x"),
            r"read_numbers: dataset=x: .* it takes reader, limit, held_out, language, licence, subset .*@reader\(keys",
        ),
        (SourceConfig("tests.data.own_readers:read_mixed", "t", subset="x"), "does not take subset"),
        (SourceConfig("hub", "t"), "reader=hub: dataset is missing; it takes"),
        (SourceConfig("tools"), "reader=tools: language is missing"),
        (SourceConfig("jsonl"), "reader=jsonl: language or language_column, and path are missing; it takes"),
    ],
)
def test_a_key_that_the_reader_does_not_take_is_refused_by_name(source, words):
    with pytest.raises(ConfigError, match=words) as refused:
        inputs_of(source)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "place",
    [
        *("https://u:p@h/x", "https://h/x?X-Amz-Signature=1", "s3://k:s@b/x", "https://h/x?a=1&access_token=t"),
        *(f"https://h/x?a=1&{name}=t" for name in ("access_key", "accesskey", "AWSAccessKeyId", "passwd", "auth")),
        *(f"https://h/x?{name}=t" for name in ("db_pass", "pwd", "basic_auth", "key", "api-key", "sig", "jwt")),
    ],
)
def test_no_credential_reaches_the_configuration(place):
    with pytest.raises(ConfigError, match="credentials come from the environment"):
        SourceConfig("jsonl", "t", path=[place])


@pytest.mark.parametrize("name", ["sort_key", "monkey", "tokenizer", "author", "tokens", "compass", "design"])
def test_other_names_in_an_address_are_taken(name):
    assert SourceConfig("jsonl", "t", path=f"https://h/auth/key/x?{name}=t").path


def test_the_readers_take_the_keys_of_the_examples_on_the_page():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    sources = [SourceConfig(**source) for block in blocks for corpus in block["corpora"].values() for source in corpus]
    assert {source.reader for source in sources} >= {"files", "jsonl", "parquet", "csv", "tars", "messages"}
    for source in sources:
        reader_of(source)


def test_a_pattern_that_is_none_is_refused_by_its_source_and_key(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match=r"source reader=files: exclude=\['\[z-a\]'\]: expected patterns"):
        inputs_of(SourceConfig("files", "python", path=str(tmp_path), exclude=["[z-a]"]))


@pytest.mark.parametrize("pattern", ["*/*.jsonl", "**/*.jsonl", "*/inner/a.jsonl", "[co]*/inner/*"])
def test_a_glob_over_a_folder_that_may_not_be_read_is_refused(tmp_path, monkeypatch, pattern):
    for name in ("open", "closed"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "a.jsonl").write_text('{"text": "x"}\n')
        (tmp_path / name / "inner" / "a.jsonl").write_text('{"text": "x"}\n')
    source = SourceConfig("jsonl", "english", path=f"{tmp_path}/{pattern}")
    assert inputs_of(source).taken
    scandir = os.scandir

    def refusing(folder="."):  # root may read every folder
        if f"{tmp_path}/closed" in str(folder):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(ArtefactError, match=r"cannot be listed: PermissionError.*/closed"):
        inputs_of(source)


def test_archives_that_no_reader_opens_are_named_in_one_line() -> None:
    """Finds a hint for what the user excluded himself, and a list of a thousand names."""
    names = [f"/d/{number:03d}.tar.gz" for number in range(9)] + ["/d/A.ZIP", "/d/b.7z", "/d/c.rar", "/d/e.zip.txt"]
    left_out = [Input(name, left_out=f"suffix {name[-3:]}") for name in names]
    hint = Inputs((Input("/d/a.py"), *left_out)).unread_archives()
    assert hint.startswith("not opened: 12 archives (.tar.gz: 9, .zip: 1, .7z: 1, .rar: 1): /d/000.tar.gz, ")
    assert "and 9 more: unpack what should be read, or name the zip beside the folder" in hint
    assert "name the zip" not in Inputs((Input("/d/b.7z", left_out="suffix .7z"),)).unread_archives()
    for reason in ("exclude", "hidden", "split test"):
        assert not Inputs((Input("/d/a.zip", left_out=reason),)).unread_archives()
    assert not Inputs((Input("/d/a.zip"),)).unread_archives()
