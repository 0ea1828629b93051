"""Members of a zip are read as files of a folder, exactly once and whole, or the zip is refused in one line."""

import io
import json
import os
import random
import struct
import zipfile
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.inputs import changes, hashed, inputs_of
from dist_lm.data.screening import SourceReader
from dist_lm.data.sources import archive, decompression
from dist_lm.data.sources.snapshot import Snapshot
from dist_lm.document import Document
from dist_lm.errors import ChangedInputError, UserError

ROWS = [{"text": f"text {number} " * 20} for number in range(100)]


def lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def packed(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def source_of(path: Path | str, **keys: object) -> SourceConfig:
    return SourceConfig(**{"reader": "jsonl", "language": "english", "path": str(path), **keys})


def documents_of(path: Path | str, **keys: object) -> list[Document]:
    candidates = SourceReader(0).read(source_of(path, **keys))
    return [candidate for candidate in candidates if isinstance(candidate, Document)]


FOLDER = {
    "b/c.jsonl": lines(ROWS[30:60]),
    "a.jsonl": lines(ROWS[:30]),
    "README.md": b"no rows",
    "__MACOSX/a.jsonl": lines(ROWS[:3]),
    "b/.trash/d.jsonl": lines(ROWS[:3]),
    "b-test/e.jsonl": lines(ROWS[60:]),
    "skip/f.jsonl": lines(ROWS[:3]),
}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("place", ["data.zip", "", "*.zip"])
def test_members_are_read_as_the_files_of_a_folder_are(tmp_path, place, method):
    (tmp_path / "data.zip").write_bytes(packed(FOLDER, method))
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(tmp_path / "data.zip") as file:
        file.extractall(unpacked)
    keys = {"exclude": ["skip/"]}
    expected = documents_of(unpacked, **keys)
    listing = inputs_of(source_of(unpacked, **keys))
    unpacked.rename(tmp_path / ".unpacked")

    documents = documents_of(tmp_path / place, **keys)
    assert [document.text for document in documents] == [row["text"] for row in ROWS[:60]]
    assert [document.source for document in documents] == [
        document.source.replace(str(unpacked), f"{tmp_path}/data.zip") for document in expected
    ]
    of_zip = [file for file in inputs_of(source_of(tmp_path / place, **keys)).files if ".zip/" in file.name]
    # In a zip, all that `exclude` names is files.
    assert {
        (file.name.removeprefix(f"{tmp_path}/data.zip/").removesuffix("f.jsonl"), file.left_out) for file in of_zip
    } == {(file.name.removeprefix(f"{unpacked}/"), file.left_out) for file in listing.files}


def test_a_single_member_is_read_whatever_its_suffix_and_compression(tmp_path):
    import gzip

    (tmp_path / "a.zip").write_bytes(packed({"data.json": json.dumps(ROWS).encode()}))
    (tmp_path / "b.zip").write_bytes(packed({"data.jsonl.gz": gzip.compress(lines(ROWS))}))
    for name in ("a.zip", "b.zip"):
        assert len(documents_of(tmp_path / name)) == len(ROWS)


def test_a_zip_in_a_zip_is_left_out(tmp_path):
    inner = packed({"a.jsonl": lines(ROWS)})
    (tmp_path / "a.zip").write_bytes(packed({"a.jsonl": lines(ROWS[:7]), "inner.zip": inner}))
    assert len(documents_of(tmp_path / "a.zip")) == 7
    (left_out,) = inputs_of(source_of(tmp_path / "a.zip")).left_out
    assert left_out.left_out == "suffix .zip"
    (tmp_path / "b.zip").write_bytes(packed({"inner.zip": inner}))
    with pytest.raises(UserError, match=r"b.zip/inner.zip: .*unpack it"):
        documents_of(tmp_path / "b.zip")


def test_parquet_in_a_zip_is_read(tmp_path):
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), buffer, row_group_size=30)
    (tmp_path / "a.zip").write_bytes(packed({"data/train.parquet": buffer.getvalue(), "note.txt": b""}))
    texts = [document.text for document in documents_of(tmp_path / "a.zip", reader="parquet")]
    assert texts == [row["text"] for row in ROWS]


def test_source_files_come_from_zips_that_are_named_but_not_from_those_in_a_repository(tmp_path):
    content = packed({"repo-main/a.py": b"x = 1\n", "repo-main/.git/config": b"", "repo-main/tests/test_a.py": b"y\n"})
    (tmp_path / "repo.zip").write_bytes(content)
    keys = {"reader": "files", "language": ""}
    for place in ("repo.zip", "*.zip"):
        documents = documents_of(tmp_path / place, **keys)
        assert [(document.text, document.language) for document in documents] == [
            ("x = 1\n", "python"),
            ("y\n", "python"),
        ]
    (tmp_path / "own.py").write_text("z = 1\n")
    (tmp_path / "broken.zip").write_bytes(b"a fixture")
    assert [document.text for document in documents_of(tmp_path, **keys)] == ["z = 1\n"]


