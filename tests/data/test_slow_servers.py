"""Servers that are slow, stand still or send only whole files: time limits count silence, and a line says so."""

import gzip
import json
import logging
import random
import re

import aiohttp
import fsspec
import pytest

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.sources import http_file
from dist_lm.data.sources.http_file import HttpFile
from dist_lm.data.sources.reader import reader_of
from dist_lm.data.sources.snapshot import Snapshot
from dist_lm.document import Document
from dist_lm.errors import ArtefactError, ChangedInputError
from tests.data.file_server import Served
from tests.data.test_remote_sources import texts
from tests.patience import patient

CONTENT = "".join(json.dumps({"text": f"row {i} {random.Random(i).random()}"}) + "\n" for i in range(3000)).encode()
ROWS = [json.loads(line)["text"] for line in CONTENT.splitlines()]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_file, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(http_file, "QUIET_S", 0.2)
    monkeypatch.setattr(http_file, "SILENCE_S", patient(0.5))


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_may_take_longer_than_any_limit_while_bytes_come(
    served: Served,
    monkeypatch: pytest.MonkeyPatch,
    ranges: bool,
) -> None:
    """Finds a limit for a whole request: a large file from a slow server never came through."""
    monkeypatch.setattr(http_file, "SILENCE_S", patient(10))
    monkeypatch.setattr("aiohttp.client.DEFAULT_TIMEOUT", aiohttp.ClientTimeout(total=0.5))
    fsspec.filesystem("http").clear_instance_cache()
    served.ranges, served.pause_s = ranges, 0.15
    (served.folder / "a.jsonl").write_bytes(CONTENT)
    assert texts("jsonl", f"{served.url}/a.jsonl") == ROWS
    assert served.sent == [len(CONTENT)]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_an_answer_that_stands_still_is_said_and_asked_for_again(
    served: Served,
    caplog: pytest.LogCaptureFixture,
    name: str,
    ranges: bool,
) -> None:
    served.ranges, served.stall_after, served.stalls = ranges, 5_000, 2
    content = gzip.compress(CONTENT) if name.endswith(".gz") else CONTENT
    (served.folder / name).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert texts("jsonl", f"{served.url}/{name}") == ROWS
    # With parts, the second request goes on where the first one stopped.
    assert served.sent == [len(content) - (10_000 if ranges else 0)]
    said = [record.getMessage() for record in caplog.records]
    begin = f"{served.url}/{name}: byte 5,000: nothing came for 0.2 s; the request is given up after "
    assert any(line.startswith(begin) for line in said)
    again = r"byte 5,000: TimeoutError: nothing came for [\d.]+ s; it is asked again \(2 of 5\)"
    assert any(re.search(again, line) for line in said)


@pytest.mark.parametrize("after", [0, 5_000])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_stands_still_ends_in_one_line_with_the_cure(
    served: Served, monkeypatch: pytest.MonkeyPatch, after: int, ranges: bool
) -> None:
    """Finds a build that is held for minutes by a server that sends nothing."""
    monkeypatch.setattr(http_file, "ATTEMPTS", 2)
    served.ranges, served.stall_after, served.stalls = ranges, 0, 100
    if after:
        served.stall_after, served.stalls = after, 1
    (served.folder / "a.jsonl").write_bytes(CONTENT)
    with HttpFile(f"{served.url}/a.jsonl") as file:
        assert len(file.read(after)) == after
        served.stall_after, served.stalls = 0, 100
        with pytest.raises(
            OSError, match=rf"a.jsonl: byte {after:,}: .*run the command again later, or download"
        ) as end:
            file.read(10)
    assert "\n" not in str(end.value)


def test_a_server_of_whole_files_must_send_the_same_bytes_again(served: Served) -> None:
    """Finds a resumed download that joins the halves of two files."""
    served.ranges, served.stall_after, served.stalls = False, 5_000, 1
    path = served.folder / "a.jsonl"
    path.write_bytes(CONTENT)
    with HttpFile(f"{served.url}/a.jsonl") as file:
        begin = file.read(5_000)
        path.write_bytes(CONTENT[::-1])
        with pytest.raises(ChangedInputError, match=r"a.jsonl: changed while it was read \(ETag"):
            file.read(5_000)
    assert begin == CONTENT[:5_000]


def test_a_file_that_grows_between_two_parts_is_read_up_to_its_old_end(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_file, "BLOCK", 20_000)
    path = served.folder / "a.jsonl"
    path.write_bytes(CONTENT)
    source = SourceConfig("jsonl", "english", path=f"{served.url}/a.jsonl")
    files = Snapshot.of(source)
    assert files.listing.taken

    def grow(size: int) -> None:
        with path.open("ab") as file:
            file.write(CONTENT)

    served.before_body = grow
    for _ in range(2):
        assert [one.text for one in reader_of(source)(source, 0, files) if isinstance(one, Document)] == ROWS
    assert path.stat().st_size > 4 * len(CONTENT)


def test_a_server_whose_parts_are_empty_is_given_up(served: Served) -> None:
    """Finds requests without an end: an empty part was taken for the end of a block, and the next one requested."""
    served.empty_parts = 100
    (served.folder / "a.jsonl").write_bytes(CONTENT)
    with (
        HttpFile(f"{served.url}/a.jsonl") as file,
        pytest.raises(OSError, match="byte 0: OSError: the server sent a part without a byte: run the command again"),
    ):
        file.read(10)
    assert served.empty_parts == 100 - http_file.ATTEMPTS


def test_a_format_that_needs_parts_says_that_the_server_sends_whole_files(served: Served) -> None:
    served.ranges = False
    (served.folder / "a.parquet").write_bytes(CONTENT)
    with pytest.raises(ArtefactError, match=r"a.parquet: .*sends no parts of files.*download the file") as refused:
        texts("parquet", f"{served.url}/a.parquet")
    assert str(refused.value).count("download the file") == 1
