"""Rows of JSON lines, parquet and CSV: columns, compressions, places, and what damaged files say."""

import csv
import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.inputs import changes, inputs_of
from dist_lm.data.sources import rows
from dist_lm.data.sources.reader import Candidate, Rejected, reader_of
from dist_lm.data.sources.rows import read_parquet
from dist_lm.document import Document
from dist_lm.errors import ArtefactError, ConfigError

ROWS = [
    {
        "id": f"row-{i}",
        "code": f'text {i}\nof two lines, with "quotes"\n',
        "lang": "Python" if i % 3 else "C++",
        "terms": "MIT",
    }
    for i in range(30)
]


def write_rows(path: Path, table: list[dict] = ROWS) -> Path:
    """By the first suffix; compressed by the last."""
    kind = path.name.split(".")[1]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(table), path)
        return path
    if kind in ("csv", "tsv"):
        plain = path.with_name("plain")
        with plain.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]), delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(table)
        content = plain.read_bytes()
        plain.unlink()
    else:
        content = "".join(json.dumps(row) + "\n" for row in table).encode()
    half = len(content) // 2
    pack: Callable[[bytes], bytes] = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}.get(
        path.name.split(".")[-1], bytes
    )
    path.write_bytes(pack(content[:half]) + pack(content[half:]))  # several frames, as compressors of many cores write
    return path


def source_of(reader: str, path: Path | str | list[str], **keys) -> SourceConfig:
    return SourceConfig(reader, path=path if isinstance(path, list) else str(path), **keys)


def candidates(source: SourceConfig) -> list[Candidate]:
    return list(reader_of(source)(source, 0))


def outcomes(source: SourceConfig) -> list[str]:
    """Each text, or why there is none."""
    return [one.text if isinstance(one, Document) else one.error or one.reason for one in candidates(source)]


@pytest.mark.parametrize(
    ("reader", "name"),
    [
        *[("jsonl", f"a.{kind}") for kind in ("jsonl", "jsonl.gz", "jsonl.zst", "ndjson")],
        ("parquet", "a.parquet"),
        *[("csv", f"a.{kind}") for kind in ("csv", "csv.gz", "tsv.zst")],
    ],
)
def test_every_kind_of_file_gives_the_same_documents_by_its_columns(tmp_path, reader, name):
    write_rows(tmp_path / name)
    keys = {"column": "code", "language_column": "lang", "licence_column": "terms", "id_column": "id"}
    found = candidates(source_of(reader, tmp_path, **keys))
    assert all(isinstance(one, Document) for one in found)
    assert [(one.text, one.language, one.source, one.licence) for one in found if isinstance(one, Document)] == [
        (row["code"], row["lang"].lower(), row["id"], "MIT") for row in ROWS
    ]
    python = candidates(source_of(reader, tmp_path, **keys, only=["python"]))
    assert sum(isinstance(one, Document) for one in python) == 20
    assert {one.reason for one in python if isinstance(one, Rejected)} == {"other_language"}


@pytest.mark.parametrize(
    ("key", "value"),
    [("column", "content"), ("licence_column", "licence"), ("language_column", "language"), ("id_column", "name")],
)
@pytest.mark.parametrize("reader", ["jsonl", "parquet", "csv"])
def test_a_column_that_no_row_has_is_refused_with_those_that_are_there(tmp_path, reader, key, value):
    write_rows(tmp_path / f"a.{reader}")
    keys = {"column": "code", "language": "x", key: value}
    with pytest.raises(
        ConfigError, match=rf"{key}={value}: none of .* has it; the columns there are id, code, lang, t"
    ):
        candidates(source_of(reader, tmp_path, **keys))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("a.jsonl.gz", lambda content: content[:-20]),
        ("a.jsonl.zst", lambda content: content[:-20]),
        ("a.csv.gz", lambda content: content[:-20]),
        ("a.jsonl.gz", lambda content: b"not gzip at all"),
        ("a.parquet", lambda content: content[:-20]),
        ("a.parquet", lambda content: b"not parquet"),
    ],
)
def test_a_truncated_or_foreign_file_is_named_with_the_place(tmp_path, name, damage):
    path = write_rows(tmp_path / name)
    path.write_bytes(damage(path.read_bytes()))
    source = source_of(name.split(".")[1], tmp_path, language="x", column="code")
    with pytest.raises(
        ArtefactError, match=rf"{name}: cannot be read after row or line \d+: .*truncated, dam"
    ) as error:
        candidates(source)
    assert "\n" not in str(error.value)
    assert "network" not in str(error.value)


