"""Proposes sources for data that nobody has described yet: readers by the suffixes of files, columns by their rows."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from dist_lm.chat.layouts.registry import COLUMNS, common_layout, expected_columns
from dist_lm.chat.layouts.tools import TOOLS
from dist_lm.chat.layouts.transcript import MEDIA
from dist_lm.chat.layouts.turns import SYSTEMS, turns_in
from dist_lm.chat.messages import ChatError
from dist_lm.chat.ranking import Ranking, check_ranking
from dist_lm.config.corpus import SourceConfig
from dist_lm.data.inputs import Input, Inputs
from dist_lm.data.sources.archive import unread_archives, zip_of
from dist_lm.data.sources.files import SUFFIXES, TEXT, list_source_files
from dist_lm.data.sources.formats import Row
from dist_lm.data.sources.listing import bare_name, by_suffix, list_files
from dist_lm.data.sources.preferences import kind_of, ranking_of
from dist_lm.data.sources.reader import reader_of
from dist_lm.data.sources.rows import TEXT as TEXT_COLUMN
from dist_lm.data.sources.rows import SourceRow, rows_of_files
from dist_lm.data.sources.snapshot import Snapshot
from dist_lm.data.sources.splits import LEFT_OUT
from dist_lm.data.sources.tars import TEXT_MEMBER, samples
from dist_lm.errors import ConfigError, did_you_mean

ROWS = 200  # read to guess columns
LEAST = 0.01  # share of the bytes at a path below which files of a kind are left out
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
KINDS |= {".arrow": "arrow", ".feather": "arrow"}
KINDS |= {".tar": "tars", ".tgz": "tars"}
# Usual names of columns, the likeliest first.
TEXTS = ("text", "content", "code", "txt", "body", "document", "article", "sql")
LANGUAGES = ("language", "lang", "programming_language")
LICENCES = ("license", "licence", "licenses", "licences", "license_type", "max_stars_repo_licenses")
PATHS = (
    "path",
    "file_path",
    "filename",
    "file_name",
    "max_stars_repo_path",
    "repo_path",
)  # columns of paths of source files
NAMES = ("id", *PATHS, "url", "title", "_id")
# Columns that are a document only together: the question, and the answer. Usual pairs are read as conversations.
QUESTIONS = ("prompt", "instruction", "question", "query", "input", "inputs", "problem")
ANSWERS = ("completion", "response", "output", "answer", "solution", "generation", "target", "targets", "summary")
# Columns that are rankings together, also of rows that are not well formed.
RANKED = (("chosen", "rejected"), ("completions", "ranks"), ("completions", "judgements"))
PROSE = ("english", "text", "markdown", "restructuredtext", "latex", "html")
NUMBER = re.compile(
    r"\s*([-+]?[\d.,]+([eE][-+]?\d+)?|nan|inf|true|false|none|null)?\s*", re.IGNORECASE
)  # a CSV cell without text
# How the bytes of images and audio begin: PNG, JPEG, GIF, TIFF; WAVE or WebP, FLAC, Ogg, MP3.
IMAGE_BYTES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\x00", b"MM\x00*")
AUDIO_BYTES = (b"RIFF", b"fLaC", b"OggS", b"ID3", b"\xff\xfb")
CODE = "code"  # language of code whose language is not known
NATURAL = re.compile(r"[a-z]{2}([-_].+)?")  # ISO 639-1, where it is no suffix of source files
MOSTLY = 0.9  # share of rows whose paths must agree on a language
CODE_LINES = 0.4  # share of the lines of a text from which on it is code
CODE_LINE = re.compile(
    r"^(?: {2,}|\t+)\S|[;{}()\[\]]\s*$|^[\w.\[\]]+ *[-+*/|&:]?= *\S|^(?:#!|#include|//|/\*|@\w)"
    r"|^(?:import|from|def|class|return|func|fn|let|const|var|public|private|package|using|if|for|while)\b.*[\w:]$"
)
CODE_SAMPLE = 5_000  # lines read to tell code from prose
LISTED = 20  # columns that a note names


@dataclass(frozen=True)
class Proposal:
    """A source, and notes for the person who uses it."""

    source: Mapping[str, Any]  # keys of `SourceConfig`
    conversations: bool
    inputs: Inputs
    notes: tuple[str, ...]  # lines for the corpus file; may hold any character
    is_code: bool = False  # whether texts in no known language look like code
    preferences: str = ""  # kind of most rows, one of `sources.preferences.KINDS`; empty: they are no preferences

    def typed(self) -> SourceConfig:
        """Returns the source as the configuration has it."""
        return SourceConfig(**self.source)


@dataclass(frozen=True)
class PairColumns:
    """Columns of preferences that a person names; false without them."""

    prompt: str = ""
    chosen: str = ""
    rejected: str = ""

    def __bool__(self) -> bool:
        return bool(self.prompt or self.chosen or self.rejected)

    def keys(self) -> dict[str, str]:
        """Returns the keys of a source that name the columns."""
        return {f"{name}_column": column for name, column in asdict(self).items() if column}

    def words(self) -> list[str]:
        """Returns the words of a command that name the columns."""
        return [word for key, column in self.keys().items() for word in (f"--{key.replace('_', '-')}", column)]

    def check(self) -> None:
        """Refuses one of two columns; returns nothing.

        Raises:
            ConfigError: names the options that are expected together.
        """
        if self and not (self.chosen and self.rejected):
            raise ConfigError(
                "--chosen-column COLUMN and --rejected-column COLUMN: expected together, perhaps with --prompt-column"
            )


def propose(path: str, question: str = "", answer: str = "", pair: PairColumns | None = None) -> list[Proposal]:
    """Returns a source for each kind of data at `path`: a file, a folder, a glob or a URL. Reads the first rows of
    tables, and asks servers of URLs.

    The sources are in alphabetical order of their readers. A kind with less than `LEAST` of the bytes, and one that
    cannot be described, is left out with a note, unless it is most of the data.

    Args:
        question, answer: columns of a question and of its answer, which make conversations; empty: by the columns.
        pair: columns of preferences; None or false: by the columns.

    Raises:
        ConfigError: there is no such path, or nothing that a reader takes; the message says what there is. Or the
            largest kind cannot be described.
        ArtefactError: a folder or URL cannot be listed, or the first file of a kind cannot be read.
    """
    # Source files of any name are read, but of tables only one split (`test.py`, `test.jsonl`).
    listing = list_files(SourceConfig(reader="files", path=[path], held_out=True), _all_files)
    of_other_splits: dict[str, str] = {}  # name -> split
    if any(PurePosixPath(bare_name(file.name)).suffix in KINDS for file in listing.taken):
        # Beside source files, tables of other splits alone are no reason for an error.
        has_source_files = any(_kind(file.name, is_named=False) == "files" for file in listing.taken)
        rule = _all_files if has_source_files else by_suffix(*KINDS)
        tables = list_files(SourceConfig(reader="files", path=[path]), rule)
        of_other_splits = {
            file.name: file.left_out.removeprefix(LEFT_OUT)
            for file in tables.left_out
            if file.left_out.startswith(LEFT_OUT) and PurePosixPath(bare_name(file.name)).suffix in KINDS
        }
    files_by_kind: dict[str, list[Input]] = {}
    for file in listing.taken:
        kind = _kind(file.name, len(listing.taken) == 1)
        if kind == "files" or file.name not in of_other_splits:
            files_by_kind.setdefault(kind, []).append(file)
    unreadable = files_by_kind.pop("", [])
    if not files_by_kind:
        raise ConfigError(f"{path}: nothing that a reader takes: {listing.summary()}, {_suffixes(unreadable)}")

    sizes = {kind: sum(max(1, file.size) for file in files) for kind, files in files_by_kind.items()}
    kinds = [kind for kind, size in sizes.items() if size >= LEAST * sum(sizes.values())]
    left_out = unreadable + [file for kind in files_by_kind if kind not in kinds for file in files_by_kind[kind]]
    notes: tuple[str, ...] = ()
    if left_out and "files" not in kinds:  # the reader `files` lists by itself the files that it leaves out
        notes = (f"not read: {_suffixes(left_out)}",)
    if of_other_splits:
        splits = Counter(of_other_splits.values())
        counts = ", ".join(f"{split}: {count}" for split, count in splits.most_common(8))
        notes = (*notes, f"not read: files of other splits than train ({counts}); a source with `split` reads them")

    proposals, refusals = [], []
    for kind in sorted(kinds):
        try:
            proposals.append(_proposal(kind, path, files_by_kind[kind], notes, question, answer, pair))
        except ConfigError as error:
            # A note is enough for a kind that is not most of the data.
            if sizes[kind] == max(sizes.values()):
                raise
            refusals.append(f"not read: {error}")
    # The reader of conversations reads the rows of every format, so that two kinds may give the same source.
    distinct = [
        proposal
        for number, proposal in enumerate(proposals)
        if proposal.source not in [earlier.source for earlier in proposals[:number]]
    ]
    if hint := _unread_archives(listing, distinct):
        refusals.append(hint)
    return [replace(proposal, notes=(*proposal.notes, *refusals)) for proposal in distinct]


def is_prose(languages: Mapping[str, int], looks_like_code: bool = False) -> bool:
    """Tells whether most bytes are prose, which belongs into corpus `language`, or else into `code`.

    Args:
        languages: bytes by language.
        looks_like_code: decides about unknown languages, such as `c++`; `en` or `pt-br` are prose.
    """
    code = {*SUFFIXES.values(), CODE} - {*PROSE}
    natural = {name for name in languages if NATURAL.fullmatch(name) and name[:2] not in SUFFIXES}
    prose = ({*languages} & {*PROSE}) | natural
    if not looks_like_code:
        prose |= {*languages} - natural - code - {*PROSE}
    return 2 * sum(languages[name] for name in prose) >= sum(languages.values())


def is_code(texts: Iterable[str]) -> bool:
    """Tells whether texts look like code: by indentation, and by how lines begin and end."""
    lines = list(islice((line for text in texts for line in text.splitlines() if line.strip()), CODE_SAMPLE))
    return sum(1 for line in lines if CODE_LINE.search(line)) > CODE_LINES * len(lines)


def language_of_paths(rows: Sequence[Row]) -> str:
    """Returns the language of at least `MOSTLY` of the rows, by the suffixes in a column of paths; else empty."""
    for name in PATHS:
        paths = [str(row[name]).lower() for row in rows if row.get(name)]
        suffixes = [PurePosixPath(path).suffix.removeprefix(".") for path in paths if "://" not in path]
        for language, count in Counter(SUFFIXES.get(suffix, "") for suffix in suffixes).most_common(1):
            if language and count >= MOSTLY * len(rows):
                return language
    return ""


def check_text(key: str, text: str) -> None:
    """Refuses an empty text, and one that the configuration would replace by something else; returns nothing.

    Args:
        key: what `text` is, for the error.

    Raises:
        ConfigError: quotes the text.
    """
    if not text.strip():
        problem = "it is empty"
    elif "${" in text:
        problem = "the configuration replaces ${...} by another value: rename it"
    else:
        return
    raise ConfigError(f"{key} {text!r}: {problem}; expected a file, folder, glob, URL or column")


def columns_of(rows: Iterable[Row]) -> tuple[dict[str, str], bool]:
    """Guesses the columns of rows.

    Rows of a layout in `chat.layouts.registry` are conversations, of which only the column of turns is returned, if
    they have one. Else `column` is one that is usual for text, or the one with the most text; beside it, those for
    language, licence and name are guessed by their usual names. All rows are read.

    Returns:
        The keys of a source -> column (empty if no column holds text or turns), and whether the rows are conversations.
    """
    rows = list(rows)
    # All rows vote, because the first one may have nulls.
    lengths: Counter[str] = Counter()  # characters or bytes of texts, by column; the rest counts rows
    texts: Counter[str] = Counter()
    turns: Counter[str] = Counter()
    lists: Counter[str] = Counter()  # lists of texts, such as licences
    for row in rows:
        for name, cell in row.items():
            if isinstance(cell, str | bytes):
                texts[name] += 1
                lengths[name] += len(cell)
            if turns_in(cell) is not None:
                turns[name] += 1
            elif isinstance(cell, list) and cell and isinstance(cell[0], str):
                lists[name] += 1

    recognised = common_layout(rows)
    if recognised and recognised[1]:
        return {"column": recognised[1]}, True
    # The turns of a prompt are not the whole conversation, so a layout goes before an unusual column of turns.
    if recognised and not (recognised[0].name == "completion" and any(texts[name] for name in TEXTS)):
        return {}, True
    # Any list of turns counts, but a text may look like one by chance.
    if name := next((name for name, count in turns.most_common() if 2 * count >= texts[name]), ""):
        return {"column": name}, True

    candidates = [name for name in TEXTS if texts[name]] or [name for name, _ in lengths.most_common(1)]
    if not candidates or not candidates[0]:
        return {}, False
    content = candidates[0]

    columns = {"column": content}
    for key, usual_names in (("language_column", LANGUAGES), ("licence_column", LICENCES), ("id_column", NAMES)):
        # Only licences may come as a list.
        rows_with = texts + lists if key == "licence_column" else texts
        if name := next((name for name in usual_names if name != content and rows_with[name]), ""):
            columns[key] = name
    return columns, False


def preferences_in(rows: Sequence[Row]) -> str:
    """Returns the kind of preferences that most rows hold, one of `sources.preferences.KINDS`; empty: less than half of
    the rows are preferences."""
    kinds: Counter[str] = Counter()
    for row in rows:
        try:
            kind = kind_of(row)
            # Columns alone do not tell: `answers` may be those of a quiz.
            ranking = ranking_of(row, kind)
            if isinstance(ranking, Ranking):
                check_ranking(ranking)
            kinds[kind] += 1
        except ChatError:
            continue
    if 2 * kinds.total() < len(rows) or not kinds:
        return ""
    return kinds.most_common(1)[0][0]


def _unread_archives(listing: Inputs, proposals: Sequence[Proposal]) -> str:
    """Returns one line about the archives among the files of a path that no proposal reads; empty without any.

    Args:
        listing: all files there, and in place of a zip its members.
    """
    read = {name for proposal in proposals for name in _files_and_zips(proposal.inputs)}
    return unread_archives(_files_and_zips(listing) - read)


def _files_and_zips(listing: Inputs) -> set[str]:
    """Returns the files that are taken, and of members of a zip the zip."""
    return {zip_of(file.name)[0] or file.name for file in listing.taken}


def _all_files(name: str) -> str:
    """any file"""
    return ""


def _kind(name: str, is_named: bool) -> str:
    """Returns the name of the reader of a file by its suffix, such as jsonl; empty if none takes it.

    Args:
        is_named: whether it is the only file: then a .json file holds rows, and any other suffix is a text.

    Raises:
        ConfigError: the scheme of a URL is not supported.
    """
    suffix = PurePosixPath(bare_name(name)).suffix
    if is_named and suffix == ".json":
        return "jsonl"
    if suffix in KINDS:
        return KINDS[suffix]
    if suffix.removeprefix(".") in SUFFIXES or is_named:
        return "files"
    return ""


def _proposal(
    kind: str,
    path: str,
    files: Sequence[Input],
    notes: tuple[str, ...],
    question: str = "",
    answer: str = "",
    pair: PairColumns | None = None,
) -> Proposal:
    """Returns the source for the files of one kind at `path`; the columns are those of the first file.

    Args:
        kind: the name of a reader.
        notes: remarks that come first.
        question, answer, pair: as in `propose`.

    Raises:
        ConfigError: the rows make no documents, are several texts each, or have a column whose name cannot be written.
        ArtefactError: the first file cannot be read, or the files cannot be listed.
    """
    named_columns = [name for name in (question, answer, *(pair.keys().values() if pair else ())) if name]
    if named_columns and kind in ("files", "tars"):
        raise ConfigError(f"{files[0].name}: no table, so it has no columns {' and '.join(named_columns)}")
    if kind == "files":
        source: dict[str, Any] = {"reader": kind, "path": path}
        return Proposal(source, False, list_source_files(SourceConfig(reader=kind, path=[path])), notes)

    first_rows = _first_rows(kind, files)
    rows = [source_row.row for source_row in first_rows if isinstance(source_row.row, dict)]
    names = list(dict.fromkeys(name for source_row in first_rows for name in source_row.columns))
    if kind == "csv":
        _check_header(files[0].name, names)
    if kind == "tars":
        _check_samples(files[0].name, rows)
    if question:
        return _questions_with_answers(path, files, names, (question, answer), notes)
    if pair:
        return _named_pairs(path, files, names, pair, notes)
    if kind != "tars" and (preferences := preferences_in(rows)):
        _check_media(files[0].name, rows, conversations=True)
        source = {"reader": "preferences", "path": path, "language": "preferences"}
        words = f"columns: preferences ({preferences}): {', '.join(names[:LISTED])}"
        return Proposal(source, False, Inputs(tuple(files)), (*notes, words), preferences=preferences)

    _check_shape(files[0].name, rows)
    columns, conversations = columns_of(rows)
    _check_media(files[0].name, rows, conversations)
    if not columns and not conversations:
        raise ConfigError(f"{files[0].name}: {_without_text(first_rows, rows)}")
    for key, column in columns.items():
        check_text(f"{files[0].name}: {key}", column)

    read_columns = [*columns.values()]
    named = ", ".join(f"{key}={column}" for key, column in columns.items())
    if conversations:
        read_columns += COLUMNS
        layout = common_layout(rows, columns.get("column", ""))
        assert layout is not None
        named = f"conversations as {layout[0].name} ({layout[0].description})"
    unread = [name for name in names if name not in read_columns]
    dots = " ..." if len(unread) > LISTED else ""
    notes = (*notes, f"columns: {named}; not read: {', '.join(unread[:LISTED]) or 'none'}{dots}")

    # The file names no column that the reader finds by itself.
    content, reader = columns.get("column", ""), kind
    if conversations:
        reader = "messages"
        if common_layout(rows) == layout:
            columns.pop("column", None)
    elif content == {"tars": TEXT_MEMBER}.get(reader, TEXT_COLUMN):
        del columns["column"]

    language_by_path = language_of_paths(rows)
    looks_like_code = is_code(_texts(rows, content)) or (bool(language_by_path) and language_by_path not in PROSE)
    language = "chat"
    if not conversations:
        language = language_by_path or (CODE if looks_like_code else TEXT)
    if "language_column" in columns:
        words = f"rows without a value in {columns['language_column']} count as `{language}`"
    else:
        words = (
            f"no column names a language: metrics and counts call all rows `{language}`; correct `language` if need be"
        )

    source = {"reader": reader, "path": path, **columns, "language": language}
    reader_of(SourceConfig(**source))  # refuses keys that the reader does not take
    return Proposal(source, conversations, Inputs(tuple(files)), (*notes, words), looks_like_code)


def _questions_with_answers(
    path: str, files: Sequence[Input], names: Sequence[str], pair: tuple[str, str], notes: tuple[str, ...]
) -> Proposal:
    """Returns the source for a table whose columns of a question and of its answer a person names.

    Args:
        names: columns of the first file.
        pair: the columns of the question and of the answer.

    Raises:
        ConfigError: the table lacks one of them.
    """
    for option, name in zip(("--question", "--answer"), pair, strict=True):
        _check_named(option, name, files[0].name, names)

    unread = [name for name in names if name not in (*pair, *TOOLS, *SYSTEMS)]
    words = f"columns: {pair[0]} (question) and {pair[1]} (answer); not read: {', '.join(unread[:LISTED]) or 'none'}"
    source = {"reader": "messages", "path": path, "question_column": pair[0], "answer_column": pair[1]}
    return Proposal(source | {"language": "chat"}, True, Inputs(tuple(files)), (*notes, words))


def _named_pairs(
    path: str, files: Sequence[Input], names: Sequence[str], pair: PairColumns, notes: tuple[str, ...]
) -> Proposal:
    """Returns the source for a table of preferences whose columns a person names.

    Args:
        names: columns of the first file.

    Raises:
        ConfigError: the table lacks one of them.
    """
    for key, name in pair.keys().items():
        _check_named(f"--{key.replace('_', '-')}", name, files[0].name, names)
    source = {"reader": "preferences", "path": path, "language": "preferences"} | pair.keys()
    words = f"columns: preferences (pairs): {', '.join(pair.keys().values())}"
    return Proposal(source, False, Inputs(tuple(files)), (*notes, words), preferences="pairs")


def _check_named(option: str, column: str, file: str, names: Sequence[str]) -> None:
    """Refuses a column that an option names and a table lacks; returns nothing.

    Args:
        names: columns of the table `file`.

    Raises:
        ConfigError: there is no such column, or its name cannot be written.
    """
    if column not in names:
        raise ConfigError(
            f"{option} {column}: {file} has no such column; {did_you_mean(column, names)}the columns there "
            f"are {', '.join(names) or 'none'}"
        )
    check_text(option, column)


def _first_rows(kind: str, files: Sequence[Input]) -> list[SourceRow]:
    """Returns the first rows of the first file, at most `ROWS`, broken ones included.

    Raises:
        ArtefactError: the file cannot be read.
    """
    first = Snapshot(lambda: Inputs((files[0],)))
    if kind == "tars":
        # A member is decoded only if it is asked for.
        return list(islice(rows_of_files(first, [("", name) for name in (*TEXTS, "json")], samples), ROWS))
    return list(islice(rows_of_files(first), ROWS))


def _texts(rows: Iterable[Row], column: str) -> Iterable[str]:
    for row in rows:
        text = row.get(column)
        if isinstance(text, bytes):
            yield text.decode(errors="replace")
        elif isinstance(text, str):
            yield text


def _check_header(name: str, columns: Sequence[str]) -> None:
    """Refuses a table whose columns are separated by another character, or whose first row is data. Returns nothing.

    Args:
        columns: the names in the first row.

    Raises:
        ConfigError: the message begins with `name`, the file.
    """
    if len(columns) == 1 and (separators := [character for character in ";\t|," if character in columns[0]]):
        raise ConfigError(
            f"{name}: the header is one column, {columns[0]!r}, with {separators[0]!r} in it: expected `,` between the "
            "columns of .csv, and tabs in .tsv: convert the file"
        )

    # No names of columns: empty texts and numbers, addresses, and whole sentences.
    cells = [
        column
        for column in columns
        if re.fullmatch(r"\s*|[-+]?[\d.,]+", column) or "://" in column or len(column.split()) > 4
    ]
    if cells and not {*TEXTS, *COLUMNS} & {*columns}:
        raise ConfigError(
            f"{name}: the first row must name the columns, but {cells[0]!r} looks like data: add a row of names, such "
            "as id,text"
        )


def _check_samples(name: str, rows: Sequence[Row]) -> None:
    """Refuses a tar most of whose samples have no text: one of source files is often taken for webdataset. Returns
    nothing.

    Args:
        rows: the first samples; members that are no text are None.

    Raises:
        ConfigError: says what the tar holds, and the way out; the message begins with `name`, the file.
    """
    n_texts = sum(1 for row in rows if any(cell is not None for cell in row.values()))
    if not rows or 2 * n_texts >= len(rows):
        return

    extensions = Counter(extension for row in rows for extension in row)
    members = ", ".join(f".{extension}: {count}" for extension, count in extensions.most_common(8))
    sources = [extension for extension, _ in extensions.most_common() if extension.rpartition(".")[2] in SUFFIXES]
    # Samples of webdataset have several members each; `.cls` beside `.jpg` is no LaTeX.
    n_joined = sum(1 for row in rows if len(row) > 1)
    if not sources or 2 * n_joined > len(rows):
        raise ConfigError(
            f"{name}: most of its first {len(rows)} samples have no text, which alone can be read ({members}): "
            f"expected a member .{TEXT_MEMBER} or .json"
        )
    raise ConfigError(
        f"{name}: a tar of files ({members}), and not of webdataset samples with a text each: unpack it, as with "
        f"`tar -xf`, and name the folder. Without unpacking, the reader `tars` reads one kind of file, as with "
        f"`column: {sources[0]}`"
    )


def _check_shape(name: str, rows: Sequence[Row]) -> None:
    """Refuses rows that are several texts, because one column alone would be read. Returns nothing.

    Rows with a column of a usual name for text, or with messages, pass.

    Raises:
        ConfigError: the rows are questions with answers, or broken rankings; the message begins with `name`, the file.
    """
    columns = {column for row in rows for column, cell in row.items() if cell}
    for ranked in RANKED:
        if columns >= {*ranked}:
            raise ConfigError(
                f"{name}: columns {' and '.join(ranked)} are rankings, but most rows are not well formed: see the "
                "readers of docs/reward.md"
            )
    # A column with a usual name of text, or messages, is the whole document.
    if columns & {*TEXTS} or columns_of(rows)[1]:
        return

    questions = [column for column in QUESTIONS if column in columns][:2]
    answers = [column for column in ANSWERS if column in columns]
    if questions and answers:
        raise ConfigError(
            f"{name}: columns {', '.join([*questions, *answers])}: only one of them would be read. Name two of them, "
            f"as by --question {questions[0]} --answer {answers[0]}, or write a column "
            '`messages` for `stage=tools`: [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}], '
            "or a column `text` with all of them"
        )


def _check_media(name: str, rows: Sequence[Row], conversations: bool) -> None:
    """Refuses rows with images, audio or videos, and tables of numbers, which no reader takes. Returns nothing.

    Args:
        conversations: the rows are; then a path of an image is one too.

    Raises:
        ConfigError: names the column and what it holds; the message begins with `name`, the file.
    """
    for row in rows:
        for column, cell in row.items():
            kind = MEDIA.get(column, "") if cell and (conversations or not isinstance(cell, str)) else ""
            if kind := _media_in(cell) or kind:
                raise ConfigError(
                    f"{name}: column {column} holds {kind}, which cannot be read: only text can. Remove the column if "
                    "the text is whole without it"
                )

    # Cells of CSV are texts, and a number would be trained as one.
    cells = [cell for row in rows for cell in row.values()]
    has_values = any(cell is not None for cell in cells)
    if has_values and not conversations and all(_is_number(cell) for cell in cells):
        types = {column: type(cell).__name__ for row in reversed(rows) for column, cell in row.items()}
        columns = ", ".join(f"{column} ({type_name})" for column, type_name in [*types.items()][:LISTED])
        raise ConfigError(
            f"{name}: a table of numbers, which cannot be read: only text can. The columns there are {columns}"
        )


def _media_in(cell: Any) -> str:
    """Returns what the bytes of a cell are by their beginning, images or audio; empty for other values."""
    content = cell
    # datasets keeps a file as a mapping of its bytes and path, and decoded audio as an array with its rate.
    if isinstance(cell, Mapping):
        if "sampling_rate" in cell:
            return "audio"
        content = cell.get("bytes")
    if isinstance(content, bytes):
        if content.startswith(IMAGE_BYTES) or content[8:12] == b"WEBP":
            return "images"
        if content.startswith(AUDIO_BYTES):
            return "audio"
    return ""


def _is_number(cell: Any) -> bool:
    """Returns whether a cell is empty, a number or the text of one, or a list of these."""
    if isinstance(cell, list):
        return all(_is_number(element) for element in cell)
    if isinstance(cell, str):
        return bool(NUMBER.fullmatch(cell))
    return cell is None or isinstance(cell, int | float)


def _without_text(first_rows: Sequence[SourceRow], rows: Sequence[Row]) -> str:
    """Returns why rows have no column of text, and what to do, in words for people.

    Args:
        first_rows: as they were read, broken ones included.
        rows: those of `first_rows` that can be read.
    """
    if not first_rows:
        return "it has no rows"
    if not rows:
        first = first_rows[0]
        problem = getattr(first.row, "words", "")
        return f"none of its first {len(first_rows)} rows can be read; {first.location}: {problem}"
    types = {column: type(cell).__name__ for row in reversed(rows) for column, cell in row.items()}
    columns = ", ".join(f"{column} ({name})" for column, name in [*types.items()][:LISTED])
    return (
        f"none of its first rows has a column of text or a layout of conversations; the columns there are "
        f"{columns or 'none'}. Expected text, or {expected_columns()}; rankings have another reader (docs/reward.md)"
    )


def _suffixes(files: Sequence[Input]) -> str:
    """Counts files by suffix, in words: `.bin: 3, no suffix: 1`."""
    suffixes = Counter(PurePosixPath(bare_name(file.name)).suffix or "no suffix" for file in files)
    return ", ".join(f"{suffix}: {count}" for suffix, count in suffixes.most_common(8))
