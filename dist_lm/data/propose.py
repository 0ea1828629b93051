"""Sources for data that nobody has described yet: readers by the suffixes of its files, columns by their first rows."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.inputs import Input, Inputs
from dist_lm.data.sources.files import SUFFIXES, TEXT, list_source_files
from dist_lm.data.sources.formats import Row
from dist_lm.data.sources.messages import MESSAGES, TOOLS
from dist_lm.data.sources.places import bare_name, list_files
from dist_lm.data.sources.reader import reader_of
from dist_lm.data.sources.rows import TEXT as TEXT_COLUMN
from dist_lm.data.sources.rows import PlacedRow, placed_rows
from dist_lm.data.sources.tars import TEXT_MEMBER, samples
from dist_lm.errors import ConfigError

ROWS = 200  # looked at to name columns
LEAST = 0.01  # of the bytes of a place: files of a kind below this share are left out
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
KINDS |= {".tar": "tars", ".tgz": "tars"}
# usual names of columns, the likeliest first
TEXTS = ("text", "content", "code", "txt", "body", "document", "article", "sql")
LANGUAGES = ("language", "lang", "programming_language")
LICENCES = ("license", "licence", "licenses", "licences", "license_type", "max_stars_repo_licenses")
PATHS = ("path", "file_path", "filename", "file_name", "max_stars_repo_path", "repo_path")  # of source files
NAMES = ("id", *PATHS, "url", "title", "_id")
# columns that are a document only together: the question, and the answer
QUESTIONS = ("prompt", "instruction", "question", "query", "input", "problem")
ANSWERS = ("completion", "response", "output", "answer", "solution")
# columns that are rankings together
RANKED = (("chosen", "rejected"), ("completions", "ranks"), ("completions", "judgements"))
PROSE = ("english", "text", "markdown", "restructuredtext", "latex", "html")
CODE = "code"  # language of code whose language is not known
NATURAL = re.compile(r"[a-z]{2}([-_].+)?")  # ISO 639-1, where it is no suffix of source files
MOSTLY = 0.9  # of the paths of rows
CODE_LINES = 0.4  # of the lines of a text, from which on it is code
CODE_LINE = re.compile(
    r"^(?: {2,}|\t+)\S|[;{}()\[\]]\s*$|^[\w.\[\]]+ *[-+*/|&:]?= *\S|^(?:#!|#include|//|/\*|@\w)"
    r"|^(?:import|from|def|class|return|func|fn|let|const|var|public|private|package|using|if|for|while)\b.*[\w:]$"
)
LOOKED = 5_000  # lines
LISTED = 20  # columns that a note names


@dataclass(frozen=True)
class Proposal:
    """A source, and what a person should know of it."""

    source: Mapping[str, Any]  # keys of `SourceConfig`
    conversations: bool
    inputs: Inputs
    notes: tuple[str, ...]  # lines for the corpus file; may hold any character
    is_code: bool = False  # whether texts in no known language look like code

    def typed(self) -> SourceConfig:
        return SourceConfig(**self.source)


def propose(place: str) -> list[Proposal]:
    """A source for each kind of data at `place`: a file, a folder, a glob or a URL.

    A kind that cannot be described is left out with a note, unless it is most of the data.

    Raises:
        ConfigError: there is nothing that a reader takes; the message says what there is.
    """
    everything = list_files(SourceConfig(reader="files", path=[place]), _all_files)
    kinds: dict[str, list[Input]] = {}
    for one in everything.taken:
        kinds.setdefault(_kind(one.name, len(everything.taken) == 1), []).append(one)
    unknown = kinds.pop("", [])
    sizes = {kind: sum(max(1, one.size) for one in files) for kind, files in kinds.items()}
    if not kinds:
        raise ConfigError(f"{place}: nothing that a reader takes: {everything.summary()}, {_suffixes(unknown)}")
    taken = [kind for kind, size in sizes.items() if size >= LEAST * sum(sizes.values())]
    left = unknown + [one for kind in kinds if kind not in taken for one in kinds[kind]]
    notes = (f"not read: {_suffixes(left)}",) if left and "files" not in taken else ()  # those list what they leave out
    proposals, refusals = [], []
    for kind in sorted(taken):
        try:
            proposals.append(_proposal(kind, place, kinds[kind], notes))
        except ConfigError as error:
            if sizes[kind] == max(sizes.values()):
                raise
            refusals.append(f"not read: {error}")
    return [replace(one, notes=(*one.notes, *refusals)) for one in proposals]


def is_prose(languages: Mapping[str, int], looks_like_code: bool = False) -> bool:
    """Whether most bytes are prose: of corpus `language`, not `code`.

    Args:
        languages: bytes by language.
        looks_like_code: decides about languages that are no known ones, such as `c++`; `en` or `pt-br` are prose.
    """
    code = {*SUFFIXES.values(), CODE} - {*PROSE}
    natural = {name for name in languages if NATURAL.fullmatch(name) and name[:2] not in SUFFIXES}
    others = {*languages} - natural - code - {*PROSE}
    prose = ({*languages} & {*PROSE}) | natural | (set() if looks_like_code else others)
    return 2 * sum(languages[name] for name in prose) >= sum(languages.values())


def is_code(texts: Iterable[str]) -> bool:
    """Whether texts look like code: by indentation, and by how lines begin and end."""
    lines = list(islice((line for text in texts for line in text.splitlines() if line.strip()), LOOKED))
    return sum(1 for line in lines if CODE_LINE.search(line)) > CODE_LINES * len(lines)


def language_of_paths(rows: Sequence[Row]) -> str:
    """The language of most rows, by the suffixes in a column of paths; empty if there is none."""
    for name in PATHS:
        paths = [str(row[name]).lower() for row in rows if row.get(name)]
        suffixes = [PurePosixPath(path).suffix.removeprefix(".") for path in paths if "://" not in path]
        found = Counter(SUFFIXES.get(suffix, "") for suffix in suffixes).most_common(1)
        if found and found[0][0] and found[0][1] >= MOSTLY * len(rows):
            return found[0][0]
    return ""


def check_text(key: str, value: str) -> None:
    """Refuse an empty text, and one that the configuration would replace by something else."""
    if not value.strip() or "${" in value:
        wrong = "it is empty" if not value.strip() else "the configuration replaces ${...} by another value: rename it"
        raise ConfigError(f"{key} {value!r}: {wrong}; expected a file, folder, glob, URL or column")


def columns_of(rows: Iterable[Row]) -> tuple[dict[str, str], bool]:
    """`(keys of a source that name columns, whether the rows are conversations)`, guessed from rows.

    `column` is that of messages (a list of mappings with `role`), else one that is usual for text, else the one with
    the longest texts. No keys if no column holds text.
    """
    lengths: Counter[str] = Counter()
    messages: Counter[str] = Counter()
    texts: Counter[str] = Counter()
    lists: Counter[str] = Counter()  # of texts, such as licences
    for row in rows:
        for name, value in row.items():
            if isinstance(value, str | bytes):
                texts[name] += 1
                lengths[name] += len(value)
            elif isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]:
                messages[name] += 1
            elif isinstance(value, list) and value and isinstance(value[0], str):
                lists[name] += 1
    if messages:
        return {"column": messages.most_common(1)[0][0]}, True
    usual = [name for name in TEXTS if texts[name]]
    content = usual[0] if usual else next((name for name, _ in lengths.most_common(1)), "")
    if not content:
        return {}, False
    found = {"column": content}
    for key, names in (("language_column", LANGUAGES), ("licence_column", LICENCES), ("id_column", NAMES)):
        held = texts + lists if key == "licence_column" else texts
        name = next((name for name in names if name != content and held[name]), "")
        found |= {key: name} if name else {}
    return found, False


def _all_files(name: str) -> str:
    """any file"""
    return ""


def _kind(name: str, is_named: bool) -> str:
    """The reader of a file; empty if none takes it. `is_named`: it is the only one, so a .json file holds rows."""
    suffix = PurePosixPath(bare_name(name)).suffix
    if is_named and suffix == ".json":
        return "jsonl"
    return KINDS.get(suffix) or ("files" if suffix.removeprefix(".") in SUFFIXES or is_named else "")


def _proposal(kind: str, place: str, files: Sequence[Input], notes: tuple[str, ...]) -> Proposal:
    path = {"path": place}
    if kind == "files":
        source: dict[str, Any] = {"reader": kind, **path}
        return Proposal(source, False, list_source_files(SourceConfig(reader=kind, path=[place])), notes)
    placed = _first_rows(kind, files)
    rows = [one.row for one in placed if isinstance(one.row, dict)]
    there = list(dict.fromkeys(name for one in placed for name in one.columns))
    if kind == "csv":
        _check_header(files[0].name, there)
    _check_shape(files[0].name, rows)
    columns, conversations = columns_of(rows)
    if not columns:
        raise ConfigError(f"{files[0].name}: {_without_text(placed, rows)}")
    for key, column in columns.items():
        check_text(f"{files[0].name}: {key}", column)
    used = [*columns.values(), *([TOOLS] if conversations else [])]
    rest = [name for name in there if name not in used]
    read = ", ".join(f"{key}={column}" for key, column in columns.items())
    notes = (*notes, f"columns: {read}; not read: {', '.join(rest[:LISTED]) or 'none'}{' ...' * (len(rest) > LISTED)}")
    content = columns["column"]
    reader = "messages" if conversations else kind
    if content == {"messages": MESSAGES, "tars": TEXT_MEMBER}.get(reader, TEXT_COLUMN):
        del columns["column"]
    by_path = language_of_paths(rows)
    looks_like_code = is_code(_texts(rows, content)) or (bool(by_path) and by_path not in PROSE)
    unnamed = "chat" if conversations else by_path or (CODE if looks_like_code else TEXT)
    source = {"reader": reader, **path, **columns, "language": unnamed}
    if "language_column" in columns:
        notes = (*notes, f"rows without a value in {columns['language_column']} count as `{unnamed}`")
    else:
        words = (
            f"no column names a language: metrics and counts call all rows `{unnamed}`; correct `language` if need be"
        )
        notes = (*notes, words)
    reader_of(SourceConfig(**source))  # refuses keys that the reader does not take
    return Proposal(source, conversations, Inputs(tuple(files)), notes, looks_like_code)


def _first_rows(kind: str, files: Sequence[Input]) -> list[PlacedRow]:
    wanted = [("", name) for name in (*TEXTS, "json")] if kind == "tars" else None
    return list(islice(placed_rows(Inputs((files[0],)), wanted, samples if kind == "tars" else None), ROWS))


def _texts(rows: Iterable[Row], column: str) -> Iterable[str]:
    values = (row.get(column) for row in rows)
    return (
        value.decode(errors="replace") if isinstance(value, bytes) else value
        for value in values
        if isinstance(value, str | bytes)
    )


def _check_header(name: str, columns: Sequence[str]) -> None:
    """Refuse a table whose columns are separated by another character, or whose first row is data."""
    if len(columns) == 1 and (found := [one for one in ";\t|," if one in columns[0]]):
        raise ConfigError(
            f"{name}: the header is one column, {columns[0]!r}, with {found[0]!r} in it: expected `,` between the "
            "columns of .csv, and tabs in .tsv: convert the file"
        )
    data = [one for one in columns if re.fullmatch(r"\s*|[-+]?[\d.,]+", one) or "://" in one or len(one.split()) > 4]
    if data and not {*TEXTS, MESSAGES} & {*columns}:
        raise ConfigError(
            f"{name}: the first row must name the columns, but {data[0]!r} looks like data: add a row of names, such "
            "as id,text"
        )


def _check_shape(name: str, rows: Sequence[Row]) -> None:
    """Refuse rows that are several texts: one column alone would be read."""
    there = {column for row in rows for column, value in row.items() if value}
    for columns in RANKED:
        if there >= {*columns}:
            raise ConfigError(f"{name}: columns {' and '.join(columns)} are rankings: use the reader of docs/reward.md")
    if there & {*TEXTS} or columns_of(rows)[1]:
        return
    pair = [*[one for one in QUESTIONS if one in there][:2], *[one for one in ANSWERS if one in there]]
    if {*pair} & {*QUESTIONS} and {*pair} & {*ANSWERS}:
        raise ConfigError(
            f"{name}: columns {', '.join(pair)}: only one of them would be read. Write a column `messages` for "
            '`stage=tools`: [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}], or a column '
            "`text` with all of them"
        )


def _without_text(placed: Sequence[PlacedRow], rows: Sequence[Row]) -> str:
    """Why rows give no column of text, and what to do."""
    if not placed:
        return "it has no rows"
    if not rows:
        first = placed[0]
        return f"none of its first {len(placed)} rows can be read; {first.place}: {getattr(first.row, 'words', '')}"
    kinds = {column: type(value).__name__ for row in reversed(rows) for column, value in row.items()}
    there = ", ".join(f"{column} ({kind})" for column, kind in [*kinds.items()][:LISTED])
    return (
        f"none of its first rows has a column of text or messages; the columns there are {there or 'none'}. Messages "
        "are lists of {role, content}; rankings have another reader (docs/reward.md)"
    )


def _suffixes(files: Sequence[Input]) -> str:
    counts = Counter(PurePosixPath(bare_name(one.name)).suffix or "no suffix" for one in files)
    return ", ".join(f"{suffix}: {count}" for suffix, count in counts.most_common(8))
