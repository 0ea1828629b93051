"""Arrow files: the rows that pyarrow and datasets wrote, and no memory beyond the bytes that are there."""

import io
import json
import lzma
import random
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pytest

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.inputs import inputs_of
from dist_lm.data.screening import SourceReader
from dist_lm.data.sources import arrow
from dist_lm.data.sources.reader import Candidate, Rejected
from dist_lm.document import Document
from dist_lm.errors import UserError

ROWS = [
    {"text": f"text {number} " * 5, "lang": "java", "turns": [{"role": "user", "n": number}], "none": None}
    for number in range(300)
]
TEXTS = [row["text"] for row in ROWS]


def candidates_of(path: Path, **keys: object) -> list[Candidate]:
    source = SourceConfig(**{"reader": "arrow", "language": "english", "path": str(path), **keys})
    return list(SourceReader(0).read(source))


def texts_of(path: Path, **keys: object) -> list[str]:
    return [candidate.text for candidate in candidates_of(path, **keys) if isinstance(candidate, Document)]


def stream(table: pa.Table, batch: int = 70, **options: object) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=batch)
    return sink.getvalue()


def file(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    return sink.getvalue()


def feather(table: pa.Table, compression: str = "lz4") -> bytes:
    sink = io.BytesIO()
    pyarrow.feather.write_feather(table, sink, compression=compression, chunksize=70)
    return sink.getvalue()


TABLE = pa.Table.from_pylist(ROWS)
WRITTEN: dict[str, bytes] = {
    "stream.arrow": stream(TABLE),
    "old_stream.arrow": stream(TABLE, use_legacy_format=True),
    "file.arrow": file(TABLE),
    "lz4.feather": feather(TABLE),
    "zstd.feather": feather(TABLE, "zstd"),
    "large.arrow": stream(TABLE.set_column(0, "text", TABLE["text"].cast(pa.large_string()))),
    "view.arrow": stream(TABLE.set_column(0, "text", TABLE["text"].cast(pa.string_view()))),
    "dictionary.arrow": stream(TABLE.set_column(0, "text", TABLE["text"].dictionary_encode())),
    "binary.arrow": stream(TABLE.set_column(0, "text", TABLE["text"].cast(pa.binary()))),
    "packed.arrow.xz": lzma.compress(stream(TABLE)),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_rows_are_those_that_were_written(tmp_path, name):
    (tmp_path / name).write_bytes(WRITTEN[name])
    assert texts_of(tmp_path) == TEXTS
    assert {document.language for document in candidates_of(tmp_path, language_column="lang")} == {"java"}


def test_a_broken_text_is_one_broken_row(tmp_path):
    texts = [text.encode() for text in TEXTS]
    texts[100] = b"caf\xe9"
    table = pa.table({"text": pa.array(texts, pa.binary())})
    content = stream(table)
    # A program that does not check its texts declares bytes as text.
    broken = pa.table({"text": pa.Array.from_buffers(pa.string(), 300, table["text"].chunk(0).buffers())})
    assert content != stream(broken)
    (tmp_path / "a.arrow").write_bytes(stream(broken))
    candidates = candidates_of(tmp_path)
    (rejected,) = [candidate for candidate in candidates if isinstance(candidate, Rejected)]
    assert (rejected.source, rejected.reason) == (f"{tmp_path}/a.arrow:101", "invalid_utf8")
    assert len(candidates) == 300


def test_feather_of_version_1_is_refused_by_name(tmp_path):
    (tmp_path / "a.feather").write_bytes(b"FEA1" + bytes(100))
    with pytest.raises(UserError, match=r"a.feather: Feather of version 1 is not read: write it again"):
        candidates_of(tmp_path)


def claim_of_a_batch(content: bytes, position: int, form: str, value: int) -> bytes:
    changed = bytearray(content)
    struct.pack_into(form, changed, position, value)
    return bytes(changed)


def first_batch(content: bytes) -> int:
    """The position of the length of the first batch's metadata, in a stream."""
    length = struct.unpack_from("<i", content, 4)[0]
    return 8 + length + 4


def body_claim(n_bytes: int) -> bytes:
    """A stream whose first batch claims a body of that length."""
    content = WRITTEN["stream.arrow"]
    start = first_batch(content)
    length = struct.unpack_from("<i", content, start)[0]
    metadata = content[start + 4 : start + 4 + length]
    _, body, _ = arrow._header(metadata)
    return claim_of_a_batch(content, start + 4 + metadata.index(struct.pack("<q", body)), "<q", n_bytes)


def nulls(count: int) -> bytes:
    return stream(pa.table({"text": pa.nulls(count)}), count)


def elements(count: int) -> bytes:
    lists = pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), pa.nulls(count))
    return stream(pa.table({"text": lists}))


def equal_rows(count: int) -> bytes:
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([count], pa.int32()), pa.array(["text"]))
    return stream(pa.table({"text": runs}), count)


def zeros(n_bytes: int) -> bytes:
    table = pa.table({"text": pa.array(["\0" * n_bytes])})
    return stream(table, compression="zstd")


