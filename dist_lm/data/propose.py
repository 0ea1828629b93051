"""Sources for data that nobody has described yet: readers by the suffixes of its files, columns by their first rows."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.inputs import Input, Inputs
from dist_lm.data.sources.files import SUFFIXES, TEXT, list_source_files
from dist_lm.data.sources.formats import Row
from dist_lm.data.sources.messages import MESSAGES
from dist_lm.data.sources.places import bare_name, list_files
from dist_lm.data.sources.reader import reader_of
from dist_lm.data.sources.rows import TEXT as TEXT_COLUMN
from dist_lm.data.sources.rows import placed_rows
from dist_lm.data.sources.tars import TEXT_MEMBER, samples
from dist_lm.errors import ConfigError

ROWS = 200  # looked at to name columns
LEAST = 0.01  # of the bytes of a place: files of a kind below this share are left out
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
KINDS |= {".tar": "tars", ".tgz": "tars"}
# usual names of columns, the likeliest first
TEXTS = ("text", "content", "code", "txt", "body", "document", "article", "sql")
LANGUAGES = ("language", "lang", "programming_language")
LICENCES = ("license", "licence", "licenses", "license_type", "max_stars_repo_licenses")
NAMES = ("id", "path", "url", "repo_path", "title", "_id")
PROSE = ("english", "text", "markdown", "restructuredtext", "latex", "html")


@dataclass(frozen=True)
class Proposal:
    """A source, and what a person should know of it."""

    source: Mapping[str, Any]  # keys of `SourceConfig`
    conversations: bool
    inputs: Inputs
    notes: tuple[str, ...]  # lines for the corpus file

    def typed(self) -> SourceConfig:
        return SourceConfig(**self.source)


def propose(place: str) -> list[Proposal]:
    """A source for each kind of data at `place`: a file, a folder, a glob or a URL.

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
    return [_proposal(kind, place, kinds[kind], notes) for kind in sorted(taken)]


def is_prose(languages: Mapping[str, int]) -> bool:
    """Whether most bytes are prose: of corpus `language`, not `code`. `languages`: bytes by language."""
    return 2 * sum(languages.get(name, 0) for name in PROSE) >= sum(languages.values())


def columns_of(rows: Iterable[Row]) -> tuple[dict[str, str], bool]:
    """`(keys of a source that name columns, whether the rows are conversations)`, guessed from rows.

    `column` is that of messages (a list of mappings with `role`), else one that is usual for text, else the one with
    the longest texts. No keys if no column holds text.
    """
    lengths: Counter[str] = Counter()
    messages: Counter[str] = Counter()
    texts: Counter[str] = Counter()
    for row in rows:
        for name, value in row.items():
            if isinstance(value, str | bytes):
                texts[name] += 1
                lengths[name] += len(value)
            elif isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]:
                messages[name] += 1
    if messages:
        return {"column": messages.most_common(1)[0][0]}, True
    usual = [name for name in TEXTS if texts[name]]
    content = usual[0] if usual else next((name for name, _ in lengths.most_common(1)), "")
    if not content:
        return {}, False
    found = {"column": content}
    for key, names in (("language_column", LANGUAGES), ("licence_column", LICENCES), ("id_column", NAMES)):
        name = next((name for name in names if name != content and texts[name]), "")
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
    columns, conversations = columns_of(_first_rows(kind, files))
    if not columns:
        raise ConfigError(
            f"{files[0].name}: none of its first rows has a column of text or messages; rankings have another reader "
            "(docs/reward.md)"
        )
    reader = "messages" if conversations else kind
    if columns["column"] == {"messages": MESSAGES, "tars": TEXT_MEMBER}.get(reader, TEXT_COLUMN):
        del columns["column"]
    source = {"reader": reader, **path, **columns}
    if "language_column" not in columns:
        source["language"] = "chat" if conversations else TEXT
        notes = (*notes, "`language` is the name in figures; english, python, bash and sql have rules of their own")
    reader_of(SourceConfig(**source))  # refuses keys that the reader does not take
    return Proposal(source, conversations, Inputs(tuple(files)), notes)


def _first_rows(kind: str, files: Sequence[Input]) -> list[Row]:
    wanted = [("", name) for name in (*TEXTS, "json")] if kind == "tars" else None
    rows = placed_rows(Inputs((files[0],)), wanted, samples if kind == "tars" else None)
    return [one.row for one in islice(rows, ROWS) if isinstance(one.row, dict)]


def _suffixes(files: Sequence[Input]) -> str:
    counts = Counter(PurePosixPath(bare_name(one.name)).suffix or "no suffix" for one in files)
    return ", ".join(f"{suffix}: {count}" for suffix, count in counts.most_common(8))