def test_the_listing_goes_through_hashes_and_tells_of_another_zip(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(packed({"a.jsonl": lines(ROWS), "b.jsonl": lines(ROWS[:5])}))
    before = hashed(inputs_of(source_of(path)))
    assert changes(before, hashed(inputs_of(source_of(path)))) == []
    path.write_bytes(packed({"a.jsonl": lines(ROWS[::-1]), "b.jsonl": lines(ROWS[:5])}))
    (words,) = changes(before, hashed(inputs_of(source_of(path))))
    assert words == f"{path}/a.jsonl: other contents (sha256)"


@pytest.mark.parametrize("keeps_time", [False, True])
def test_a_zip_that_changes_after_the_listing_is_an_error_that_names_the_member(tmp_path, keeps_time):
    path = tmp_path / "a.zip"
    path.write_bytes(packed({"a.jsonl": lines(ROWS), "b.jsonl": lines(ROWS)}, zipfile.ZIP_STORED))
    files = Snapshot.of(source_of(path))
    first, _ = files.listing.taken
    with files.reading(first) as reading:
        reading.open_content().read()

    status = path.stat()
    path.write_bytes(packed({"a.jsonl": lines(ROWS[::-1]), "b.jsonl": lines(ROWS)}, zipfile.ZIP_STORED))
    if keeps_time:
        os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))
    with pytest.raises((ChangedInputError, OSError)) as refused, files.reading(first) as reading:
        reading.open_content().read()
    assert isinstance(refused.value, ChangedInputError) or "CRC" in str(refused.value)


def overlapping() -> bytes:
    """Two entries of the directory for one member, as in zips that unpack to petabytes."""
    content = bytearray(packed({"a.jsonl": lines(ROWS), "b.jsonl": lines(ROWS)}))
    entries = [index for index in range(len(content)) if content[index : index + 4] == b"PK\x01\x02"]
    content[entries[1] + 42 : entries[1] + 46] = content[entries[0] + 42 : entries[0] + 46]
    return bytes(content)


def with_field(offset: int, form: str, value: int) -> bytes:
    """A zip with another value in the first entry of its directory."""
    content = bytearray(packed({"a.jsonl": lines(ROWS), "b.jsonl": lines(ROWS)}))
    entry = content.index(b"PK\x01\x02")
    struct.pack_into(form, content, entry + offset, value)
    return bytes(content)


def twice() -> bytes:
    content = packed({"a.jsonl": lines(ROWS), "b.jsonl": lines(ROWS)})
    return content.replace(b"b.jsonl", b"a.jsonl")


HOSTILE = {
    "overlapping": (overlapping(), "share bytes"),
    "twice": (twice(), "two members a.jsonl"),
    "encrypted": (with_field(8, "<H", 1), "a.jsonl is encrypted: unpack it with the password"),
    "deflate64": (with_field(10, "<H", 9), "packed by method 9, which is not read"),
    "bzip2": (with_field(10, "<H", 12), "packed by method 12, which is not read"),
    "claims 4 GB": (with_field(24, "<I", 4_000_000_000), "more than 1,000 times its size"),
    "claims less": (with_field(24, "<I", 10), "CRC"),
    "points elsewhere": (with_field(42, "<I", 3), "damaged|directory says|share bytes"),
    "no zip": (b"text", "no zip file"),
    "empty": (b"", "no zip file"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_zip_ends_in_one_line_that_names_it(tmp_path, name):
    content, words = HOSTILE[name]
    path = tmp_path / "data.zip"
    path.write_bytes(content)
    for place in (path, tmp_path):
        with pytest.raises(UserError, match=words) as refused:
            documents_of(place)
        assert str(path) in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(decompression, "UNSUSPICIOUS", 1 << 20)
    (tmp_path / "a.zip").write_bytes(packed({"a.jsonl": b"\n" * (8 << 20)}))
    with pytest.raises(UserError, match=r"a.zip: cannot be read: its content is more than 1,000 times its size"):
        documents_of(tmp_path / "a.zip")


def test_more_members_than_fit_into_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MOST_MEMBERS", 3)
    (tmp_path / "a.zip").write_bytes(packed({f"{number}.jsonl": b"" for number in range(4)}))
    with pytest.raises(UserError, match="it has 4 members, at most 3 are read"):
        documents_of(tmp_path / "a.zip")


def test_damaged_zips_give_the_right_rows_or_one_line(tmp_path):
    """Any cut and any flipped byte: no traceback, and no row that the zip does not have."""
    whole = packed({"a.jsonl": lines(ROWS), "b/c.jsonl": lines(ROWS[:9])})
    texts = {row["text"] for row in ROWS}
    draw = random.Random(5)
    for number in range(60):
        content = bytearray(whole)
        if number % 2:
            content = content[: draw.randrange(len(content))]
        else:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path = tmp_path / f"{number}.zip"
        path.write_bytes(content)
        with suppress(UserError):
            assert {document.text for document in documents_of(path)} <= texts


def test_a_zip_behind_a_url_is_refused_with_the_way_out(served):
    with pytest.raises(UserError, match="a zip behind a URL is not read: download it"):
        documents_of(f"{served.url}/a.zip")
