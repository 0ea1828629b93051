"""Readers of rows: jsonl, parquet and csv. A row gives a text, and by column its language, its licence and its name.

A row that gives no document is rejected with its place, FILE:LINE; one that is broken counts for
`corpus.max_bad_fraction`. A column that no row has is an error before the first document.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from tarfile import TarError
from typing import Any

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.inputs import Inputs
from dist_lm.data.sources.formats import FORMATS, BadRow, Format, Row, csv_rows, jsonl_rows, parquet_rows
from dist_lm.data.sources.opening import unreadable
from dist_lm.data.sources.places import bare_name, by_suffix, list_files
from dist_lm.data.sources.reader import Candidate, Rejected, reader
from dist_lm.document import Document, Form
from dist_lm.errors import ArtefactError, ConfigError, UserError

TEXT = "text"  # column of the text where the source names none
LOOK_ROWS, LOOK_BYTES = 1000, 64 << 20  # read ahead until every named column was seen
MOST_LANGUAGES = 200  # a tar holds a byte of language for each document
WITH_DEFAULT = ("licence_column", "language_column", "id_column")
TABLES = (parquet_rows, csv_rows)  # all rows of a file have its columns
KEYS = ("language", "licence", "path", "exclude", "column", "licence_column", "language_column", "id_column", "only")
NEEDS = ("language|language_column", "path")
ADVICE = "check path and column; every row is empty, repeated, too long or left out"
JSON_LINES = by_suffix(".jsonl", ".ndjson")
PARQUET = by_suffix(".parquet")
CSV = by_suffix(".csv", ".tsv")
ANY_ROWS = by_suffix(".jsonl", ".ndjson", ".parquet", ".csv", ".tsv")


@dataclass(frozen=True, slots=True)
class PlacedRow:
    """A row and its place, `FILE:LINE`."""

    place: str
    row: Row | BadRow
    columns: Sequence[str]  # of the file, or of the row where rows differ


Content = tuple[str, str]  # the text of a document and its group
Named = list[tuple[str, str]]  # (key of the source, column)
ContentOf = Callable[[Row, str, Sequence[str]], Content | BadRow | None]  # of a row, its column, and all columns


def list_json_lines(source: SourceConfig) -> Inputs:
    return list_files(source, JSON_LINES)


def list_parquet(source: SourceConfig) -> Inputs:
    return list_files(source, PARQUET)


def list_csv(source: SourceConfig) -> Inputs:
    return list_files(source, CSV)


def list_rows(source: SourceConfig) -> Inputs:
    """Files of any format that has rows."""
    return list_files(source, ANY_ROWS)


@reader(keys=KEYS, needs=NEEDS, inputs=list_json_lines, advice=ADVICE)
def read_jsonl(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """Every line of files of JSON lines as a text."""
    yield from row_documents(source, placed_rows(list_json_lines(source), named_columns(source, TEXT), jsonl_rows))


@reader(keys=KEYS, needs=NEEDS, inputs=list_parquet, advice=ADVICE)
def read_parquet(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """Every row of parquet files as a text. Memory is bounded by one row group."""
    yield from row_documents(source, placed_rows(list_parquet(source), named_columns(source, TEXT), parquet_rows))


@reader(keys=KEYS, needs=NEEDS, inputs=list_csv, advice=ADVICE)
def read_csv(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """Every row of CSV files with a header as a text."""
    yield from row_documents(source, placed_rows(list_csv(source), named_columns(source, TEXT), csv_rows))


def named_columns(source: SourceConfig, *defaults: str) -> Named:
    """The columns that a source names. `defaults`: for `column`, where the source has none."""
    keys = ("column", "licence_column", "language_column", "id_column")
    named = [(key, getattr(source, key)) for key in keys if getattr(source, key)]
    return named if source.column else [("column", default) for default in defaults] + named


def placed_rows(
    inputs: Inputs, columns: Named | None = None, format_of_all: Format | None = None
) -> Iterator[PlacedRow]:
    """The rows of all files, one after the other.

    Args:
        columns: what is read of a parquet file; None: all.
        format_of_all: of every file, whatever its suffix; none: by suffix.

    Raises:
        ConfigError: a parquet or CSV file lacks the column that the licence, language or name of rows is read from.
        ArtefactError: a file is truncated, damaged or of another format; the message names the last good row.
    """
    wanted = None if columns is None else [column for _, column in columns]
    for one in inputs.taken:
        rows = format_of_all or FORMATS.get(PurePosixPath(bare_name(one.name)).suffix, jsonl_rows)
        number, is_checked = 0, False
        try:
            for number, row, there in rows(one.name, wanted):
                if not is_checked and rows in TABLES:
                    _check_columns(one.name, columns or [], there)
                is_checked = True
                yield PlacedRow(f"{one.name}:{number}", row, there)
        except UserError:
            raise
        except (OSError, ValueError, TarError) as error:  # pyarrow's own errors are among them
            raise ArtefactError(
                f"{one.name}: cannot be read after row or line {number}: {unreadable(error)}"
            ) from error


def _check_columns(name: str, columns: Named, there: Sequence[str]) -> None:
    """All rows of a file would take the default. Without the column of the text, each row is broken."""
    for key, column in columns:
        if key in WITH_DEFAULT and column not in there:
            raise ConfigError(
                f"{name}: {key}={column}: none of its rows has it; the columns there are {', '.join(there)} (files "
                "without a column belong into a source of their own)"
            )


def row_documents(
    source: SourceConfig,
    rows: Iterable[PlacedRow],
    default: str = TEXT,
    content_of: ContentOf | None = None,
    form: Form = "text",
) -> Iterator[Candidate]:
    """A candidate for each row.

    Args:
        default: column of the content, where the source names none.
        content_of: makes a document's text of a row; none: the column holds it.

    Raises:
        ConfigError: no row has a column that the source names, or there are too many languages.
    """
    languages: set[str] = set()
    for one in looked_ahead(source, rows, named_columns(source, default)):
        candidate = _candidate(one, source, source.column or default, content_of or text_of, form)
        languages.add(candidate.language)
        if len(languages) > MOST_LANGUAGES:
            raise ConfigError(
                f"corpus source reader={source.reader}: language_column={source.language_column}: more than "
                f"{MOST_LANGUAGES} languages, the last at {one.place}: choose some with only, or give language"
            )
        yield candidate


def looked_ahead(source: SourceConfig, rows: Iterable[PlacedRow], columns: Named) -> Iterator[PlacedRow]:
    """The same rows. The first ones are read ahead until each of `columns` was there.

    Raises:
        ConfigError: one is in none of the rows that were read ahead; the message names the columns that are there.
    """
    iterator = iter(rows)
    ahead: list[PlacedRow] = []
    missing = columns
    seen: dict[str, None] = {}
    size = 0
    for one in iterator:
        ahead.append(one)
        seen |= dict.fromkeys(one.columns)
        missing = [(key, column) for key, column in missing if column not in seen]
        if isinstance(one.row, dict):
            size += sum(len(value) for value in one.row.values() if isinstance(value, str | bytes))
        if not missing or len(ahead) == LOOK_ROWS or size > LOOK_BYTES:
            break
    if missing and seen:
        key, column = missing[0]
        there = [*seen]
        place = f"path={', '.join(source.path)}" if source.path else f"dataset={source.dataset}"
        raise ConfigError(
            f"corpus source reader={source.reader}: {place}: {key}={column}: "
            f"none of the first {len(ahead):,} rows has it; the columns there are {', '.join(there[:50])}"
            f"{' ...' if len(there) > 50 else ''} (files without a column belong into a source of their own)"
        )
    yield from ahead
    ahead.clear()
    yield from iterator


def text_of(row: Row, column: str, columns: Sequence[str]) -> Content | BadRow | None:
    """The text of a row and its group; None where it has none."""
    if column not in row:
        return missing_column(column, columns)
    value = row[column]
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            return BadRow("invalid_utf8", f"{column}: byte {error.start} is not UTF-8")
    if value is None:
        return None
    if not isinstance(value, str):
        return BadRow("no_text", f"{column} holds a value of type {type(value).__name__}, expected text")
    return utf8_problem(column, value) or (value, "")


def missing_column(column: str, columns: Sequence[str]) -> BadRow:
    return BadRow("missing_column", f"no column {column}; the columns there are {', '.join(columns) or 'none'}")


def utf8_problem(column: str, value: str) -> BadRow | None:
    """What keeps a text from being written as UTF-8: bytes of another encoding in CSV, or half of a character."""
    if value.isascii():
        return None
    try:
        value.encode()
    except UnicodeEncodeError as error:
        place = f"{column}, character {error.start}"
        code = ord(value[error.start])
        if 0xDC80 <= code <= 0xDCFF:
            return BadRow("invalid_utf8", f"{place}: byte 0x{code - 0xDC00:02x} is not UTF-8")
        return BadRow("invalid_utf8", f"{place}: the lone surrogate U+{code:04X}")
    return None


def licence_of(row: Row, source: SourceConfig) -> str:
    """The licence of a row where there is a column for it, else that of the source."""
    licence = own_licence(row, source) or source.licence
    return ", ".join(map(_text, licence)) if isinstance(licence, list) else _text(licence)


def own_licence(row: Row, source: SourceConfig) -> Any:
    """What the row says of its licence; nothing where no column is named."""
    return row.get(source.licence_column) if source.licence_column else None


def language_of(row: Row, source: SourceConfig) -> str:
    """The language of a row in lower case where there is a column for it, else that of the source."""
    value: Any = row.get(source.language_column) if source.language_column else None
    return _text(value).strip().lower() if value else source.language


def _text(value: object) -> str:
    """A value of a row; parquet files may have texts as bytes. Those that are not UTF-8 become lone surrogates."""
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else str(value)


def _candidate(one: PlacedRow, source: SourceConfig, column: str, content_of: ContentOf, form: Form) -> Candidate:
    unknown = source.language or "unknown"
    if isinstance(one.row, BadRow):
        return Rejected(unknown, one.place, one.row.reason, one.row.words)
    licence, language = licence_of(one.row, source), language_of(one.row, source)
    name = _text(one.row.get(source.id_column) or one.place) if source.id_column else one.place
    content = content_of(one.row, column, one.columns)
    problem = content if isinstance(content, BadRow) else None
    for key, value in (("licence", licence), ("language", language), ("id", name)):
        problem = problem or utf8_problem(key, value)
    if not language:
        problem = problem or BadRow(
            "no_language", f"no language in {source.language_column}, and the source has no language"
        )
    if problem:
        return Rejected(unknown, one.place, problem.reason, problem.words)
    if source.only and language not in map(str.lower, source.only):
        return Rejected("others", one.place, "other_language")
    if not isinstance(content, tuple):
        return Rejected(language, one.place, "empty")
    own = bool(own_licence(one.row, source))
    return Document(content[0], language, name, licence, content[1], form, own_licence=own)
