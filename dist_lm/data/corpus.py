"""From sources to a corpus: documents without duplicates, each in train or val, and a report of the rest.

A document is in val because of the hash of its group, never because of its place or of the seed. So every
corpus puts a text on the same side, and one that grows keeps its sides. A val document that can mostly be
read in train documents of any corpus of this machine is dropped.

A corpus holds texts, or conversations, or rankings. Conversations are all made from the same few forms, so sharing
words says nothing: what keeps val apart is their group, the tools they are about. That of a ranking is its prompt.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any, get_args

from dist_lm.config.corpus import CorpusConfig, SourceConfig
from dist_lm.data.overlap import seen_texts
from dist_lm.data.sources import FORMS, READERS
from dist_lm.data.sources.candidate import Candidate, Rejected, text_hash
from dist_lm.document import Document, Form
from dist_lm.errors import ArtefactError, ConfigError

EXAMPLES = 20  # sources named in a report


@dataclass
class LanguageReport:
    """What became of everything that was read in one language, in documents unless said."""

    seen: int = 0  # kept and all the others
    kept: int = 0
    duplicate: int = 0  # the same text came before
    empty: int = 0
    invalid_utf8: int = 0
    too_long: int = 0  # more than `max_document_bytes`
    overlapping: int = 0  # would be val, but train holds most of it
    unreadable: int = 0  # the file may not be read
    unparsable: int = 0  # a Python file whose docstrings cannot be found
    invalid_sql: int = 0  # generated, but refused by the SQLite of this machine
    invalid_calls: int = 0  # a row of a data set that makes no conversation
    no_ranking: int = 0  # a row of a data set, or samples, that hold no comparison
    documents: dict[str, int] = field(default_factory=lambda: {"train": 0, "val": 0})
    bytes: dict[str, int] = field(default_factory=lambda: {"train": 0, "val": 0})  # UTF-8


@dataclass
class IngestReport:
    """The same for every language, and the first sources that gave nothing, with the reason."""

    languages: dict[str, LanguageReport] = field(default_factory=dict)
    rejected: list[str] = field(default_factory=list)

    def language(self, name: str) -> LanguageReport:
        return self.languages.setdefault(name, LanguageReport())

    def reject(self, language: str, source: str, reason: str) -> None:
        """Count one thing read that is not kept. `reason` is the name of a counter."""
        counts = self.language(language)
        counts.seen += 1
        setattr(counts, reason, getattr(counts, reason) + 1)
        if reason not in ("duplicate", "empty") and len(self.rejected) < EXAMPLES:
            self.rejected.append(f"{source}: {reason}")

    def keep(self, document: Document, split: str, n_bytes: int) -> None:
        counts = self.language(document.language)
        counts.seen += 1
        counts.kept += 1
        counts.documents[split] += 1
        counts.bytes[split] += n_bytes

    def as_dict(self) -> dict[str, Any]:
        """`{languages: {name: counts}, rejected: [...]}`, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class LocalText:
    """Everything that the sources of text on this machine gave, for all corpora at once."""

    candidates: dict[str, list[Candidate]]  # by the `repr` of their source
    leaked: set[str]  # hashes of texts that would be val while train documents hold most of them

    @classmethod
    def read(cls, config: CorpusConfig, seed: int) -> "LocalText":
        """Read every source of every corpus of texts once, but not those of the hub: they are streamed."""
        sources = [source for name in text_corpora(config) for source in corpus_sources(config, name)]
        local = {repr(source): source for source in sources if source.reader != "hub"}
        candidates = {key: list(READERS[source.reader](source, seed)) for key, source in local.items()}
        sides: dict[str, list[str]] = {"train": [], "val": []}
        for candidate in chain.from_iterable(candidates.values()):
            if isinstance(candidate, Document):
                sides[split_of(candidate.group, config.val_fraction)].append(candidate.text)
        leaked = {text_hash(sides["val"][i]) for i in seen_texts(sides["val"], sides["train"])}
        return cls(candidates, leaked)


def read_corpus(
    config: CorpusConfig, corpus_name: str, seed: int, report: IngestReport, local: LocalText | None = None
) -> Iterator[tuple[str, Document]]:
    """`(split, document)` of every document of a corpus, source by source; `split` is train or val.

    `seed` decides the text of generated sources and nothing else. `local`: what `LocalText.read` gave for the
    same config and seed, to read once for several corpora. Of a kept text 16 bytes of hash stay in memory, to
    find duplicates.

    Raises ConfigError for a corpus or reader that does not exist, ArtefactError for a source that gives no
    document, or a corpus without a val document.
    """
    sources = corpus_sources(config, corpus_name)
    local = local or LocalText.read(config, seed)
    texts: set[bytes] = set()
    splits: Counter[str] = Counter()
    for source in sources:
        known = local.candidates.get(repr(source))
        candidates = READERS[source.reader](source, seed) if known is None else iter(known)
        n_source = 0
        for candidate in candidates:
            accepted = _accept(candidate, config, texts, local.leaked, report)
            if accepted is None:
                continue
            yield accepted
            splits[accepted[0]] += 1
            n_source += 1
            if n_source == source.limit:
                break
        if n_source == 0:
            raise ArtefactError(_nothing(config, corpus_name, source))
    if not splits["val"]:
        raise ArtefactError(
            f"corpus {corpus_name}: none of its {splits.total()} documents is held out at "
            f"corpus.val_fraction={config.val_fraction}: raise it, or the limit of the sources"
        )


