"""Sources behind URLs: http and s3 on loopback. What is fetched is counted; no test reaches a network."""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pyarrow import fs

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.inputs import changes, inputs_of
from dist_lm.data.sources import http_file
from dist_lm.data.sources import listing as file_listing
from dist_lm.data.sources.reader import Candidate, reader_of
from dist_lm.data.sources.snapshot import Snapshot
from dist_lm.document import Document
from dist_lm.errors import ArtefactError, ChangedInputError, ConfigError
from tests.data.s3_server import serving_bucket, upload
from tests.data.test_files import write


def candidates(reader: str, path: str | list[str], **keys) -> list[Candidate]:
    source = SourceConfig(reader, "english", path=path, **keys)
    return list(reader_of(source)(source, 0))


def texts(reader: str, path: str | list[str], **keys) -> list[str]:
    return [one.text for one in candidates(reader, path, **keys) if isinstance(one, Document)]


ROWS = [{"text": f"row {i} of the file"} for i in range(50)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def test_rows_behind_urls_and_their_etags(served):
    (served.folder / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(LINES))
    (served.folder / "b.csv").write_text("text\nof csv\n")
    url = f"{served.url}/a.jsonl.zst?download=true"
    assert texts("jsonl", url) == [row["text"] for row in ROWS]
    assert texts("csv", [f"{served.url}/b.csv"]) == ["of csv"]
    source = SourceConfig("jsonl", "english", path=url)
    before = inputs_of(source)
    assert changes(before, inputs_of(source)) == []
    assert before.files[0].size == (served.folder / "a.jsonl.zst").stat().st_size
    (served.folder / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(LINES[::-1]))
    assert changes(before, inputs_of(source))


@pytest.mark.heavy
def test_a_remote_parquet_costs_its_named_columns(served):
    rng = np.random.default_rng(0)
    letters = rng.integers(97, 123, (4000, 600), np.uint8)
    table = pa.table(
        {
            "before": [row.tobytes().decode() for row in letters[::-1]],
            "text": [row.tobytes().decode() for row in letters],
            "after": rng.random((4000, 100)).tolist(),
        }
    )
    path = served.folder / "a.parquet"
    pq.write_table(table, path, row_group_size=1000, compression="snappy")
    metadata = pq.ParquetFile(path).metadata
    named = sum(
        metadata.row_group(group).column(column).total_compressed_size
        for group in range(metadata.num_row_groups)
        for column in range(metadata.num_columns)
        if metadata.row_group(group).column(column).path_in_schema == "text"
    )
    assert texts("parquet", f"{served.url}/a.parquet") == table["text"].to_pylist()
    assert named <= sum(served.sent) <= 1.1 * named


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_request_that_breaks_is_sent_again(served, monkeypatch, name):
    monkeypatch.setattr(http_file, "FIRST_WAIT_S", 0.001)
    content = {".parquet": parquet_bytes(ROWS), ".gz": gzip.compress(LINES), ".jsonl": LINES}
    (served.folder / name).write_bytes(content[Path(name).suffix])
    source = SourceConfig(Path(name.removesuffix(".gz")).suffix[1:], "english", path=f"{served.url}/{name}")
    rows = reader_of(source)(source, 0)
    served.break_after = 100
    assert [one.text for one in rows if isinstance(one, Document)] == [row["text"] for row in ROWS]
    assert served.break_after == -1, "a connection broke"
    served.always_break = True
    with pytest.raises(
        ArtefactError, match=rf"{name}: cannot be read after row or line 0: OSError: .*byte [\d,]+:"
    ) as refused:
        list(reader_of(source)(source, 0))
    assert "damaged" not in str(refused.value)


def test_a_server_without_ranges_is_read_from_begin_to_end(served, monkeypatch):
    monkeypatch.setattr(http_file, "FIRST_WAIT_S", 0.001)
    served.ranges = False
    (served.folder / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    assert texts("jsonl", f"{served.url}/a.jsonl.gz") == [row["text"] for row in ROWS]
    served.always_break = True
    with pytest.raises(ArtefactError, match=r"a.jsonl.gz: cannot be read after row or line 0: OSError"):
        texts("jsonl", f"{served.url}/a.jsonl.gz")


def test_what_is_not_there_is_one_line(served):
    with pytest.raises(ConfigError, match=r"path=http://127.0.0.1:\d+/no.jsonl: no such file, folder or URL \(.*404"):
        texts("jsonl", f"{served.url}/no.jsonl")
    with pytest.raises(ConfigError, match=r"no such file, folder or URL \(ClientConnectorError"):
        texts("jsonl", "http://127.0.0.1:9/no.jsonl")
    served.fails = 403
    with pytest.raises(ArtefactError, match=r"no.jsonl: the server answers 403 \(ClientResponseError.*try again"):
        texts("jsonl", f"{served.url}/no.jsonl")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with serving_bucket("mine") as name:
        yield name


def parquet_bytes(rows: list[dict]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def test_files_of_s3_with_the_endpoint_of_the_environment(bucket):
    files = {
        "d/a.parquet": parquet_bytes(ROWS[:20]),
        "d/sub/B.PARQUET": parquet_bytes(ROWS[20:]),
        "d/_tmp/c.parquet": b"",
        "d/.x/c.parquet": b"",
        "d/stats.json": b"{}",
        "lines/a.jsonl.zst": zstandard.ZstdCompressor().compress(LINES),
    }
    upload(bucket, files)
    whole = [row["text"] for row in ROWS]
    assert texts("parquet", "s3://mine/d") == whole
    assert texts("parquet", "s3://mine/d/", exclude=["sub/"]) == whole[:20]
    assert texts("parquet", "s3://mine/d/*.parquet") == whole[:20]
    assert texts("parquet", ["s3://mine/d/sub/B.PARQUET", "s3://mine/d"]) == whole[20:] + whole[:20]
    assert texts("jsonl", "s3://mine/lines/a.jsonl.zst") == whole
    source = SourceConfig("parquet", "english", path="s3://mine/d")
    listing = inputs_of(source, hashes=True)
    assert listing.summary().endswith("3 left out (hidden: 2, suffix .json: 1)")
    assert all(one.mtime_ns and one.sha256 for one in listing.taken)
    for place in ("s3://mine/none", "s3://other/x", "s3://mine/d/*.none"):
        with pytest.raises(ConfigError, match=re.escape(place)):
            texts("parquet", place)


@pytest.mark.parametrize("place", ["s3://mine/moving", "s3://mine/moving/a.jsonl"])
def test_a_file_of_s3_that_changes_between_readings_is_named(bucket, place):
    """Finds a pass that reads another object than the pass before."""
    upload(bucket, {"moving/a.jsonl": LINES, "moving/b.parquet": b""})
    source = SourceConfig("jsonl", "english", path=place)
    files = Snapshot.of(source)
    first = list(reader_of(source)(source, 0, files))
    assert list(reader_of(source)(source, 0, files)) == first
    upload(bucket, {"moving/a.jsonl": LINES + LINES})  # lines were added
    assert list(reader_of(source)(source, 0, files)) == first
    for content in (LINES.replace(b"row", b"wor"), LINES[:500]):
        upload(bucket, {"moving/a.jsonl": content})
        with pytest.raises(ChangedInputError, match=r"s3://mine/moving/a.jsonl: changed while it was read"):
            list(reader_of(source)(source, 0, files))


def test_files_of_gs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder stands for the store: no emulator of it comes as a Python package."""
    store = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(fs, "GcsFileSystem", lambda retry_time_limit: store)
    content = {
        "d/a.parquet": parquet_bytes(ROWS[:20]),
        "d/sub/b.parquet": parquet_bytes(ROWS[20:]),
        "d/_tmp/c.parquet": b"",
        "lines/a.jsonl.gz": gzip.compress(LINES),
    }
    write(tmp_path / "mine", content)
    whole = [row["text"] for row in ROWS]
    assert texts("parquet", "gs://mine/d") == whole
    assert texts("parquet", "gs://mine/d/*.parquet") == whole[:20]
    assert texts("jsonl", "gs://mine/lines/a.jsonl.gz") == whole
    write(tmp_path / "mine/code", {"a.py": "a", "LICENSE": "no suffix: the language is not looked up in the store"})
    assert texts("files", "gs://mine/code") == ["a"]
    source = SourceConfig("parquet", "english", path="gs://mine/d")
    before = inputs_of(source)
    assert [one.name for one in before.taken] == ["gs://mine/d/a.parquet", "gs://mine/d/sub/b.parquet"]
    assert before.summary().endswith("1 left out (hidden: 1)")
    (tmp_path / "mine/d/a.parquet").write_bytes(parquet_bytes(ROWS[:10]))
    assert changes(before, inputs_of(source))
    with pytest.raises(ConfigError, match="path=gs://mine/none: no such file, folder or URL"):
        texts("parquet", "gs://mine/none")


@pytest.mark.parametrize("place", ["s3://mine/d", "s3://mine/d/*.parquet"])
def test_what_cannot_be_listed_is_an_error_not_an_empty_source(monkeypatch, place):
    class Broken:
        """A store that knows the folder and breaks when asked for its files, as `fsspec` alone would pass over."""

        fs = property(lambda self: self)

        def info(self, _: str) -> dict:
            return {"type": "directory"}

        def get_file_info(self, _: object) -> list:
            raise OSError("AWS Error SLOW_DOWN")

    monkeypatch.setattr(file_listing, "filesystem", lambda _: Broken())
    with pytest.raises(ArtefactError, match=r"cannot be listed: OSError: AWS Error SLOW_DOWN"):
        texts("parquet", place)
