"""Sources that change while a build reads them: no text of val in train, or an error that names the file."""

import gzip
import io
import json
import os
import random
import re
import tarfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_lm.config.corpus import CorpusConfig, SourceConfig
from dist_lm.data.ingest import TextSplits, split_documents
from dist_lm.data.inputs import Input, Inputs
from dist_lm.data.screening import IngestReport, SourceReader
from dist_lm.data.sources import http_file
from dist_lm.data.sources.reader import Candidate, reader, text_hash
from dist_lm.document import Document
from dist_lm.errors import ArtefactError, ChangedInputError
from tests.data.file_server import Served
from tests.data.reading import seen_texts

N = 150  # documents of a source
PASSES = 3  # over each file: val, comparison, tokenizing


@lru_cache
def texts_of(seed: int, count: int = N) -> list[str]:
    draw = random.Random(seed)
    return [
        f"text {seed} {number} " + " ".join(f"w{draw.randrange(10**6)}" for _ in range(30)) for number in range(count)
    ]


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def tar(texts: list[str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for number, text in enumerate(texts):
            member = tarfile.TarInfo(f"{number:06d}.txt")
            member.size = len(text.encode())
            file.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


def parquet(texts: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts}), sink, row_group_size=40)
    return sink.getvalue().to_pybytes()


CONTENT: dict[str, tuple[str, Callable[[list[str]], bytes]]] = {  # suffix -> reader, content of a file
    ".jsonl": ("jsonl", lines),
    ".jsonl.gz": ("jsonl", lambda texts: gzip.compress(lines(texts), mtime=0)),
    ".csv": ("csv", lambda texts: "\n".join(["text", *texts, ""]).encode()),
    ".parquet": ("parquet", parquet),
    ".tar": ("tars", tar),
    ".txt": ("files", lambda texts: "\n".join(texts).encode()),
}


class Edited(SourceReader):
    """A reader that calls `edit` before candidate number `place` of reading number `reading`, and keeps nothing."""

    def __init__(self, edit: Callable[[], object], reading: int, place: int) -> None:
        super().__init__(0)
        self.room = -1
        self._edit, self._left, self._place = edit, reading, place

    def read(self, source: SourceConfig) -> Iterator[Candidate]:
        self._left -= 1
        is_edited = self._left == 0
        if is_edited and self._place == 0:
            self._edit()
        for number, candidate in enumerate(super().read(source), start=1):
            yield candidate
            if is_edited and number == self._place:
                self._edit()


def divided(source: SourceConfig, edit: Callable[[], object], reading: int, place: int) -> dict[str, list[str]]:
    """Split -> texts of a corpus of one source that is edited while it is read."""
    config = CorpusConfig("test", {"c": [source]}, 0.2)
    texts = TextSplits(config, 0)
    texts.reader = Edited(edit, reading, place)
    # A build lists its files first. This corpus is read for the comparison alone too, as if it came after another one.
    texts.reader.files(source)
    texts.compare(["c"])
    found: dict[str, list[str]] = {"train": [], "val": []}
    for split, document, _ in split_documents(config, "c", 0, IngestReport(), texts):
        found[split].append(document.text)
    return found


def write(folder: Path, suffix: str, texts: list[str]) -> None:
    """Two files with these texts; each text is a file of reader=files."""
    _, content = CONTENT[suffix]
    if suffix == ".txt":
        for number, text in enumerate(texts):
            (folder / f"{number:04d}.txt").write_bytes(content([text]))
        return
    half = len(texts) // 2
    (folder / f"a{suffix}").write_bytes(content(texts[:half]))
    (folder / f"b{suffix}").write_bytes(content(texts[half:]))


def leaking(texts: list[str]) -> list[str]:
    """Other documents that contain the same texts: each would be in the split of its own hash."""
    return [f"again: {text}" for text in texts]


def grow(folder: Path, suffix: str, texts: list[str], path: Path) -> None:
    _, content = CONTENT[suffix]
    with path.open("ab") as file:
        file.write(content(leaking(texts)))


