"""Readers: functions that yield the documents of one source of a corpus, and the traits that they declare.

A corpus file names the readers of this package (`reader: hub`), or any function by its import path. A reader of your
own:

    from dist_lm.data.sources.reader import Candidate, reader, text_hash

    @reader(form="text", keys=("language", "licence", "dataset"))
    def read_notes(source: SourceConfig, seed: int) -> Iterator[Candidate]:
        for path in sorted(Path(source.dataset).glob("*.txt")):
            text = path.read_text(encoding="utf-8")
            yield Document(text, source.language, path.name, source.licence, group=text_hash(text))

and its source in `conf/corpus/NAME.yaml`:

    - {reader: "my_package.my_module:read_notes", language: english, dataset: /data/notes}

The same source and seed must give the same documents in the same order. `Document.group` decides between train and
val: documents that share text get one group; an empty group is the hash of the text alone. A reader declares the keys
of a source that it takes: any other key is refused, so no key is ignored.

A build reads a source several times. A reader that declares `inputs` and `takes_files=True` gets the `Snapshot` of its
files, and what changes in between is told by file (`dist_lm.data.sources.snapshot`). Of any other reader the documents
of every reading are compared.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, TypeVar, get_args

from dist_lm.config.corpus import CorpusConfig, SourceConfig
from dist_lm.config.root import imported_function
from dist_lm.document import Document, Form
from dist_lm.errors import ConfigError

if TYPE_CHECKING:
    from dist_lm.data.inputs import Inputs

# Name -> form of its documents, and import path: a reader is imported only when its corpus is fingerprinted or read.
READERS: dict[str, tuple[Form, str]] = {
    "files": ("text", "dist_lm.data.sources.files:read_files"),
    "jsonl": ("text", "dist_lm.data.sources.rows:read_jsonl"),
    "parquet": ("text", "dist_lm.data.sources.rows:read_parquet"),
    "csv": ("text", "dist_lm.data.sources.rows:read_csv"),
    "arrow": ("text", "dist_lm.data.sources.rows:read_arrow"),
    "messages": ("conversation", "dist_lm.data.sources.messages:read_messages"),
    "tars": ("text", "dist_lm.data.sources.tars:read_tars"),
    "hub": ("text", "dist_lm.data.sources.hub:read_hub"),
    "tools": ("conversation", "dist_lm.data.sources.tools:read_tools"),
    "hub_tools": ("conversation", "dist_lm.data.sources.tools:read_hub_tools"),
    "preferences": ("ranking", "dist_lm.data.sources.preferences:read_preferences"),
    "rankings": ("ranking", "dist_lm.data.sources.rankings:read_local_rankings"),
    "hub_rankings": ("ranking", "dist_lm.data.sources.hub_rankings:read_hub_rankings"),
    "synthetic_rankings": ("ranking", "dist_lm.data.sources.rankings:read_synthetic_rankings"),
}
COMMON = ("reader", "limit", "held_out")  # keys of every source


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row or file that gives no document. The manifest counts it under its reason."""

    language: str
    source: str  # file and line or row
    reason: str  # one word, such as invalid_utf8 or unreadable
    error: str = ""  # the problem of a broken row, for people; not empty: it counts for corpus.max_bad_fraction


Candidate = Document | Rejected
Reader = Callable[..., Iterator[Candidate]]  # takes a source and a seed, and files if its traits say so
AnyReader = TypeVar("AnyReader", bound=Reader)


@dataclass(frozen=True)  # no slots: `reader` takes the defaults from the class
class Traits:
    """The properties of a reader that stages must know."""

    form: Form = "text"
    seeded: bool = False  # the documents depend on the seed: a corpus of another seed is refused
    revision: int = 0  # one more with every change to generated documents: a corpus of another revision is refused
    keys: tuple[str, ...] = ("language", "licence")  # keys of a source that the reader takes, beside `COMMON`
    needs: tuple[str, ...] = ("language",)  # keys that must be given; `a|b`: one of them
    inputs: "Callable[[SourceConfig], Inputs] | None" = None  # lists the files that it reads; None: it reads no files
    # It takes a third argument, the `Snapshot` of its files, and reads them through it.
    takes_files: bool = False
    # the way out in the error for a source without documents
    advice: str = "remove the source from the corpus file, or take the data sets of corpus=hub"


def reader(
    form: Form = "text",
    *,
    seeded: bool = False,
    revision: int = 0,
    keys: tuple[str, ...] = Traits.keys,
    needs: tuple[str, ...] = Traits.needs,
    inputs: "Callable[[SourceConfig], Inputs] | None" = None,
    takes_files: bool = False,
    advice: str = Traits.advice,
) -> Callable[[AnyReader], AnyReader]:
    """Returns a decorator that declares the traits of a reader: it sets `traits` of the function, and returns it.

    Arguments: as in `Traits`. A function without this decorator has the defaults.
    """

    def declare(function: AnyReader) -> AnyReader:
        function.traits = Traits(  # type: ignore[attr-defined]
            form, seeded, revision, keys, needs, inputs, takes_files, advice
        )
        return function

    return declare


def traits_of(function: Reader) -> Traits:
    """Returns the traits that a reader was declared with."""
    return getattr(function, "traits", Traits())


