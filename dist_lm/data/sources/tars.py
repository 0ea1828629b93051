"""Reads webdataset tars of any origin: consecutive members with the same key are a sample, one of them is the text.

A sample is a row. Its columns are the extensions of its members (`txt`) and the keys of its `.json` member; `column`
names the one that holds the text. Members of other kinds are never decoded.
"""

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.inputs import Inputs
from dist_lm.data.sources.formats import LONGEST, BadRow, NumberedRow, Row, columns_in_row
from dist_lm.data.sources.listing import by_suffix, list_files
from dist_lm.data.sources.reader import Candidate, reader
from dist_lm.data.sources.rows import NEEDS, TEXT_KEYS, named_columns, row_documents, rows_of_files
from dist_lm.data.sources.snapshot import FileReading, Snapshot
from dist_lm.errors import ArtefactError

TEXT_MEMBER = "txt"  # extension
KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # as webdataset splits names


def list_tars(source: SourceConfig) -> Inputs:
    """Lists webdataset tars.

    Raises:
        ConfigError, ArtefactError: as `list_files`.
    """
    return list_files(source, by_suffix(".tar", ".tgz"))


@reader(
    keys=TEXT_KEYS,
    needs=NEEDS,
    inputs=list_tars,
    takes_files=True,
    advice="check path and column; no sample has text in that member",
)
def read_tars(source: SourceConfig, seed: int, files: Snapshot | None = None) -> Iterator[Candidate]:
    """Yields every sample of webdataset tars as a text or `Rejected`. `seed` is not used.

    Raises:
        ConfigError, ArtefactError: as `list_files`, `rows_of_files` and `row_documents`.
    """
    rows = rows_of_files(files or Snapshot.of(source), named_columns(source, TEXT_MEMBER), samples)
    yield from row_documents(source, rows, TEXT_MEMBER)


def samples(reading: FileReading, wanted_columns: Sequence[str] | None) -> Iterator[NumberedRow]:
    """Yields (key, row, columns) of the samples of a tar: their wanted members as bytes, and keys of the .json member.

    Raises:
        ArtefactError: the tar is truncated, or continues after its end mark.
        ChangedInputError: as `FileReading.open_content`.
        OSError, ValueError, tarfile.TarError: the file cannot be read or is no tar.
    """
    # As a stream: a tar may be behind http or compressed, where seeking is slow.
    with reading.open_content() as file, tarfile.open(fileobj=file, mode="r|") as tar:
        for key, members in groupby(_members(tar), key=lambda member: member[0]):
            row = _row(members, tar, {*(wanted_columns or ())})
            printable_key = key.encode(errors="backslashreplace").decode()  # names in tars may have any encoding
            yield printable_key, row, columns_in_row(row)
        _check_end(reading.name, tar)


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yields `(key, extension, member)` of every file with an extension."""
    for member in tar:
        tar.members.clear()  # type: ignore[attr-defined]  the list would grow with the file
        if member.isreg() and (match := KEY.fullmatch(member.name)):
            yield match[1], match[2].lower(), member


def _row(
    members: Iterator[tuple[str, str, tarfile.TarInfo]], tar: tarfile.TarFile, wanted_columns: set[str]
) -> Row | BadRow:
    """Returns a sample as a row, extension -> bytes, or its problem: broken_sample, too_long or broken_json.

    A member that is not wanted has the value None, and .json is parsed only if a wanted column is no member; then its
    keys are columns too. Reads the tar forward through the sample.

    Args:
        members: (key, extension, member) of the sample; read to the end.
        wanted_columns: extensions, or keys of the .json member.
    """
    row: Row = {}
    problem: BadRow | None = None
    for _, extension, member in members:
        # Either of the two might be the text.
        if row.get(extension) is not None:
            problem = BadRow("broken_sample", f"the member .{extension} is there twice")
        row[extension] = None
        if extension not in {"json", *wanted_columns}:
            continue

        if member.size > LONGEST:
            problem = BadRow("too_long", f".{extension} has {member.size:,} bytes, at most {LONGEST:,} are read")
            continue
        content = tar.extractfile(member)
        assert content is not None, "a regular file"
        row[extension] = content.read()

    # Parsing the .json member is worth its time only for a column that is no member.
    if problem or wanted_columns <= row.keys() or "json" not in row:
        return problem or row
    try:
        parsed = json.loads(row["json"].decode())
    except (ValueError, RecursionError) as error:
        return BadRow("broken_json", f"the member .json: broken JSON ({error})")
    if not isinstance(parsed, dict):
        return row
    return parsed | row  # a member wins over a key of the same name


def _check_end(name: str, tar: tarfile.TarFile) -> None:
    """Refuses a tar that tarfile did not read to its end; returns nothing. Reads the rest of the file.

    tarfile takes a truncated header for the end, and stops at the first end mark.

    Raises:
        ArtefactError: the tar is truncated, or continues after its end mark.
    """
    stream = tar.fileobj
    assert stream is not None
    if stream.tell() - tar.offset != tarfile.BLOCKSIZE:
        raise ArtefactError(f"{name}: the tar has no end mark: it is truncated")
    while block := stream.read(tarfile.RECORDSIZE):
        if block.strip(b"\0"):
            raise ArtefactError(f"{name}: the tar goes on after its end mark: name tars that were joined one by one")
