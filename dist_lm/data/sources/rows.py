"""Reads rows of jsonl, parquet, csv and arrow. Columns of a row give the text, language, licence and name of a
document. Folders named `COLUMN=VALUE`, as of Hive, are columns of the rows in them.

A row that gives no document is rejected with its place, FILE:LINE or FILE:row NUMBER; one that is broken counts for
`corpus.max_bad_fraction`. A column that no row has is an error before the first document.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from tarfile import TarError
from typing import Any
from urllib.parse import unquote

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.inputs import Inputs
from dist_lm.data.sources.arrow import arrow_rows
from dist_lm.data.sources.failures import unreadable
from dist_lm.data.sources.formats import BadRow, Format, Row, csv_rows, jsonl_rows, parquet_rows
from dist_lm.data.sources.listing import bare_name, by_suffix, list_files
from dist_lm.data.sources.reader import Candidate, Rejected, reader
from dist_lm.data.sources.snapshot import Snapshot
from dist_lm.data.sources.stars_and_time import CellError, stars_of, time_of
from dist_lm.document import NO_STARS, NO_TIME, Document, Form
from dist_lm.errors import ArtefactError, ConfigError, UserError

MISSING_COLUMN = "missing_column"  # reason of a row without the column of the document
TEXT = "text"  # column of the text where the source names none
LOOK_ROWS, LOOK_BYTES = 1000, 64 << 20  # read ahead until every named column was seen
MAX_LANGUAGES = 200  # in a source; fewer than `screening.LANGUAGES`, the limit of a whole corpus
WITH_DEFAULT = ("licence_column", "language_column", "id_column", "stars_column", "time_column")
FORMATS: dict[str, Format] = {
    ".jsonl": jsonl_rows,
    ".ndjson": jsonl_rows,
    ".json": jsonl_rows,
    ".parquet": parquet_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".arrow": arrow_rows,
    ".feather": arrow_rows,
}
TABLES = (parquet_rows, csv_rows, arrow_rows)  # all rows of a file have its columns
FOLDER_COLUMN = re.compile(r"([^=]+)=(.*)", re.DOTALL)
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
KEYS = ("language", "licence", "path", "exclude", "split", "column", "licence_column", "language_column", "id_column")
KEYS += ("only",)
TEXT_KEYS = (*KEYS, "stars_column", "time_column")
NEEDS = ("language|language_column", "path")
ADVICE = "check path and column; every row is empty, repeated, too long or left out"


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A row and its location: `FILE:LINE`, or the number of the row where a file has no lines."""

    location: str
    row: Row | BadRow
    columns: Sequence[str]  # columns of the file, or of this row where rows differ


Content = tuple[str, str]  # the text of a document and its group
Named = list[tuple[str, str]]  # (key of the source, column)
ContentOf = Callable[
    [Row, str, Sequence[str]], Content | BadRow | None
]  # called with a row, its column, and all columns


def list_json_lines(source: SourceConfig) -> Inputs:
    """Lists files of JSON lines.

    Raises:
        ConfigError, ArtefactError: as `list_files`.
    """
    return list_files(source, by_suffix(".jsonl", ".ndjson"))


def list_parquet(source: SourceConfig) -> Inputs:
    """Lists parquet files.

    Raises:
        ConfigError, ArtefactError: as `list_files`.
    """
    return list_files(source, by_suffix(".parquet"))


def list_csv(source: SourceConfig) -> Inputs:
    """Lists .csv and .tsv files.

    Raises:
        ConfigError, ArtefactError: as `list_files`.
    """
    return list_files(source, by_suffix(".csv", ".tsv"))


def list_arrow(source: SourceConfig) -> Inputs:
    """Lists .arrow and .feather files.

    Raises:
        ConfigError, ArtefactError: as `list_files`.
    """
    return list_files(source, by_suffix(".arrow", ".feather"))


def list_rows(source: SourceConfig) -> Inputs:
    """Lists files of any format that has rows.

    Raises:
        ConfigError, ArtefactError: as `list_files`.
    """
    return list_files(source, by_suffix(*(suffix for suffix in FORMATS if suffix != ".json")))


@reader(keys=TEXT_KEYS, needs=NEEDS, inputs=list_json_lines, takes_files=True, advice=ADVICE)
def read_jsonl(source: SourceConfig, seed: int, files: Snapshot | None = None) -> Iterator[Candidate]:
    """Yields every line of files of JSON lines as a text or `Rejected`. `seed` is not used.

    Raises:
        ConfigError, ArtefactError: as `list_files`, `rows_of_files` and `row_documents`.
    """
    rows = rows_of_files(files or Snapshot.of(source), named_columns(source, TEXT), jsonl_rows)
    yield from row_documents(source, rows)