def test_a_zstd_window_that_is_too_long_is_not_called_damaged(tmp_path):
    options = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)  # as zstd --long=28
    pack = zstandard.ZstdCompressor(compression_params=options).compressobj()  # without the size, which lowers it
    (tmp_path / "a.jsonl.zst").write_bytes(pack.compress(b'{"text": "a"}\n') + pack.flush())
    with pytest.raises(
        ArtefactError, match=r"a.jsonl.zst: cannot be read .*: its zstd window is over .* without --long"
    ):
        candidates(source_of("jsonl", tmp_path, language="x"))


def test_a_broken_row_of_csv_is_named_by_its_line(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'text,n\n"two\nlines",1\nshort\n"b"x,2\ncaf\xe9,3\nlast,4\n')
    found = candidates(source_of("csv", tmp_path, language="x"))
    assert [one.text for one in found if isinstance(one, Document)] == ["two\nlines", "last"]
    assert [(one.source.rpartition(":")[2], one.reason, one.error) for one in found if isinstance(one, Rejected)] == [
        ("4", "broken_row", "1 fields, the header has 2"),
        ("5", "broken_row", "no CSV (',' expected after '\"')"),
        ("6", "invalid_utf8", "text, character 3: byte 0xe9 is not UTF-8"),
    ]


def test_a_column_without_a_name_is_no_licence(tmp_path):
    (tmp_path / "a.csv").write_text(",text\n7,first\n")  # as pandas writes an index
    (found,) = candidates(source_of("csv", tmp_path, language="x", licence="MIT"))
    assert isinstance(found, Document)
    assert found.licence == "MIT"


@pytest.mark.parametrize("header", ['"a"b,text', '"open,text'])
def test_a_broken_header_of_csv_is_one_line(tmp_path, header):
    (tmp_path / "a.csv").write_text(f"{header}\n1,x\n")
    with pytest.raises(ArtefactError, match=r"a.csv: the header is no CSV \(") as error:
        candidates(source_of("csv", tmp_path, language="x"))
    assert "\n" not in str(error.value)


def test_a_quote_that_nothing_closes_ends_the_file_and_one_that_closes_late_counts_its_lines(tmp_path):
    (tmp_path / "a.csv").write_text('text\nfirst\n"open\nlost\nlost\n')
    with pytest.raises(ArtefactError, match=r"a.csv: a quote that opens in the row of line 3 never closes"):
        candidates(source_of("csv", tmp_path, language="x"))
    (tmp_path / "a.csv").write_text('text\nfirst\n"open\nlost\n"quoted"\nlast\n')
    found = candidates(source_of("csv", tmp_path, language="x"))
    assert [one.text for one in found if isinstance(one, Document)] == ["first", "last"]
    assert [one.source.rpartition(":")[2] for one in found if isinstance(one, Rejected)] == ["3", "4", "5"]


def test_bytes_and_dictionaries_of_parquet_are_texts(tmp_path):
    texts = [b"caf\xc3\xa9", b"caf\xe9", None]
    table = pa.table({"text": pa.array(texts, pa.binary()), "lang": pa.array(["c", "c", "c"]).dictionary_encode()})
    pq.write_table(table, tmp_path / "a.parquet")
    found = outcomes(source_of("parquet", tmp_path, language_column="lang"))
    assert found == ["café", "text: byte 3 is not UTF-8", "empty"]


def test_licences_languages_and_names_may_be_bytes(tmp_path):
    terms = pa.array([[b"MIT", b"Zlib"], [b"MIT"], []], pa.list_(pa.binary()))
    columns = {"lang": [b"Python", b"c", b"caf\xe9"], "id": [b"one", b"two", b"three"]}
    binary = {name: pa.array(values, pa.binary()) for name, values in columns.items()}
    pq.write_table(pa.table({"text": ["a", "b", "c"], "terms": terms, **binary}), tmp_path / "a.parquet")
    keys = {"language_column": "lang", "licence_column": "terms", "id_column": "id"}
    *found, last = candidates(source_of("parquet", tmp_path, **keys))
    assert [(one.language, one.licence, one.source) for one in found if isinstance(one, Document)] == [
        *[("python", "MIT, Zlib", "one"), ("c", "MIT", "two")]
    ]
    assert isinstance(last, Rejected)
    assert last.error == "language, character 3: byte 0xe9 is not UTF-8"


