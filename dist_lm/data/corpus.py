"""From sources to a corpus: documents without duplicates, each in train or val, and a report on everything read.

The hash of a document's group decides between train and val; the document's position and the seed do not. So every
corpus puts a text on the same side, and a corpus that grows keeps its sides. A val document that train documents of
any corpus of this machine mostly contain is dropped.

A corpus holds texts, or conversations, or rankings. Conversations share their forms, so shared words say nothing
about leakage: their group is the tools that they are about, and the group of a ranking is its prompt.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TextIO, get_args

from dist_lm.config.corpus import CorpusConfig, SourceConfig
from dist_lm.data.sources.reader import Candidate, Rejected, reader_of, source_form, source_traits, text_hash
from dist_lm.data.sources.row_errors import RowErrors
from dist_lm.document import Document, Form
from dist_lm.errors import ArtefactError, ConfigError

EXAMPLES = 20  # sources named in a report
WINDOW = 8  # words
MAX_SHARE = 0.5  # of the windows of a val text may be in train texts


@dataclass
class LanguageReport:
    """What became of everything that was read in one language, in documents unless said."""

    seen: int = 0  # kept and dropped
    kept: int = 0
    # reason -> documents: duplicate, empty, too_long (`max_document_bytes`), overlapping (a val document that train
    # documents contain), and the reasons of readers
    dropped: dict[str, int] = field(default_factory=dict)
    documents: dict[str, int] = field(default_factory=lambda: {"train": 0, "val": 0})
    bytes: dict[str, int] = field(default_factory=lambda: {"train": 0, "val": 0})  # UTF-8


@dataclass
class IngestReport:
    """The counts of every language, and the first sources that were dropped, with the reason."""

    languages: dict[str, LanguageReport] = field(default_factory=dict)
    rejected: list[str] = field(default_factory=list)

    def language(self, name: str) -> LanguageReport:
        return self.languages.setdefault(name, LanguageReport())

    def reject(self, language: str, source: str, reason: str) -> None:
        """Count one item that is dropped."""
        counts = self.language(language)
        counts.seen += 1
        counts.dropped[reason] = counts.dropped.get(reason, 0) + 1
        if reason not in ("duplicate", "empty") and len(self.rejected) < EXAMPLES:
            self.rejected.append(f"{source}: {reason}")

    def keep(self, document: Document, split: str, n_bytes: int) -> None:
        """Count one document that is kept."""
        counts = self.language(document.language)
        counts.seen += 1
        counts.kept += 1
        counts.documents[split] += 1
        counts.bytes[split] += n_bytes


@dataclass(frozen=True)
class LocalText:
    """Everything that the sources of text on this machine gave, for all corpora at once."""

    candidates: dict[str, list[Candidate]]  # by the `repr` of their source
    leaked: set[str]  # hashes of val texts that train documents contain

    @classmethod
    def read(cls, config: CorpusConfig, seed: int) -> "LocalText":
        """Read every source of every corpus of texts once, apart from streamed ones."""
        sources = [source for name in text_corpora(config) for source in corpus_sources(config, name)]
        local = {repr(source): source for source in sources if not source_traits(source).streamed}
        candidates = {key: list(reader_of(source)(source, seed)) for key, source in local.items()}
        sides: dict[str, list[str]] = {"train": [], "val": []}
        for candidate in chain.from_iterable(candidates.values()):
            if isinstance(candidate, Document):
                sides[split_of(candidate.group, config.val_fraction)].append(candidate.text)
        leaked = {text_hash(sides["val"][i]) for i in seen_texts(sides["val"], sides["train"])}
        return cls(candidates, leaked)


def read_corpus(
    config: CorpusConfig,
    corpus_name: str,
    seed: int,
    report: IngestReport,
    local: LocalText | None = None,
    rejected: TextIO | None = None,
) -> Iterator[tuple[str, Document]]:
    """`(split, document)` of every document of a corpus, source by source; `split` is train or val.

    16 bytes of hash of every kept text stay in memory, to find duplicates.

    Args:
        seed: decides the text of generated sources and nothing else.
        local: what `LocalText.read` gave for the same config and seed, to read once for several corpora.
        rejected: gets a line of JSON for each broken row.

    Raises:
        ConfigError: the corpus or a reader does not exist, or a reader yields something else than documents.
        ArtefactError: a source gives no document, too many of its rows are broken, or no document is held out for val.
    """
    sources = corpus_sources(config, corpus_name)
    local = local or LocalText.read(config, seed)
    texts: set[bytes] = set()
    splits: Counter[str] = Counter()
    for source in sources:
        known = local.candidates.get(repr(source))
        candidates = reader_of(source)(source, seed) if known is None else iter(known)
        n_source = 0
        errors = RowErrors(source, config.max_bad_fraction, rejected)
        for candidate in errors.counted(candidates):
            accepted = _accept(_checked(candidate, source), config, texts, local.leaked, report)
            if accepted is None:
                continue
            yield accepted
            splits[accepted[0]] += 1
            n_source += 1
            if n_source == source.limit:
                break
        errors.check()
        if n_source == 0:
            place = f"dataset={source.dataset}" if source.dataset else f"path={', '.join(source.path or [])}"
            dataset = f" of {place}" if source.dataset or source.path else ""
            raise ArtefactError(
                f"corpus {corpus_name}: reader={source.reader} gave no document{dataset}: "
                f"{source_traits(source).advice} (corpus={config.name})"
            )
    if not splits["val"]:
        raise ArtefactError(
            f"corpus {corpus_name}: none of its {splits.total()} documents is held out at "
            f"corpus.val_fraction={config.val_fraction}: raise it, or the limit of the sources"
        )


def corpus_sources(config: CorpusConfig, corpus_name: str) -> list[SourceConfig]:
    """The sources of one corpus.

    Raises:
        ConfigError: there is no such corpus or reader, or the readers give documents of several forms.
    """
    sources = config.corpora.get(corpus_name)
    if not sources:
        there = ", ".join(sorted(config.corpora)) or "none"
        problem = "has no sources" if corpus_name in config.corpora else "does not exist"
        raise ConfigError(f"corpus {corpus_name} {problem} in corpus={config.name}: the corpora there are {there}")
    found = {source_form(source) for source in sources}
    forms = [form for form in get_args(Form) if form in found]
    if len(forms) > 1:
        raise ConfigError(
            f"corpus {corpus_name}: readers {', '.join(source.reader for source in sources)} give "
            f"{' and '.join(f'{form}s' for form in forms)}: put each kind into a corpus of its own"
        )
    return list(sources)


def form_of(config: CorpusConfig, corpus_name: str) -> Form:
    """What the documents of a corpus are."""
    return source_form(corpus_sources(config, corpus_name)[0])


def corpora_of_form(config: CorpusConfig, form: Form) -> list[str]:
    """The names of the corpora whose documents are of this form."""
    return [name for name in config.corpora if form_of(config, name) == form]


def text_corpora(config: CorpusConfig) -> list[str]:
    """The names of the corpora of texts: the tokenizer is trained on them."""
    return corpora_of_form(config, "text")


def split_of(group: str, val_fraction: float) -> str:
    """The side of a group: its hash as a number in [0, 1), held out below `val_fraction`."""
    return "val" if int(group[:16], 16) / 2**64 < val_fraction else "train"


def seen_texts(held_out: Sequence[str], trained: Iterable[str]) -> set[int]:
    """Indices of the texts in `held_out` of which `trained` contains more than half, whatever the indentation.

    A text counts by its windows of eight words. A text that stands whole inside a trained text is always found: at
    most its first and last window, whose outer words may be cut, do not match. A text below 16 words is too short for
    windows and is searched letter by letter.
    """
    windows = [list(_windows(text)) for text in held_out]
    wanted = set(chain.from_iterable(windows))
    short = {i: text.strip() for i, text in enumerate(held_out) if len(text.split()) < 2 * WINDOW}
    found: set[tuple[str, ...]] = set()
    inside: set[int] = set()
    for text in trained:
        found |= wanted.intersection(_windows(text))
        inside |= {i for i, part in short.items() if part in text}
    return inside | {i for i, own in enumerate(windows) if sum(w in found for w in own) > MAX_SHARE * len(own)}


def _windows(text: str) -> Iterable[tuple[str, ...]]:
    words = text.split()
    return zip(*(islice(words, start, None) for start in range(WINDOW)), strict=False)


def _checked(candidate: object, source: SourceConfig) -> Candidate:
    """What a reader yielded, if it is a document of the reader's form."""
    form = source_form(source)
    if isinstance(candidate, Rejected) or (isinstance(candidate, Document) and candidate.form == form):
        return candidate
    found = f"a {candidate.form}" if isinstance(candidate, Document) else f"a value of type {type(candidate).__name__}"
    raise ConfigError(
        f"corpus source: reader={source.reader} yielded {found}: expected Document(form={form!r}) or Rejected"
    )


def _accept(
    candidate: Candidate, config: CorpusConfig, texts: set[bytes], leaked: set[str], report: IngestReport
) -> tuple[str, Document] | None:
    """`(split, document)`, or None for a dropped item; both are counted. `texts`: hashes of the kept texts."""
    if isinstance(candidate, Rejected):
        report.reject(candidate.language, candidate.source, candidate.reason)
        return None
    n_bytes = len(candidate.text.encode())
    name = text_hash(candidate.text)
    key = bytes.fromhex(name)[:16]
    split = split_of(candidate.group, config.val_fraction)
    dropped = {
        "empty": not candidate.text.strip(),
        "too_long": n_bytes > config.max_document_bytes,
        "duplicate": key in texts,
        "overlapping": split == "val" and name in leaked,
    }
    for reason, applies in dropped.items():
        if applies:
            report.reject(candidate.language, candidate.source, reason)
            return None
    texts.add(key)  # not before: the same text may come again, in a group that train keeps
    report.keep(candidate, split, n_bytes)
    return split, candidate