def shrink(folder: Path, suffix: str, texts: list[str], path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace(folder: Path, suffix: str, texts: list[str], path: Path) -> None:
    _, content = CONTENT[suffix]
    other = folder.parent / "other"
    other.write_bytes(content(leaking(texts)))
    other.rename(path)


def overwrite(folder: Path, suffix: str, texts: list[str], path: Path) -> None:
    """Another byte, in a file of the same size and time."""
    status = path.stat()
    with path.open("r+b") as file:
        content = flipped(file.read())
        file.seek(0)
        file.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def flipped(content: bytes) -> bytes:
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


def delete(folder: Path, suffix: str, texts: list[str], path: Path) -> None:
    path.unlink()


def rename(folder: Path, suffix: str, texts: list[str], path: Path) -> None:
    path.rename(path.with_name(f"renamed{suffix}"))


def add(folder: Path, suffix: str, texts: list[str], path: Path) -> None:
    """A file that was not there."""
    _, content = CONTENT[suffix]
    path.with_name(f"new{suffix}").write_bytes(content(leaking(texts)))


EDITS = (grow, shrink, replace, overwrite, delete, rename, add)


def edited_build(
    folder: Path,
    suffix: str,
    edit: Callable,
    reading: int,
    place: int,
    draw: random.Random,
    url: str = "",
    count: int = N,
) -> str:
    """Builds a corpus whose files are edited; returns the stop, or nothing. Fails if val stands in train.

    Args:
        url: of the folder behind a server; empty: it is read as a folder.
        count: texts of the corpus.
    """
    texts = texts_of(1, count)
    write(folder, suffix, texts)
    files = sorted(folder.iterdir())
    path = [f"{url}/{file.name}" for file in files] if url else str(folder)
    source = SourceConfig(CONTENT[suffix][0], "english", path=path)
    try:
        found = divided(source, lambda: edit(folder, suffix, texts, draw.choice(files)), reading, place)
    except ArtefactError as error:
        return str(error)
    assert found["train"]
    assert found["val"]
    for text in found["val"]:
        assert not [other for other in found["train"] if text in other]
    # Before the first reading, a larger plain text cannot be told from one with lines behind it.
    if edit is not replace or reading > 1:
        assert not {*found["train"], *found["val"]} & {*leaking(texts)}, "what was added meanwhile is not read"
    return ""


@pytest.mark.parametrize("reading", range(1, PASSES + 1))
@pytest.mark.parametrize("suffix", CONTENT)
def test_an_edit_while_sources_are_read_is_harmless_or_a_named_stop(tmp_path: Path, suffix: str, reading: int) -> None:
    """Finds passes that list or read files anew: text that was held out would be train."""
    draw = random.Random(f"{suffix} {reading}")
    for edit in EDITS:
        folder = tmp_path / edit.__name__ / "data"
        folder.mkdir(parents=True)
        place = draw.choice((0, draw.randrange(N)))
        stop = edited_build(folder, suffix, edit, reading, place, draw)
        assert_named(stop, folder)
        # Before a later reading, each file is still to be compared with what the first one read.
        if edit is add or (edit is grow and suffix in (".jsonl", ".txt")):
            assert not stop
        elif reading > 1 and place == 0:
            assert stop


def assert_named(stop: str, folder: Path | str) -> None:
    """A stop names the file in one line."""
    assert not stop or f"{folder}/" in stop
    assert "\n" not in stop


@pytest.mark.bars
@pytest.mark.parametrize("seed", range(40))
def test_random_edits_while_sources_are_read_are_harmless_or_a_named_stop(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    for suffix in CONTENT:
        for reading in range(1, PASSES + 1):
            for number in range(10):
                folder = tmp_path / f"{suffix}{reading}{number}" / "data"
                folder.mkdir(parents=True)
                assert_named(
                    edited_build(folder, suffix, draw.choice(EDITS), reading, draw.randrange(N + 2), draw), folder
                )


@pytest.mark.bars
@pytest.mark.parametrize("seed", range(20))
def test_random_edits_behind_a_server_are_harmless_or_a_named_stop(
    served: Served, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """The server sends parts of files or whole ones, with ETags or without; a file takes several requests."""
    monkeypatch.setattr(http_file, "BLOCK", 8000)
    monkeypatch.setattr(http_file, "FIRST_WAIT_S", 0.001)
    draw = random.Random(seed)
    for suffix in CONTENT:
        count = N // 5 if suffix == ".txt" else N  # each of these is a file
        for reading in range(1, PASSES + 1):
            for number in range(10):
                served.ranges = suffix == ".parquet" or draw.random() < 0.5
                served.etags = draw.random() < 0.5
                # On a busy machine a build costs what its waits cost: each part of an answer is one.
                served.parts = 1 + number % 3
                folder = served.folder / f"{suffix[1:]}{reading}{number}"
                folder.mkdir()
                url = f"{served.url}/{folder.name}"
                place = draw.randrange(count + 2)
                assert_named(edited_build(folder, suffix, draw.choice(EDITS), reading, place, draw, url, count), url)


@pytest.mark.parametrize(("reading", "cut"), [(1, 0), (2, 0), (3, 0), (1, 20)])
def test_lines_that_are_added_meanwhile_are_not_read_and_stop_nothing(tmp_path: Path, reading: int, cut: int) -> None:
    """Finds a stop for every log that is being written, and a line that is broken because it was half written."""
    texts = texts_of(1)
    path = tmp_path / "a.jsonl"
    whole = lines([*texts, "the last line, " * 3])
    path.write_bytes(whole[: len(whole) - cut])
    written = [False]

    def append() -> None:
        if not written[0]:
            written[0] = True
            with path.open("ab") as file:
                file.write(whole[len(whole) - cut :] + lines(leaking(texts)))

    found = divided(SourceConfig("jsonl", "english", path=str(path)), append, reading, 0)
    read = found["train"] + found["val"]
    assert set(texts) <= set(read)
    assert len(read) == N + (not cut)
    assert seen_texts(found["val"], found["train"]) == set()


def test_a_line_that_nobody_completes_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(texts_of(1))[:-20])
    with pytest.raises(ArtefactError, match=rf"1 of {N} rows are broken.*a.jsonl:{N}: broken JSON"):
        divided(SourceConfig("jsonl", "english", path=str(path)), lambda: None, 0, 0)


@reader(keys=("language", "dataset"))
def read_moving(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """A user's reader that tells nobody what it opens."""
    for text in Path(source.dataset).read_text().splitlines():
        yield Document(text, source.language, "moving", "", text_hash(text))


def list_moving(source: SourceConfig) -> Inputs:
    status = Path(source.dataset).stat()
    return Inputs((Input(source.dataset, status.st_size, status.st_mtime_ns),))


@reader(keys=("language", "dataset"), inputs=list_moving)
def read_listed(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """A user's reader that lists its file and opens it by itself."""
    yield from read_moving(source, seed)


@pytest.mark.parametrize(("function", "words"), [("read_moving", "it gave other documents"), ("read_listed", "bytes")])
@pytest.mark.parametrize("reading", [2, 3])
def test_documents_of_a_users_reader_are_compared(tmp_path: Path, function: str, words: str, reading: int) -> None:
    path = tmp_path / "texts"
    path.write_text("\n".join(texts_of(1)))
    source = SourceConfig(f"tests.data.test_input_snapshot:{function}", "english", dataset=str(path))
    with pytest.raises(ChangedInputError, match=rf"{re.escape(str(path))}|{function}") as refused:
        divided(source, lambda: path.write_text("\n".join(leaking(texts_of(1)))), reading, 0)
    assert words in str(refused.value)


def test_a_small_source_is_read_once(tmp_path: Path) -> None:
    """What stays in memory cannot change: no stop."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(texts_of(1)))
    config = CorpusConfig("test", {"c": [SourceConfig("jsonl", "english", path=str(path))]}, 0.2)
    texts = TextSplits(config, 0)
    texts.compare(["c"])
    path.unlink()
    assert len(list(split_documents(config, "c", 0, IngestReport(), texts))) == N


def serve(served: Served, name: str, content: bytes) -> str:
    (served.folder / name).write_bytes(content)
    return f"{served.url}/{name}"


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("reading", range(1, PASSES + 1))
def test_a_file_behind_http_that_changes_is_a_named_stop(served: Served, reading: int, ranges: bool) -> None:
    served.ranges = ranges
    texts, stops = texts_of(1), []
    for edit in ("grow", "replace", "delete", "overwrite"):
        for suffix in (".jsonl", ".jsonl.gz", *((".parquet",) if ranges and reading == 2 else ())):
            kind, content = CONTENT[suffix]
            path = served.folder / f"a{suffix}"
            url = serve(served, path.name, content(texts))
            changed = {
                "grow": path.read_bytes() + content(leaking(texts)),
                "replace": content(leaking(texts)),
                "overwrite": flipped(path.read_bytes()),
            }
            source = SourceConfig(kind, "english", path=url)

            def change() -> None:
                path.unlink() if edit == "delete" else path.write_bytes(changed[edit])  # noqa: B023

            try:
                found = divided(source, change, reading, 0)
            except ArtefactError as error:
                stops.append(str(error))
                assert_named(stops[-1], served.url)
                continue
            assert (edit, suffix) == ("grow", ".jsonl") or reading == 1, "only lines that were added stop nothing"
            assert seen_texts(found["val"], found["train"]) == set()
    assert len(stops) > 3