def reader_of(source: SourceConfig) -> Reader:
    """Imports and returns the function that `source.reader` names, after the keys of the source are checked.

    Raises:
        ConfigError: there is no reader of this name, the import path does not lead to a function, or the source has a
            key that the reader does not take, or lacks one that it needs.
    """
    function = _imported(source)
    check_keys(source, traits_of(function))
    return function


def source_traits(source: SourceConfig) -> Traits:
    """Returns the traits of the reader that `source` names.

    Raises:
        ConfigError: as `reader_of`.
    """
    return traits_of(reader_of(source))


def source_form(source: SourceConfig) -> Form:
    """Returns the form of the documents of a source. Only a reader that is named by its import path is imported.

    Raises:
        ConfigError: there is no such reader, or it cannot be imported.
    """
    # The form of our own readers is in the table, so that a plan imports none of them.
    if ":" in source.reader:
        return traits_of(_imported(source)).form
    return _named_reader(source)[0]


def check_keys(source: SourceConfig, traits: Traits) -> None:
    """Refuses a key that the reader does not take, and the lack of a key that it needs; returns nothing.

    A key with an empty value (None, "", [] or 0) counts as not set.

    Raises:
        ConfigError: names the key that is not taken, or those that are missing, and the keys that the reader takes.
    """
    # Keys with these values were not set.
    keys = [field.name for field in fields(source) if getattr(source, field.name) not in (None, "", [], 0)]
    takes = f"it takes {', '.join((*COMMON, *traits.keys))}"
    for key in keys:
        if key not in (*COMMON, *traits.keys):
            hint = ""
            if ":" in source.reader:
                hint = " (a function declares its keys with @reader(keys=...))"
            raise ConfigError(
                f"corpus source reader={source.reader}: {key}={getattr(source, key)}: this reader does not take "
                f"{key}; {takes}{hint}"
            )

    if missing := [need.replace("|", " or ") for need in traits.needs if not set(need.split("|")) & {*keys}]:
        words = f"{', and '.join(missing)} {'are' if len(missing) > 1 else 'is'} missing"
        raise ConfigError(f"corpus source reader={source.reader}: {words}; {takes}")


def text_hash(text: str) -> str:
    """Returns the hexadecimal SHA-256 of a text, the same for every kind of line end.

    Raises:
        UnicodeEncodeError: the text is not valid Unicode (a lone surrogate).
    """
    unified = text.replace("\r\n", "\n").replace("\r", "\n")
    return hashlib.sha256(unified.encode()).hexdigest()


def _named_reader(source: SourceConfig) -> tuple[Form, str]:
    """Returns the form and the import path of a reader of this package.

    Raises:
        ConfigError: there is no reader of this name.
    """
    if source.reader not in READERS:
        raise ConfigError(
            f"corpus source: reader={source.reader}: expected one of {', '.join(sorted(READERS))}, or the import path "
            "of a function such as my_package.my_module:read_notes"
        )
    return READERS[source.reader]


def _imported(source: SourceConfig) -> Reader:
    path = source.reader
    if ":" not in path:
        _, path = _named_reader(source)
    return imported_function(path, "corpus source: reader")


def corpus_sources(config: CorpusConfig, corpus_name: str) -> list[SourceConfig]:
    """Returns the sources of one corpus. Readers that are named by an import path are imported.

    Raises:
        ConfigError: there is no such corpus or reader, or the readers give documents of several forms.
    """
    sources = config.corpora.get(corpus_name)
    if not sources:
        names = ", ".join(sorted(config.corpora)) or "none"
        problem = "has no sources" if corpus_name in config.corpora else "does not exist"
        raise ConfigError(f"corpus {corpus_name} {problem} in corpus={config.name}: the corpora there are {names}")

    # Stages read texts, conversations and rankings differently, so a corpus has one form.
    source_forms = {source_form(source) for source in sources}
    forms = [form for form in get_args(Form) if form in source_forms]
    if len(forms) > 1:
        raise ConfigError(
            f"corpus {corpus_name}: readers {', '.join(source.reader for source in sources)} give "
            f"{' and '.join(f'{form}s' for form in forms)}: put each kind into a corpus of its own"
        )
    return list(sources)


def form_of(config: CorpusConfig, corpus_name: str) -> Form:
    """Returns the form of the documents of a corpus.

    Raises:
        ConfigError: as `corpus_sources`.
    """
    return source_form(corpus_sources(config, corpus_name)[0])


def corpora_of_form(config: CorpusConfig, form: Form) -> list[str]:
    """Lists the corpora whose documents are of this form.

    Raises:
        ConfigError: as `corpus_sources`.
    """
    return [name for name in config.corpora if form_of(config, name) == form]


def tokenizer_corpora(config: CorpusConfig) -> list[str]:
    """Lists the corpora that the tokenizer is trained on: those of texts, or of conversations if there is no text.

    Raises:
        ConfigError: as `corpus_sources`.
    """
    return text_corpora(config) or corpora_of_form(config, "conversation")


def text_corpora(config: CorpusConfig) -> list[str]:
    """Lists the corpora of texts.

    Raises:
        ConfigError: as `corpus_sources`.
    """
    return corpora_of_form(config, "text")