@reader(keys=TEXT_KEYS, needs=NEEDS, inputs=list_parquet, takes_files=True, advice=ADVICE)
def read_parquet(source: SourceConfig, seed: int, files: Snapshot | None = None) -> Iterator[Candidate]:
    """Yields every row of parquet files as a text or `Rejected`. Memory is bounded by one row group.

    Raises:
        ConfigError, ArtefactError: as `list_files`, `rows_of_files` and `row_documents`.
    """
    rows = rows_of_files(files or Snapshot.of(source), named_columns(source, TEXT), parquet_rows)
    yield from row_documents(source, rows)


@reader(keys=TEXT_KEYS, needs=NEEDS, inputs=list_csv, takes_files=True, advice=ADVICE)
def read_csv(source: SourceConfig, seed: int, files: Snapshot | None = None) -> Iterator[Candidate]:
    """Yields every row of CSV files with a header as a text or `Rejected`. `seed` is not used.

    Raises:
        ConfigError, ArtefactError: as `list_files`, `rows_of_files` and `row_documents`.
    """
    rows = rows_of_files(files or Snapshot.of(source), named_columns(source, TEXT), csv_rows)
    yield from row_documents(source, rows)


@reader(keys=TEXT_KEYS, needs=NEEDS, inputs=list_arrow, takes_files=True, advice=ADVICE)
def read_arrow(source: SourceConfig, seed: int, files: Snapshot | None = None) -> Iterator[Candidate]:
    """Yields every row of Arrow files, as written by `save_to_disk`, as a text or `Rejected`. `seed` is not used.

    Raises:
        ConfigError, ArtefactError: as `list_files`, `rows_of_files` and `row_documents`.
    """
    rows = rows_of_files(files or Snapshot.of(source), named_columns(source, TEXT), arrow_rows)
    yield from row_documents(source, rows)


def named_columns(source: SourceConfig, *defaults: str) -> Named:
    """Returns the columns that a source names. `defaults`: for `column`, if the source names none."""
    keys = ("column", *WITH_DEFAULT)
    named = [(key, getattr(source, key)) for key in keys if getattr(source, key)]
    if source.column:
        return named
    return [("column", default) for default in defaults] + named


def rows_of_files(
    files: Snapshot, columns: Named | None = None, format_of_all: Format | None = None, whole_rows: bool = False
) -> Iterator[SourceRow]:
    """Yields the rows of all files that are taken, one after the other; a broken row is yielded as its problem.

    Args:
        columns: those that are read of a parquet or Arrow file; None: all.
        whole_rows: read all columns of such a file.
        format_of_all: of every file, whatever its suffix; None: by suffix, JSON lines for an unknown one.

    Raises:
        ConfigError: a parquet, Arrow or CSV file lacks the column that the licence, language or name of rows is read
            from, or the scheme of a URL is not supported.
        ArtefactError: a file is missing, truncated, damaged or of another format; the message names the last good row.
        ChangedInputError: a file is not as it was listed or first read.
    """
    column_names = None if columns is None else [column for _, column in columns]

    for file in files.listing.taken:
        read_rows = format_of_all or FORMATS.get(PurePosixPath(bare_name(file.name)).suffix, jsonl_rows)
        number, is_checked = 0, False
        of_folders = folder_columns(file.name)
        try:
            with files.reading(file) as reading:
                fetched_columns = None if whole_rows and read_rows in (parquet_rows, arrow_rows) else column_names
                for number, row, row_columns in read_rows(reading, fetched_columns):
                    if of_folders and isinstance(row, dict):
                        row, row_columns = {**of_folders, **row}, (*dict.fromkeys((*row_columns, *of_folders)),)
                    # All rows of a table have its columns, so the first one tells.
                    if not is_checked and read_rows in TABLES:
                        _check_columns(file.name, columns or [], row_columns)
                    is_checked = True
                    yield SourceRow(f"{file.name}:{number}", row, row_columns)
        except UserError:
            raise
        except (OSError, ValueError, TarError) as error:  # pyarrow's own errors are among them
            raise ArtefactError(
                f"{file.name}: cannot be read after row or line {number}: {unreadable(error)}"
            ) from error


def folder_columns(name: str) -> dict[str, str | None]:
    """Returns the columns that the folders of a file give its rows: `{"lang": "java"}` for `/data/lang=java/a.parquet`.

    Names and values are decoded as in URLs. A value that Hive does not know is None.
    """
    folders = name.partition("?")[0].split("/")[:-1]
    matches = [FOLDER_COLUMN.fullmatch(folder) for folder in folders]
    columns = {unquote(match[1]): unquote(match[2]) for match in matches if match}
    return {column: None if value == NO_VALUE else value for column, value in columns.items()}