def corpus_sources(config: CorpusConfig, corpus_name: str) -> list[SourceConfig]:
    """The sources of one corpus, checked."""
    sources = config.corpora.get(corpus_name)
    if not sources:
        there = ", ".join(sorted(config.corpora)) or "none"
        problem = "has no sources" if corpus_name in config.corpora else "does not exist"
        raise ConfigError(f"corpus {corpus_name} {problem} in corpus={config.name}: the corpora there are {there}")
    for source in sources:
        if source.reader not in READERS:
            raise ConfigError(
                f"corpus {corpus_name}: reader={source.reader}: expected one of {', '.join(sorted(READERS))}"
            )
    found = {FORMS[source.reader] for source in sources}
    forms = [form for form in get_args(Form) if form in found]
    if len(forms) > 1:
        raise ConfigError(
            f"corpus {corpus_name}: readers {', '.join(source.reader for source in sources)} give "
            f"{' and '.join(f'{form}s' for form in forms)}: put each kind into a corpus of its own"
        )
    return list(sources)


def form_of(config: CorpusConfig, corpus_name: str) -> Form:
    """What the documents of a corpus are."""
    return FORMS[corpus_sources(config, corpus_name)[0].reader]


def corpora_of_form(config: CorpusConfig, form: Form) -> list[str]:
    """The names of the corpora whose documents are of this form."""
    return [name for name in config.corpora if form_of(config, name) == form]


def text_corpora(config: CorpusConfig) -> list[str]:
    """The names of the corpora that are made of texts: what the tokenizer is trained on."""
    return corpora_of_form(config, "text")


def split_of(group: str, val_fraction: float) -> str:
    """The side of a group: its hash as a number in [0, 1), held out below `val_fraction`."""
    return "val" if int(group[:16], 16) / 2**64 < val_fraction else "train"


def _accept(
    candidate: Candidate, config: CorpusConfig, texts: set[bytes], leaked: set[str], report: IngestReport
) -> tuple[str, Document] | None:
    """`(split, document)`, or None for what is not kept; counted either way. `texts`: hashes of the kept."""
    if isinstance(candidate, Rejected):
        report.reject(candidate.language, candidate.source, candidate.reason)
        return None
    text, language = candidate.text, candidate.language
    n_bytes = len(text.encode())
    if not text.strip():
        report.reject(language, candidate.source, "empty")
        return None
    if n_bytes > config.max_document_bytes:
        report.reject(language, candidate.source, "too_long")
        return None
    name = text_hash(text)
    key = bytes.fromhex(name)[:16]
    if key in texts:
        report.reject(language, candidate.source, "duplicate")
        return None
    split = split_of(candidate.group, config.val_fraction)
    if split == "val" and name in leaked:
        report.reject(language, candidate.source, "overlapping")
        return None
    texts.add(key)  # not before: the same text may come again, in a group that train keeps
    report.keep(candidate, split, n_bytes)
    return split, candidate


def _nothing(config: CorpusConfig, corpus_name: str, source: SourceConfig) -> str:
    """Why a source without documents stops the run, and the way out."""
    if source.reader in ("hub_rankings", "rankings"):
        return (
            f"corpus {corpus_name}: no row of dataset={source.dataset} makes a ranking: check dataset, and of a "
            f"hub's also split and rows, in corpus.corpora.{corpus_name}"
        )
    if source.reader == "synthetic_rankings":
        return (
            f"corpus {corpus_name}: no two samples of the model differ by the rules of reader=synthetic_rankings: "
            "train the stage before for longer, or take another source of rankings"
        )
    if source.reader == "hub_tools":
        return (
            f"corpus {corpus_name}: no row of dataset={source.dataset} makes a conversation: check dataset and split "
            f"in conf/corpus/{config.name}.yaml"
        )
    if source.reader == "hub":
        return (
            f"corpus {corpus_name}: no document in column={source.column} of dataset={source.dataset}: check "
            f"dataset, split and column in conf/corpus/{config.name}.yaml"
        )
    return (
        f"corpus {corpus_name}: reader={source.reader} found no document on this machine: remove that source "
        f"from conf/corpus/{config.name}.yaml, or take the data sets of corpus=hub"
    )
