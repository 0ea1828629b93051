"""Reads files of rows, JSON lines, parquet and CSV (`arrow.py`: Arrow), each as a stream with the number of every row.

A format is a function from the reading of a file to `(number, row, columns)`: the line or row counted from 1, or the
key of a sample; the row as a mapping, or its problem; and the columns that the file or the row has. Reading continues
behind a broken row.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dist_lm.data.sources.listing import bare_name
from dist_lm.data.sources.opening import compressed_without_suffix, compression_of
from dist_lm.data.sources.snapshot import FileReading
from dist_lm.errors import ArtefactError

LONGEST = 512 << 20  # bytes of a line, characters of a CSV field
BATCH = 128  # rows of a parquet file that are decoded together
CHUNK = 8 << 20  # bytes of a parquet column that are fetched together
UTF16 = (b"\xff\xfe", b"\xfe\xff")
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read."""

    reason: str  # one word
    words: str  # the problem, for people; empty: the row is no error


Row = dict[str, Any]  # column -> cell
NumberedRow = tuple[int | str, Row | BadRow, Sequence[str]]
Format = Callable[[FileReading, Sequence[str] | None], Iterator[NumberedRow]]


def jsonl_rows(reading: FileReading, wanted_columns: Sequence[str] | None) -> Iterator[NumberedRow]:
    """Yields (line number, object, its keys) of each line; blank lines are passed over, but count.

    A broken line, or one that is no object, is yielded as its problem, without columns. A .json file may also be one
    list of objects, which is read whole; `row 3` is its third element. Numbers are from 1. Lines that were added since
    the file was listed are not read; what was listed of a line that was being written then is no error.

    Args:
        wanted_columns: not used: a line is parsed whole.

    Raises:
        ArtefactError: the file is UTF-16 or of another compression, or a list that is broken.
        ChangedInputError, OSError: as `FileReading.open_content`.
        ConfigError: the scheme of a URL is not supported.
    """
    name = reading.name
    is_json = bare_name(name).endswith(".json")  # may be one list, which ends at its end
    with reading.open_content(may_grow=not is_json) as file:
        first_bytes = file.peek(4)
        _refuse_foreign(name, file.peek(16))
        if first_bytes.startswith(BOM):
            file.read(len(BOM))

        if is_json and file.peek(1024).lstrip()[:1] == b"[":
            yield from _listed(name, file.read())
            return

        # Blank lines count, so that the number is that of an editor.
        for number, line in enumerate(_lines(file), start=1):
            if isinstance(line, BadRow):
                yield number, line, ()
            elif line.strip():
                row = _json_row(line)
                if isinstance(row, BadRow) and not line.endswith(b"\n") and reading.has_grown():
                    row = BadRow("unfinished", "")
                yield number, row, columns_in_row(row)


def parquet_rows(reading: FileReading, wanted_columns: Sequence[str] | None) -> Iterator[NumberedRow]:
    """Yields (row number from 1, row, columns of the file), with one batch in memory.

    A row with broken text is yielded as its problem.

    Args:
        wanted_columns: only these are fetched, as far as the file has them; None: all. If it has none of them, every
            row is empty.

    Raises:
        ArtefactError: the file is compressed as a whole.
        ChangedInputError: as `FileReading.open_raw`.
        OSError, ValueError: the file cannot be read, is damaged or encrypted.
        ConfigError: the scheme of a URL is not supported.
    """
    import pyarrow.parquet

    _refuse_outer_compression(reading.name)
    # Nothing is fetched ahead: memory stays below a row group, and other columns cost no request.
    with reading.open_seekable() as raw:
        file = pyarrow.parquet.ParquetFile(
            raw, pre_buffer=False, buffer_size=CHUNK, page_checksum_verification=True, memory_map=False
        )
        columns = file.schema_arrow.names
        fetched = columns
        if wanted_columns is not None:
            fetched = [column for column in columns if column in wanted_columns]

        # Without a column, pyarrow would give no row: each of them lacks the text, and counts as broken.
        number = 0
        if not fetched:
            for number in range(1, file.metadata.num_rows + 1):
                yield number, {}, columns
            return

        for batch in file.iter_batches(batch_size=BATCH, columns=fetched, use_threads=False):
            for row in decoded_rows(batch):
                number += 1
                yield number, row, columns