def _check_columns(name: str, columns: Named, file_columns: Sequence[str]) -> None:
    """Refuses a file without a column that has a default: all its rows would silently take the default.

    A file without the column of the text needs no check, because each of its rows is broken.

    Raises:
        ConfigError: names the key, the column and the columns of the file.
    """
    for key, column in columns:
        if key in WITH_DEFAULT and column not in file_columns:
            raise ConfigError(
                f"{name}: {key}={column}: none of its rows has it; the columns there are {', '.join(file_columns)} "
                "(files without a column belong into a source of their own)"
            )


def row_documents(
    source: SourceConfig,
    rows: Iterable[SourceRow],
    default: str = TEXT,
    content_of: ContentOf | None = None,
    form: Form = "text",
    parts_of_text: Collection[str] = (),
) -> Iterator[Candidate]:
    """Yields a candidate for each row: a document, or `Rejected`. Documents other than texts keep their row.

    The first rows are read before the first candidate is yielded (`looked_ahead`).

    Args:
        default: column of the content, if the source names none; empty: `content_of` finds it.
        content_of: makes a document's text of a row; None: the column holds it.
        form: of the documents.
        parts_of_text: columns that a document other than a text need not keep.

    Raises:
        ConfigError: none of the first rows has a column that the source names, or there are more than `MAX_LANGUAGES`
            languages. What `rows` raises passes.
    """
    languages: set[str] = set()
    columns = named_columns(source, default) if default else named_columns(source)
    for source_row in looked_ahead(source, rows, columns):
        column = source.column or default
        candidate = _candidate(source_row, source, column, content_of or text_of, form)
        if form != "text" and isinstance(candidate, Document) and isinstance(source_row.row, dict):
            candidate = replace(candidate, row=kept_columns(source_row.row, {column, *parts_of_text}))
        # Counted here too, because the row can be named; `screening` counts those of the whole corpus.
        languages.add(candidate.language)
        if len(languages) > MAX_LANGUAGES:
            raise ConfigError(
                f"corpus source reader={source.reader}: language_column={source.language_column}: more than "
                f"{MAX_LANGUAGES} languages, the last at {source_row.location}: choose some with only, or give language"
            )
        yield candidate


def kept_columns(row: Row, without: Collection[str] = ()) -> str:
    """Returns the columns of a row as the text of a JSON object, for reward functions: without those named, and without
    columns that hold bytes, NaN or text that is not UTF-8. What JSON has no form for, such as a date, becomes text.
    Nothing is raised.
    """
    columns: dict[str, Any] = {}
    for name, cell in row.items():
        if name in without:
            continue
        try:
            columns[name] = json_value(cell)
            json.dumps([name, columns[name]], ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError):
            columns.pop(name, None)
    return json.dumps(columns, ensure_ascii=False)


def json_value(cell: Any) -> Any:
    """Returns a cell with JSON values only: tuples become lists, and dates and other values texts.

    Raises:
        TypeError: it holds bytes.
    """
    if cell is None or isinstance(cell, str | bool | int | float):
        return cell
    if isinstance(cell, Mapping):
        return {str(key): json_value(value) for key, value in cell.items()}
    if isinstance(cell, list | tuple):
        return [json_value(value) for value in cell]
    if isinstance(cell, bytes | bytearray):
        raise TypeError("bytes")
    return str(cell)


def looked_ahead(source: SourceConfig, rows: Iterable[SourceRow], columns: Named) -> Iterator[SourceRow]:
    """Yields the same rows, but reads the first ones ahead until each of `columns` has occurred.

    At most `LOOK_ROWS` rows or about `LOOK_BYTES` are read ahead and held in memory.

    Raises:
        ConfigError: a column is in none of the rows that were read ahead, and one of these has columns; the message
            names them. What `rows` raises passes.
    """
    # Rows of JSON may differ in their columns, so the first row cannot tell that a column is misspelt.
    iterator = iter(rows)
    ahead: list[SourceRow] = []
    missing = columns
    row_columns: dict[str, None] = {}  # an ordered set
    size = 0  # bytes or characters of text
    for source_row in iterator:
        ahead.append(source_row)
        row_columns |= dict.fromkeys(source_row.columns)
        missing = [(key, column) for key, column in missing if column not in row_columns]
        if isinstance(source_row.row, dict):
            size += sum(len(cell) for cell in source_row.row.values() if isinstance(cell, str | bytes))
        if not missing or len(ahead) == LOOK_ROWS or size > LOOK_BYTES:
            break

    if missing and row_columns:
        key, column = missing[0]
        names = [*row_columns]
        origin = f"path={', '.join(source.path)}" if source.path else f"dataset={source.dataset}"
        raise ConfigError(
            f"corpus source reader={source.reader}: {origin}: {key}={column}: "
            f"none of the first {len(ahead):,} rows has it; the columns there are {', '.join(names[:50])}"
            f"{' ...' if len(names) > 50 else ''} (files without a column belong into a source of their own)"
        )

    yield from ahead
    ahead.clear()  # the rows may hold 64 MiB
    yield from iterator


