"""The conf groups `corpus` and `tokenizer`: which documents are read and kept, how a tokenizer is trained on them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from dist_lm.errors import ConfigError, did_you_mean, require, require_folder_name

DOCUMENT, REPOSITORY = "document", "repository"  # values of `cleaning.near_duplicates_by`


@dataclass
class CleaningConfig:
    """Steps of cleaning, each on or off. `data/cleaning.py` has the rules and sources, docs/data.md the reasons."""

    min_document_bytes: int = 0  # UTF-8; shorter documents are dropped (too_short)
    encoding: bool = True  # texts with many U+FFFD, the mark of bytes that were decoded wrongly (undecodable)
    across_corpora: bool = False  # a text that an earlier corpus of the configuration has (duplicate)
    # least similarity to an earlier text at which a text is dropped (near_duplicate): the Jaccard index of their
    # five-word windows; 0: texts are only compared as a whole. Conversations are never compared
    near_duplicates: float = 0.0
    # what is compared with near_duplicates: document | repository (all files of one together, which leave together;
    # documents of no repository one by one; only with corpus.build=tasks)
    near_duplicates_by: str = DOCUMENT
    # files of benchmarks, and `own` for the problems of dist_lm: texts with 13 consecutive words of one are dropped
    # from train and val (benchmark FILE)
    benchmarks: list[str] = field(default_factory=list)
    licences: list[str] = field(default_factory=list)  # documents with any other licence, or none (licence); []: all
    generated: bool = False  # files that a program wrote (generated)
    minified: bool = False  # code without line ends (minified)
    vendored: bool = False  # copies of other people's files, by their folder (vendored)
    secrets: bool = True  # keys and tokens become <KEY>
    emails: bool = True  # addresses become <EMAIL>

    def __post_init__(self) -> None:
        """Refuses values out of their range, empty names, and `near_duplicates_by=repository` without
        `near_duplicates`.

        Raises:
            ConfigError: names the key, its value and what is accepted.
        """
        require(
            self.min_document_bytes >= 0,
            "corpus.cleaning.min_document_bytes",
            self.min_document_bytes,
            "0 (all) or a positive number of bytes",
        )
        require(
            self.near_duplicates == 0 or 0.5 <= self.near_duplicates <= 1,
            "corpus.cleaning.near_duplicates",
            self.near_duplicates,
            "0 (off) or a similarity from 0.5 to 1, such as 0.8",
        )
        require(
            self.near_duplicates_by == DOCUMENT or (self.near_duplicates_by == REPOSITORY and self.near_duplicates > 0),
            "corpus.cleaning.near_duplicates_by",
            self.near_duplicates_by,
            f"{DOCUMENT}, or {REPOSITORY} with corpus.cleaning.near_duplicates=0.8 or another similarity",
        )
        require(all(self.benchmarks), "corpus.cleaning.benchmarks", self.benchmarks, "files such as [own, mbpp.jsonl]")
        require(all(self.licences), "corpus.cleaning.licences", self.licences, "names such as [MIT, Apache-2.0]")


TASKS = "tasks"
BUILDS = ("serial", TASKS)
SPLITS = ("train", "val")
BYTES_PER_TOKEN = 4  # estimate for text whose tokens are not counted yet
# names of credentials in the query of a URL
SECRET = re.compile(
    r"(?i)(signature|token|secret|passw(or)?d|passphrase|(api|access|account)_?key(_?id)?|credentials?|\bsig|\bkey"
    r"|(\b|_)(auth|authorization|bearer|jwt|pass|pwd))="
)
TRAIN, KEEP = "train", "keep"  # values of `tokenizer.source` that are no path
STAGE_RUN = "stage:"  # begins a start that names a stage: its run with the run_id of the command
HF = "hf:"  # begins the name of a model of transformers, where a key takes one (`interop/snapshot.py`)


@dataclass
class SourceConfig:
    """One source of a corpus: the reader, and the settings that the reader takes.

    A key that the reader does not take is refused by name (`data/sources/reader.py`), so every default is "not given";
    docs/data.md says which reader takes which key.
    """

    # files | jsonl | parquet | csv | arrow | messages | tars | hub | hub_tools | hub_rankings | rankings (files of your
    # own) | preferences | tools (generated) | synthetic_rankings (samples of the model, ranked by rules) | the import
    # path of a function: my_package.my_module:read_notes
    reader: str = MISSING
    language: str = ""  # the name that metrics have; english, python, bash and sql have rules of their own
    licence: str = ""
    limit: int = 0  # documents; 0: all
    # every document is val, whatever its hash, and train documents that contain one are dropped. The other sources of
    # the corpus are train
    held_out: bool = False
    path: Any = None  # a file, folder, glob or URL (http, https, s3, gs), or a list of them
    exclude: list[str] = field(default_factory=list)  # patterns as in .gitignore, relative to each folder of `path`
    dataset: str = ""  # hub...: id of the data set; rankings: file or glob
    revision: str | None = None  # hub; none: main
    subset: str | None = None  # hub: configuration name of the data set
    data_dir: str | None = None  # hub: folder inside the data set
    # hub and files of rows: split of the data set, of files by their names; none: train (train/val is ours, by document
    # hash)
    split: str | None = None
    column: str = ""  # the column that holds the document; none: the default of the reader
    licence_column: str = ""  # the column that holds the licence of each row; none: `licence` for all
    language_column: str = ""  # the column that holds the language of each row; none: `language` for all
    # messages: the columns of a question and of its answer, in rows without turns; none: by their usual names
    question_column: str = ""
    answer_column: str = ""
    # preferences: the columns of the prompt and of two answers, in rows of pairs; none: by their usual names
    prompt_column: str = ""
    chosen_column: str = ""
    rejected_column: str = ""
    id_column: str = ""  # the column that names each row in messages and in the corpus; none: file and line
    # columns that choose among equal and nearly equal texts of a corpus: the one with most stars stays, of these the
    # earliest (a date of ISO 8601, or seconds since 1970); none: the first one that is read
    stars_column: str = ""
    time_column: str = ""
    # hub_rankings: oasst1 | hh-rlhf | helpsteer3 | ultrafeedback; none: by the name of the data set. preferences:
    # pairs | ranked | labelled, or one of the last three; none: by the columns of each row
    rows: str = ""
    only: list[str] = field(default_factory=list)  # languages that are kept; none: all
    # messages: the thinking of answers is learn (with the loss; the default) | context (without loss) | drop (left out)
    thinking: str = ""
    # messages: turns before the first question are refuse (the row is counted as broken; the default) | drop (left out)
    opening_answers: str = ""
    # messages: of turns of the system behind the first turn, for chat templates that refuse them: none (they stay) |
    # user (their text opens the next turn of the user) | drop_row (rows with such turns are left out)
    later_system: str = ""

    def __post_init__(self) -> None:
        paths = []
        if isinstance(self.path, list | tuple):
            paths = [*self.path]
        elif self.path not in (None, ""):
            paths = [self.path]
        require(
            all(isinstance(path, str) and path for path in paths),
            f"corpus source {self.reader}: path",
            self.path,
            "a file, folder, glob or URL, or a list of them",
        )
        self.path = paths or None

        # The message leaves the address out, because messages are logged.
        for key, address in [("dataset", self.dataset), *(("path", path) for path in paths)]:
            host = address.partition("://")[2].partition("/")[0]
            query = address.partition("?")[2]
            require(
                "@" not in host and not SECRET.search(query),
                f"corpus source {self.reader}: {key}",
                "(an address with a password, a token or a signature)",
                "an address without one (credentials come from the environment); the configuration is written to disk",
            )

        require(
            bool(self.question_column) == bool(self.answer_column) and not (self.question_column and self.column),
            f"corpus source {self.reader}: question_column, answer_column",
            f"{self.question_column!r}, {self.answer_column!r}",
            "both or none of them, and no `column` beside them",
        )
        has_both = bool(self.chosen_column and self.rejected_column)
        has_none = not (self.prompt_column or self.chosen_column or self.rejected_column)
        require(
            has_both or has_none,
            f"corpus source {self.reader}: prompt_column, chosen_column, rejected_column",
            f"{self.prompt_column!r}, {self.chosen_column!r}, {self.rejected_column!r}",
            "chosen_column and rejected_column together, perhaps with prompt_column; or none of them",
        )
        require(
            self.thinking in ("", "learn", "context", "drop"),
            f"corpus source {self.reader}: thinking",
            self.thinking,
            "learn, context or drop",
        )
        require(
            self.opening_answers in ("", "refuse", "drop"),
            f"corpus source {self.reader}: opening_answers",
            self.opening_answers,
            "refuse or drop",
        )
        require(
            self.later_system in ("", "user", "drop_row"),
            f"corpus source {self.reader}: later_system",
            self.later_system,
            "user or drop_row",
        )
        require(
            self.limit >= 0,
            f"corpus source {self.reader}: limit",
            self.limit,
            "0 (all) or a positive integer",
        )

    @property
    def has_precedence(self) -> bool:
        """Whether columns choose among equal and nearly equal texts."""
        return bool(self.stars_column or self.time_column)


_FORMS: dict[Any, str] = {int: "an integer", bool: "true or false", str: "a text", list[str]: "a list of texts"}


def source_of(written: Any, key: str) -> SourceConfig:
    """Returns the source that a file or command describes, with its types and bounds checked.

    Args:
        written: a `SourceConfig`, or a mapping with its keys.
        key: the source's own key for messages, such as corpus.corpora.NAME[0].

    Raises:
        ConfigError: names the source and its wrong key.
    """
    if not isinstance(written, SourceConfig | Mapping):
        raise ConfigError(f"{key}={written}: expected keys of a source: {{reader: jsonl, path: ...}}")

    # A typed source is checked again, because whoever made it may have set any value.
    values: Mapping[Any, Any] = vars(written) if isinstance(written, SourceConfig) else written
    # OmegaConf takes milliseconds for a source, and a plan makes hundreds.
    if _has_its_types(values):
        copied: dict[str, Any] = {key: [*value] if isinstance(value, list) else value for key, value in values.items()}
        return SourceConfig(**copied)

    try:
        source = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SourceConfig), values))
    except ConfigKeyError as error:
        names = [field.name for field in fields(SourceConfig)]
        hint = did_you_mean(str(error.key), names)
        raise ConfigError(
            f"{key}.{error.key}: no such key; {hint}keys of a source (each reader takes some): {', '.join(names)}"
        ) from error
    except MissingMandatoryValue as error:
        raise ConfigError(f"{key}: reader is missing: expected a reader such as files, jsonl or messages") from error
    except OmegaConfBaseException as error:
        if error.key not in values:
            raise ConfigError(f"{key}={written}: {str(error).splitlines()[0]}") from error
        form = _FORMS.get(SourceConfig.__annotations__.get(str(error.key)), "a text")
        raise ConfigError(f"{key}.{error.key}={values[error.key]}: expected {form}") from error

    assert isinstance(source, SourceConfig)
    return source


def _has_its_types(values: Mapping[Any, Any]) -> bool:
    """Returns whether the values of a source have the types of its keys, so that OmegaConf would convert, resolve and
    refuse nothing."""
    annotations = SourceConfig.__annotations__
    return "reader" in values and all(
        key in annotations and _has_type(value, annotations[key]) for key, value in values.items()
    )


def _has_type(value: Any, annotation: Any) -> bool:
    """Returns whether a value is plain and has the type of a key of `SourceConfig`, where `Any` is a text or some."""
    if isinstance(value, list):
        return annotation in (list[str], Any) and all(_is_plain_text(text) for text in value)
    if isinstance(value, str):
        return _is_plain_text(value) and (annotation is Any or str in (annotation, *_members(annotation)))
    return (value is None and annotation is Any) or type(value) in (annotation, *_members(annotation))


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if isinstance(annotation, UnionType) else ()


def _is_plain_text(text: Any) -> bool:
    """Returns whether a value is a text in which OmegaConf reads nothing, unlike `${oc.env:HOME}` and `???`."""
    return type(text) is str and "${" not in text and text != MISSING


def check_sources(corpora: Any, key: str) -> None:
    """Refuses `corpora` that are no mapping from names to lists of sources; null counts as an empty list.

    Args:
        key: the key of `corpora` for messages.

    Raises:
        ConfigError: names the source and its wrong key.
    """
    form = "expected NAME: [{reader: ...}, ...]"
    if not isinstance(corpora, Mapping):
        raise ConfigError(f"{key}={corpora}: {form}")

    for name, sources in corpora.items():
        if not isinstance(sources, list | None):
            raise ConfigError(f"{key}.{name}={sources}: {form}")
        for index, source in enumerate(sources or []):
            source_of(source, f"{key}.{name}[{index}]")


if TYPE_CHECKING:
    Corpora = dict[str, list[SourceConfig]]
else:  # the type of what a file may say
    Corpora = dict[str, list[SourceConfig] | None] | None


@dataclass
class CorpusConfig:
    """The sources of every corpus, by corpus name."""

    name: str = MISSING  # local | hub
    # `null` takes away a corpus, or all, that an earlier file of the defaults has
    corpora: Corpora = field(default_factory=dict)
    val_fraction: float = 0.02  # share of documents kept out of training, chosen by hash
    max_document_bytes: int = 1_000_000  # longer documents are dropped and counted
    # most val tokens of each corpus of texts, at four bytes a token: `val_fraction` is halved until val fits, because
    # train is compared with val in memory
    val_tokens: int = 10_000_000
    documents_per_member: int = 256  # documents grouped in one member of a tar
    shard_tokens: int = 64_000_000  # tokens a tar
    # serial: one process reads and decides | tasks: worker processes do, for corpora of texts; `shard_tokens` does not
    # count then, each task writes a tar
    build: str = "serial"
    # the documents of each task in a random order, repositories whole; with build=tasks. For stage.order=units and
    # sources that are sorted by language
    shuffle_in_tasks: bool = False
    cleaning: CleaningConfig = field(default_factory=CleaningConfig)
    max_bad_fraction: float = 0.001  # share of the rows of a source that may be broken; they are counted and skipped
    # corpus -> its folder in work/corpora, which the plan chooses and ranks read. A finished folder that a command
    # names is used as it is, whatever the sources are
    folders: dict[str, str] = field(default_factory=dict)
    # corpus -> a finished folder of work/corpora with its first sources: only the sources behind these are read and
    # written. With build=tasks
    extends: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # OmegaConf checks the types of dataclasses inside a list, but not of those in a list inside a mapping
        written = {name: sources for name, sources in (self.corpora or {}).items() if sources is not None}
        self.corpora = {
            name: [source_of(source, f"corpus.corpora.{name}[{index}]") for index, source in enumerate(sources)]
            for name, sources in written.items()
        }

        for name, sources in self.corpora.items():
            require_folder_name("the name of a corpus in corpus.corpora", name)
            require(
                not sources or not all(source.held_out for source in sources),
                f"corpus.corpora.{name}: held_out",
                "true",
                "a source without held_out beside it: a stage trains on the corpus",
            )

        for name, folder in self.folders.items():
            require_folder_name(f"corpus.folders.{name}", folder)
        for name, folder in self.extends.items():
            require_folder_name(f"corpus.extends.{name}", folder)
            accepted = f"none with corpus.build={self.build}: set corpus.build={TASKS}"
            require(self.build == TASKS, f"corpus.extends.{name}", folder, accepted)
            accepted = "none with corpus.cleaning.across_corpora=true: build all sources without this key"
            require(not self.cleaning.across_corpora, f"corpus.extends.{name}", folder, accepted)
        require(0 < self.val_fraction < 1, "corpus.val_fraction", self.val_fraction, "in (0, 1)")
        require(0 <= self.max_bad_fraction < 1, "corpus.max_bad_fraction", self.max_bad_fraction, "in [0, 1)")
        require(self.val_tokens > 0, "corpus.val_tokens", self.val_tokens, ">= 1")
        require(self.documents_per_member > 0, "corpus.documents_per_member", self.documents_per_member, ">= 1")
        require(self.shard_tokens > 0, "corpus.shard_tokens", self.shard_tokens, ">= 1")
        require(self.build in BUILDS, "corpus.build", self.build, " | ".join(BUILDS))
        require(
            not self.shuffle_in_tasks or self.build == TASKS,
            "corpus.shuffle_in_tasks",
            self.shuffle_in_tasks,
            f"false with corpus.build={self.build}: set corpus.build={TASKS}",
        )
        require(
            self.build == TASKS or self.cleaning.near_duplicates_by == DOCUMENT,
            "corpus.cleaning.near_duplicates_by",
            self.cleaning.near_duplicates_by,
            f"{DOCUMENT} with corpus.build={self.build}: set corpus.build={TASKS} to compare repositories",
        )


@dataclass
class TokenizerConfig:
    """Origin and pieces of the tokenizer. `tokenizer=keep` on the command line is short for `tokenizer.source=keep`."""

    # train (SentencePiece BPE on the texts of all corpora) | keep (the one in the work directory, whatever the corpora
    # hold) | the path of a tokenizer.model of SentencePiece, a tokenizer.json of Hugging Face, or a folder with one |
    # hf:FOLDER or hf:ID, that of a model of transformers
    source: str = TRAIN
    # layout of conversations: given (that of an imported model, if it differs from ours) | ours
    chat_template: str = "given"
    add_marks: bool = False  # append the marks that an existing tokenizer lacks; false: they are plain text
    vocab_size: int = MISSING  # pieces, special ones included; of an existing tokenizer, what it has
    train_bytes: int = 200_000_000  # text sampled for training; the same share of every language
    # no piece of a trained tokenizer holds both letters and punctuation; null: true
    split_by_unicode_script: bool | None = None
    max_piece_length: int | None = None  # characters of a piece of a trained tokenizer; null: 16
    workers: int = 0  # processes that encode; 0: all cores

    def __post_init__(self) -> None:
        require(bool(self.source), "tokenizer", self.source, "train, keep or a path")

        # Pieces are learned with these keys; an existing tokenizer has its pieces already.
        require(
            self.max_piece_length is None or 16 <= self.max_piece_length <= 512,
            "tokenizer.max_piece_length",
            self.max_piece_length,
            "from 16 to 512 characters, or null",
        )
        for key in ("split_by_unicode_script", "max_piece_length"):
            require(
                self.source == TRAIN or getattr(self, key) is None,
                f"tokenizer.{key}",
                getattr(self, key),
                f"null with tokenizer={self.source}: only tokenizer=train learns pieces",
            )

        require(
            self.vocab_size >= 512 or self.source != TRAIN,
            "tokenizer.vocab_size",
            self.vocab_size,
            "at least 512 (256 byte pieces and special tokens)",
        )
        require(
            not self.add_marks or self.is_given,
            "tokenizer.add_marks",
            self.add_marks,
            f"false with tokenizer={self.source}: only tokenizer=PATH can append marks",
        )

        templates = ("given", "ours")
        require(self.chat_template in templates, "tokenizer.chat_template", self.chat_template, " or ".join(templates))
        require(self.train_bytes > 0, "tokenizer.train_bytes", self.train_bytes, "a positive number of bytes")
        require(self.workers >= 0, "tokenizer.workers", self.workers, "0 (all cores) or a positive integer")

    @property
    def is_given(self) -> bool:
        """Whether `source` names an existing tokenizer by its path."""
        return self.source not in (TRAIN, KEEP)

    @property
    def learned_as(self) -> dict[str, bool | int]:
        """The keys that decide which pieces training may learn, with the defaults in place of null."""
        return {
            "split_by_unicode_script": self.split_by_unicode_script is not False,
            "max_piece_length": self.max_piece_length or 16,
        }