def csv_rows(reading: FileReading, wanted_columns: Sequence[str] | None) -> Iterator[NumberedRow]:
    """Yields (number of the row's first line, row, columns) of a CSV file with a header; a .tsv file has tabs.

    Cells are texts; bytes that are not UTF-8 are lone surrogates in them. A row with another number of fields than the
    header is yielded as its problem. Each line of a broken row counts as broken, because a superfluous quote takes in
    good lines. Blank rows are passed over. Sets the module's limit of characters in a field for the whole process.

    Args:
        wanted_columns: may not be in the header twice; None: no column may. All columns are in a row.

    Raises:
        ArtefactError: the file is UTF-16 or of another compression, the header is broken or names a column twice, or
            a quote opens that nothing closes; the message names the line.
        ChangedInputError, OSError: as `FileReading.open_content`.
        ConfigError: the scheme of a URL is not supported.
    """
    csv.field_size_limit(LONGEST)  # the module has one limit; 131,072 characters are too few for documents
    name = reading.name
    with reading.open_content() as file:
        _refuse_foreign(name, file.peek(16))
        # Bytes of another encoding become lone surrogates, so that only their own row is broken.
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.reader(text, delimiter="\t" if bare_name(name).endswith(".tsv") else ",", strict=True)
        try:
            header = next(rows, [])
        except csv.Error as error:
            raise ArtefactError(f"{name}: the header is no CSV ({error})") from None
        # A row as a mapping would silently hold the last of two columns.
        for column in wanted_columns or header:
            if header.count(column) > 1:
                raise ArtefactError(f"{name}: the header names the column {column} more than once")

        while True:
            number = rows.line_num + 1
            try:
                fields = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                if "unexpected end of data" in str(error):
                    raise ArtefactError(
                        f"{name}: a quote that opens in the row of line {number} never closes: double it or remove it"
                    ) from None
                for line in range(number, rows.line_num + 1):
                    yield line, BadRow("broken_row", f"no CSV ({error})"), header
                continue

            if not fields:  # a blank line
                continue
            if len(fields) != len(header):
                words = f"{len(fields)} fields, the header has {len(header)}"
                yield number, BadRow("broken_row", words), header
            else:
                yield number, dict(zip(header, fields, strict=True)), header


def _lines(file: io.BufferedReader) -> Iterator[bytes | BadRow]:
    """Yields lines with their line ends, in bounded memory; the last one may have none.

    A line of `LONGEST` bytes or more, not counting its newline, is yielded as its problem (`too_long`); its bytes are
    dropped. What reading `file` raises passes.
    """
    while line := file.readline(LONGEST):
        if len(line) < LONGEST or line.endswith(b"\n"):
            yield line
            continue
        # The rest is read in parts and dropped.
        while line and not line.endswith(b"\n"):
            line = file.readline(LONGEST)
        yield BadRow("too_long", f"a line of more than {LONGEST >> 20} MiB")


def _json_row(line: bytes) -> Row | BadRow:
    """Returns the object of a line of JSON; a problem (invalid_utf8, broken_json) if it is another value or broken."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return BadRow("invalid_utf8", f"byte {error.start} of the line is not UTF-8")
    except json.JSONDecodeError as error:
        return BadRow("broken_json", f"broken JSON ({error.msg.removesuffix(' at')} at character {error.pos})")
    except (RecursionError, ValueError) as error:
        return BadRow("broken_json", f"JSON that cannot be read ({error})")
    return _object(row)


def columns_in_row(row: Row | BadRow) -> Sequence[str]:
    """Returns the columns of a row; none of a broken one."""
    if isinstance(row, BadRow):
        return ()
    return tuple(row)


def _object(row: Any) -> Row | BadRow:
    if type(row) is dict:
        return row
    kinds = {list: "a list", str: "a text", type(None): "null"}
    kind = kinds.get(type(row), f"a value of type {type(row).__name__}")
    return BadRow("broken_json", f"{kind}, expected an object")


def _listed(name: str, content: bytes) -> Iterator[NumberedRow]:
    """Yields the objects of a file that is one JSON list, as `row 1` and so on; another element is yielded as its
    problem.

    Raises:
        ArtefactError: the list is broken, or the file is not UTF-8.
    """
    try:
        rows = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{name}: broken JSON ({error})") from None
    for number, element in enumerate(rows, start=1):
        row = _object(element)
        # An editor would take a bare number for a line.
        yield f"row {number}", row, columns_in_row(row)


def decoded_rows(batch: Any) -> Iterator[Row | BadRow]:
    """Yields the rows of a pyarrow batch; of a batch with a broken text row by row, and the problem of each broken
    row.
    """
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # before the first row is yielded
        # pyarrow converts a batch as a whole, so one broken text fails the rows around it too.
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield BadRow("invalid_utf8", f"byte {error.start} of a text is not UTF-8")


def _refuse_outer_compression(name: str) -> None:
    """Raises ArtefactError for .parquet.gz and .parquet.zst: the footer of a parquet file is read before its rows."""
    if compression_of(name):
        raise ArtefactError(
            f"{name}: a parquet file cannot be read through another compression (its columns are compressed "
            "already): unpack it, as with gunzip or zstd -d"
        )


def _refuse_foreign(name: str, first_bytes: bytes) -> None:
    """Raises ArtefactError if content begins with the byte order mark of UTF-16, or is compressed and its suffix does
    not tell.
    """
    if words := compressed_without_suffix(first_bytes):
        raise ArtefactError(f"{name}: {words}")
    if first_bytes.startswith(UTF16):
        raise ArtefactError(f"{name}: the text is UTF-16: convert it to UTF-8, as with iconv -f UTF-16 -t UTF-8")