CLAIMS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a body of exabytes": (lambda: body_claim(1 << 60), "at most 2 GiB are read: write it with fewer rows"),
    "a body behind the end": (lambda: body_claim(1 << 30), "the file ends before the end of its stream"),
    "a negative body": (lambda: body_claim(-8), "at most 2 GiB are read"),
    "no end": (lambda: WRITTEN["stream.arrow"][:-8], "the file ends before the end of its stream"),
    "metadata of gigabytes": (lambda: b"\xff\xff\xff\xff\xff\xff\xff\x7f" + bytes(100), "metadata of 2,147,483,647"),
    "rows of no bytes": (lambda: nulls(1 << 24), "claims 16,777,216 rows"),
    "elements of no bytes": (lambda: elements(1 << 24), "claims 16,777,216 rows or elements"),
    "one row millions of times": (lambda: equal_rows(1 << 24), "claims 16,777,216 rows"),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_without_bytes_ends_in_one_line(tmp_path, name):
    content, words = CLAIMS[name]
    (tmp_path / "a.arrow").write_bytes(content())
    with pytest.raises(UserError, match=rf"a.arrow: cannot be read after row or line \d+: .*{words}") as refused:
        candidates_of(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_compressed_column_that_claims_more_than_the_limit_is_not_decompressed(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow, "LONGEST_BATCH", 1 << 20)
    (tmp_path / "a.arrow").write_bytes(zeros(16 << 20))
    with pytest.raises(UserError, match=r"a batch claims 16,7\d\d,\d\d\d bytes"):
        candidates_of(tmp_path)


@pytest.mark.parametrize("name", ["stream.arrow", "file.arrow", "lz4.feather", "dictionary.arrow", "view.arrow"])
def test_damaged_files_end_in_rows_or_one_line(tmp_path, name):
    """Cut anywhere and with any byte changed: no traceback, no crash and no gigabytes of memory."""
    draw = random.Random(name)
    path = tmp_path / "a.arrow"
    for number in range(40):
        content = bytearray(WRITTEN[name])
        if number % 4 == 0:
            content = content[: draw.randrange(len(content))]
        else:
            for _ in range(draw.randrange(1, 4)):
                content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content)
        with suppress(UserError):
            assert len(candidates_of(path)) <= 10_000


def saved(folder: Path, rows: list[dict], split: str | None = None, **state: object) -> None:
    """A folder as `save_to_disk` leaves it, with the cache of a later `map`."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-00002.arrow" for number in range(2)]
    for name, part in zip(names, (rows[: len(rows) // 2], rows[len(rows) // 2 :]), strict=True):
        (folder / name).write_bytes(stream(pa.Table.from_pylist(part)))
    (folder / "cache-e906cfbeb0c96ee4.arrow").write_bytes(stream(pa.Table.from_pylist(rows)))
    files = [{"filename": name} for name in names]
    (folder / "state.json").write_text(
        json.dumps({"_data_files": files, "_split": split, "_fingerprint": "1", **state})
    )
    (folder / "dataset_info.json").write_text("{}")


def test_of_a_saved_data_set_only_its_files_are_read(tmp_path):
    saved(tmp_path / "set", ROWS)
    assert texts_of(tmp_path / "set") == TEXTS
    left_out = {
        Path(file.name).name: file.left_out
        for file in inputs_of(SourceConfig("arrow", "english", path=str(tmp_path))).left_out
    }
    assert left_out["cache-e906cfbeb0c96ee4.arrow"] == "not of the saved data set"


def test_of_saved_splits_train_is_read_unless_another_is_named(tmp_path):
    saved(tmp_path / "set" / "train", ROWS[:200])
    saved(tmp_path / "set" / "test", ROWS[200:])
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert texts_of(tmp_path / "set") == TEXTS[:200]
    assert texts_of(tmp_path / "set", split="test") == TEXTS[200:]
    assert texts_of(tmp_path / "set", held_out=True) == [*TEXTS[200:], *TEXTS[:200]]


def test_a_saved_test_split_does_not_train_because_its_folder_has_another_name(tmp_path):
    saved(tmp_path / "mine", ROWS, "test")
    with pytest.raises(UserError, match="files of test are read if the source names the split: split: test"):
        texts_of(tmp_path / "mine")
    assert texts_of(tmp_path / "mine", split="test") == TEXTS
    saved(tmp_path / "part", ROWS, "train[:10%]")
    assert texts_of(tmp_path / "part") == TEXTS


def test_a_saved_selection_or_a_missing_file_is_refused(tmp_path):
    saved(tmp_path / "selection", ROWS, _indices_data_files=[{"filename": "indices.arrow"}])
    with pytest.raises(UserError, match=r"is a selection of the rows .*flatten_indices"):
        texts_of(tmp_path / "selection")
    saved(tmp_path / "part", ROWS)
    (tmp_path / "part" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"names the file data-00001-of-00002.arrow, which is missing"):
        texts_of(tmp_path / "part")


def test_a_state_of_another_program_is_no_data_set(tmp_path):
    (tmp_path / "a.arrow").write_bytes(stream(TABLE))
    for content in ("{}", "[", '{"_data_files": 3}', "[" * 100_000):
        (tmp_path / "state.json").write_text(content)
        assert texts_of(tmp_path) == TEXTS