def test_invalid_utf8_in_a_text_of_parquet_is_one_broken_row(tmp_path):
    bad = pa.array([b"good", b"caf\xe9", b"fine"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    found = outcomes(source_of("parquet", tmp_path, language="x"))
    assert found == ["good", "byte 3 of a text is not UTF-8", "fine"]


def test_a_file_that_lacks_the_column_is_rejected_row_by_row(tmp_path):
    write_rows(tmp_path / "a.parquet")
    write_rows(tmp_path / "b.parquet", [{"other": 1}] * 3)
    found = outcomes(source_of("parquet", tmp_path, language="x", column="code"))
    assert found[30:] == ["no column code; the columns there are other"] * 3


@pytest.mark.parametrize("kind", ["parquet", "csv"])
@pytest.mark.parametrize("key", ["licence_column", "language_column", "id_column"])
@pytest.mark.parametrize("first", ["a", "b"])
def test_a_table_without_a_column_of_the_others_takes_no_default(tmp_path, kind, key, first):
    other = "b" if first == "a" else "a"
    write_rows(tmp_path / f"{first}.{kind}")
    write_rows(tmp_path / f"{other}.{kind}", [{"code": "x"}])
    source = source_of(kind, tmp_path, column="code", language="x", **{key: "terms"})
    with pytest.raises(
        ConfigError, match=rf"{other}.{kind}: {key}=terms: none of its rows has it; the columns .* code"
    ):
        candidates(source)


@pytest.mark.heavy
def test_memory_is_bounded_by_parts_of_a_row_group(tmp_path):
    """Buffers of pyarrow and bytes of Python; the reader holds a few MiB of each, whatever the row group has."""
    noise = np.random.default_rng(0).integers(0, 256, (8000, 8192), np.uint8)
    table = pa.table({"text": [row.tobytes().hex() for row in noise]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=8000, compression="none")
    n_bytes = table.nbytes
    del table
    before, peak = pa.total_allocated_bytes(), 0
    tracemalloc.start()
    for _ in read_parquet(source_of("parquet", tmp_path, language="x"), 0):
        peak = max(peak, pa.total_allocated_bytes() - before)
    peak += tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_bytes > 120 << 20
    assert peak < n_bytes * 0.6


def test_too_many_languages_are_refused_by_the_key(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"text": "a", "lang": f"l{i}"} for i in range(rows.MAX_LANGUAGES + 1)])
    with pytest.raises(ConfigError, match=r"language_column=lang: more than 200 languages, the last at .*a.jsonl:201"):
        candidates(source_of("jsonl", tmp_path, language_column="lang"))


@pytest.mark.parametrize("column", ["lang", "terms", "id"])
def test_a_lone_surrogate_in_any_column_is_a_broken_row(tmp_path, column):
    write_rows(tmp_path / "a.jsonl", [ROWS[0], ROWS[1] | {column: "\ud800"}])
    keys = {"column": "code", "language_column": "lang", "licence_column": "terms", "id_column": "id"}
    assert isinstance(candidates(source_of("jsonl", tmp_path, **keys))[1], Rejected)


def test_a_line_past_the_longest_is_skipped_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr("dist_lm.data.sources.formats.LONGEST", 1 << 20)
    write_rows(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b" * (3 << 20)}, {"text": "c"}])
    assert outcomes(source_of("jsonl", tmp_path, language="x")) == ["a", "a line of more than 1 MiB", "c"]


def test_input_that_grew_is_noticed(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", ROWS[:10])
    source = source_of("jsonl", tmp_path, language="x", column="code")
    before = inputs_of(source, hashes=True)
    assert changes(before, inputs_of(source)) == []
    write_rows(path, ROWS)
    assert "bytes, was" in changes(before, inputs_of(source))[0]
    write_rows(tmp_path / "b.jsonl", ROWS)
    assert changes(before, inputs_of(source))[0] == f"1 file new: {tmp_path}/b.jsonl"