def text_of(row: Row, column: str, columns: Sequence[str]) -> Content | BadRow | None:
    """Returns the text of a row and an empty group, the problem of a row, or None for a row without text (a null)."""
    if column not in row:
        return missing_column(column, columns)
    text = row[column]
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            return BadRow("invalid_utf8", f"{column}: byte {error.start} is not UTF-8")
    if text is None:  # no error: the document is empty
        return None
    if not isinstance(text, str):
        return BadRow("no_text", f"{column} holds a value of type {type(text).__name__}, expected text")
    return utf8_problem(column, text) or (text, "")


def missing_column(column: str, columns: Sequence[str]) -> BadRow:
    """Returns the problem of a row that lacks `column`. `columns`: those that it has."""
    return BadRow(MISSING_COLUMN, f"no column {column}; the columns there are {', '.join(columns) or 'none'}")


def utf8_problem(column: str, text: str) -> BadRow | None:
    """Returns the problem (invalid_utf8, with the place) of a text that cannot be written as UTF-8; else None.

    Args:
        column: that of the text, for the words of the problem.
    """
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        position = f"{column}, character {error.start}"
        code = ord(text[error.start])
        # `surrogateescape` maps byte 0xNN of another encoding, as in CSV, to U+DCNN.
        if 0xDC80 <= code <= 0xDCFF:
            return BadRow("invalid_utf8", f"{position}: byte 0x{code - 0xDC00:02x} is not UTF-8")
        return BadRow("invalid_utf8", f"{position}: the lone surrogate U+{code:04X}")
    return None


def licence_of(row: Row, source: SourceConfig) -> str:
    """Returns the licence in the row's column for it, else that of the source; several are separated by commas."""
    licence = own_licence(row, source) or source.licence
    # A row may list several licences; cleaning then asks that each is allowed.
    if isinstance(licence, list):
        return ", ".join(map(_text, licence))
    return _text(licence)


def own_licence(row: Row, source: SourceConfig) -> Any:
    """Returns the row's licence: whatever its column holds, or None if the source names no column."""
    if not source.licence_column:
        return None
    return row.get(source.licence_column)


def language_of(row: Row, source: SourceConfig) -> str:
    """Returns the language in the row's column for it, in lower case, else that of the source."""
    if source.language_column and (language := row.get(source.language_column)):
        return _text(language).strip().lower()
    return source.language


def _text(cell: object) -> str:
    """Converts a cell to text. Parquet files may have texts as bytes; invalid UTF-8 becomes lone surrogates."""
    if isinstance(cell, bytes):
        return cell.decode(errors="surrogateescape")
    return str(cell)


def _candidate(
    source_row: SourceRow, source: SourceConfig, column: str, content_of: ContentOf, form: Form
) -> Candidate:
    """Returns the document of a row, or `Rejected` with the reason why it gives none; raises nothing for a bad row.

    `Rejected` has an error for a broken row, a missing column, another type, no_language, invalid_utf8, bad_stars and
    bad_time. It has none for other_language (not in `source.only`, counted under the language `others`) and empty.

    Args:
        column: the column of the content.
        content_of: see `row_documents`.
    """
    row, location = source_row.row, source_row.location
    unknown = source.language or "unknown"
    if isinstance(row, BadRow):
        return Rejected(unknown, location, row.reason, row.words)

    licence, language = licence_of(row, source), language_of(row, source)
    name = location
    if source.id_column:
        name = _text(row.get(source.id_column) or location)
    content = content_of(row, column, source_row.columns)

    # All of these are written to files in UTF-8. The first problem is the one to report.
    problem = content if isinstance(content, BadRow) else None
    for key, text in (("licence", licence), ("language", language), ("id", name)):
        problem = problem or utf8_problem(key, text)
    stars, time = NO_STARS, NO_TIME
    try:
        if source.stars_column:
            stars = stars_of(row.get(source.stars_column), source.stars_column)
        if source.time_column:
            time = time_of(row.get(source.time_column), source.time_column)
    except CellError as error:
        problem = problem or BadRow(error.reason, str(error))
    if not language:
        problem = problem or BadRow(
            "no_language", f"no language in {source.language_column}, and the source has no language"
        )
    if problem:
        return Rejected(unknown, location, problem.reason, problem.words)

    if source.only and language not in map(str.lower, source.only):
        return Rejected("others", location, "other_language")
    if not isinstance(content, tuple):
        return Rejected(language, location, "empty")
    text, group = content
    has_own_licence = bool(own_licence(row, source))
    return Document(text, language, name, licence, group, form, own_licence=has_own_licence, stars=stars, time=time)
