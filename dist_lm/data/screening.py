"""Checks and counts the documents of a corpus before they are divided into train and val; bad and equal ones drop out.

No text is changed here: `data.cleaning` decides which texts are dropped, and `ingest.cleaned` replaces secrets later.

The stream depends on the configuration, the seed and the inputs alone. It is read several times (`data.ingest`), and
each time gives the same documents in the same order: inputs that change in between are an error.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self, TextIO

from dist_lm.config.corpus import CorpusConfig, SourceConfig
from dist_lm.data.cleaning import reason_to_drop
from dist_lm.data.inputs import Inputs, changes
from dist_lm.data.sources.reader import Candidate, Rejected, corpus_sources, reader_of, source_form, source_traits
from dist_lm.data.sources.snapshot import Snapshot
from dist_lm.document import Document
from dist_lm.errors import ArtefactError, ChangedInputError, ConfigError

GROUP = re.compile(r"[0-9a-fA-F]{16}")  # its first digits decide the split
EXAMPLES = 20  # sources named in a report
NAMED = 3  # broken rows that a message names
HOPELESS = 1000  # broken rows after which a source that is mostly broken ends
LANGUAGES = 256  # most of a corpus: a document has a byte for its language
CACHED_CHARACTERS = 64_000_000  # sum of small sources, which stay in memory and are read once

# Why documents were dropped -> what to do if a source has no other
WAYS_OUT = {
    "too_long": "divide the documents, or raise corpus.max_document_bytes",
    "compressed": "7z files are not read, and .zip, .xz and .bz2 only with their suffix: unpack or rename them",
    "duplicate": "equal texts stay in the corpus: remove the source",
}


@dataclass
class Tally:
    """Counts of the documents that were read of one language or source."""

    seen: int = 0  # kept and dropped
    kept: int = 0
    # reason -> documents. Reasons: duplicate, near_duplicate, benchmark FILE, empty, too_long (`max_document_bytes`),
    # not_unicode, overlapping (train documents contain the val document), contains_val (the train document contains one
    # of `held_out`), and those of cleaning and readers.
    dropped: dict[str, int] = field(default_factory=dict)
    replaced: dict[str, int] = field(default_factory=dict)  # placeholder -> secrets or addresses in kept documents
    documents: dict[str, int] = field(default_factory=lambda: {"train": 0, "val": 0})
    bytes: dict[str, int] = field(default_factory=lambda: {"train": 0, "val": 0})  # UTF-8

    def drop(self, reason: str) -> None:
        """Counts a dropped document."""
        self.seen += 1
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def keep(self, split: str, n_bytes: int, replaced: Mapping[str, int]) -> None:
        """Counts a document that goes into `split`; `replaced`: placeholder -> times."""
        self.seen += 1
        self.kept += 1
        self.documents[split] += 1
        self.bytes[split] += n_bytes
        for placeholder, times in replaced.items():
            self.replaced[placeholder] = self.replaced.get(placeholder, 0) + times

    def add(self, other: Self) -> None:
        """Adds the counts of other documents."""
        self.seen += other.seen
        self.kept += other.kept
        for totals, counts in (
            (self.dropped, other.dropped),
            (self.replaced, other.replaced),
            (self.documents, other.documents),
            (self.bytes, other.bytes),
        ):
            for name, count in counts.items():
                totals[name] = totals.get(name, 0) + count


@dataclass
class IngestReport:
    """The counts of every language and source, and the first items that were dropped, with the reason."""

    languages: dict[str, Tally] = field(default_factory=dict)
    sources: dict[str, Tally] = field(default_factory=dict)
    rejected: list[str] = field(default_factory=list)

    def reject(self, candidate: Candidate, source: SourceConfig, reason: str) -> None:
        """Counts one item that is dropped."""
        for tally in self._tallies(candidate, source):
            tally.drop(reason)
        if reason not in ("duplicate", "empty") and len(self.rejected) < EXAMPLES:
            self.rejected.append(f"{candidate.source}: {reason}")

    def keep(self, record: "Screened", split: str, replaced: Mapping[str, int]) -> None:
        """Counts one document that is kept; `replaced`: placeholder -> times."""
        for tally in self._tallies(record.document, record.source_config):
            tally.keep(split, record.n_bytes, replaced)

    def add(self, other: "IngestReport") -> None:
        """Adds the counts of documents that were read elsewhere, after those of this report."""
        for totals, tallies in ((self.languages, other.languages), (self.sources, other.sources)):
            for name, tally in tallies.items():
                totals.setdefault(name, Tally()).add(tally)
        self.rejected = [*self.rejected, *other.rejected][:EXAMPLES]

    @classmethod
    def from_json(cls, report: Mapping[str, Any]) -> Self:
        """Inverts `asdict`.

        Raises:
            KeyError, TypeError: a field is missing or unknown.
        """
        languages, sources = (
            {name: Tally(**tally) for name, tally in report[key].items()} for key in ("languages", "sources")
        )
        return cls(languages, sources, list(report["rejected"]))

    def _tallies(self, candidate: Candidate, source: SourceConfig) -> tuple[Tally, Tally]:
        """Returns the tallies of the language and of the source, which begin empty."""
        language, name = candidate.language, source_name(source)
        if language not in self.languages:
            self.languages[language] = Tally()
        if name not in self.sources:
            self.sources[name] = Tally()
        return self.languages[language], self.sources[name]


class Screened(NamedTuple):
    """A document as the checks see it, with its hashes and its size; `screened` yields those that pass."""

    document: Document
    source_config: SourceConfig
    key: bytes  # hash of the text
    group: str  # hexadecimal hash that decides between train and val
    n_bytes: int  # UTF-8


class SourceReader:
    """Reads the sources of one configuration. Small ones stay in memory, so generated text is generated once."""

    def __init__(self, seed: int, preloaded: dict[str, list[Candidate]] | None = None) -> None:
        """`preloaded`: `repr` of a source -> its candidates, for sources that are not read."""
        self._seed = seed
        self._cache = dict(preloaded or {})
        self._snapshots: dict[str, Snapshot] = {}  # `repr` of a source -> its files
        self._documents: dict[tuple[str, int], bytes] = {}  # (corpus, number of a source) -> hash of its documents
        self.room = CACHED_CHARACTERS

    def read(self, source: SourceConfig) -> Iterator[Candidate]:
        """Yields everything that a source gives, broken rows included (`Rejected`), in its order.

        A source that was read to its end stays in memory while there is room (`CACHED_CHARACTERS` for all sources);
        later calls do not read it again. If it is read again, its files must be as they were listed. Sources in
        `preloaded` are never read.

        Raises:
            ChangedInputError: they are not; the message names the file.
            ConfigError: the reader does not exist, does not take a key of the source, or yields something else than
                documents of its form. What the reader raises passes, an ArtefactError above all.
        """
        name = repr(source)
        if name in self._cache:
            yield from self._cache[name]
            return

        candidates: list[Candidate] = []
        size = 0
        for candidate in self._candidates(source):
            check_candidate(candidate, source)
            if isinstance(candidate, Document):
                size += len(candidate.text) + len(candidate.row)
            if size <= self.room:
                candidates.append(candidate)
            else:
                candidates.clear()  # too large to stay: each pass reads it again
            yield candidate

        # Only a source that was read to its end is complete.
        if size <= self.room:
            self._cache[name] = candidates
            self.room -= size

    def files(self, source: SourceConfig) -> Inputs:
        """Lists the files of a source; later calls return the same listing.

        Raises:
            ConfigError, ArtefactError: as `inputs_of`.
        """
        return self._snapshot(source).listing

    def require_same(self, corpus_name: str, number: int, source: SourceConfig, documents: bytes) -> None:
        """Refuses a source that gave other documents than when it was first read to its end; returns nothing.

        Args:
            number: position of the source in its corpus.
            documents: a hash of all its documents that passed, in their order.

        Raises:
            ChangedInputError: names the source.
        """
        if documents != self._documents.setdefault((corpus_name, number), documents):
            raise ChangedInputError(
                f"corpus {corpus_name}, source {source_name(source)}", "it gave other documents than before"
            )

    def documents(self, corpus_name: str) -> str:
        """Returns a hexadecimal hash of the documents of a corpus; equal ones are hashes of the same documents.

        Only sources that were read to their end count.
        """
        hashes = [content for (name, _), content in sorted(self._documents.items()) if name == corpus_name]
        return hashlib.sha256(b"".join(hashes)).hexdigest()

    def _snapshot(self, source: SourceConfig) -> Snapshot:
        return self._snapshots.setdefault(repr(source), Snapshot.of(source))

    def _candidates(self, source: SourceConfig) -> Iterator[Candidate]:
        """Calls the reader of a source.

        Raises:
            ChangedInputError: a file is not as it was listed.
        """
        read, traits, snapshot = reader_of(source), source_traits(source), self._snapshot(source)
        if traits.takes_files:
            yield from read(source, self._seed, snapshot)
            return

        # The files that such a reader opens are not known here, so they are listed before and after.
        listing = snapshot.listing
        yield from read(source, self._seed)
        if traits.inputs and (words := changes(listing, traits.inputs(source))):
            raise ChangedInputError(f"corpus source reader={source.reader}", "; ".join(words))


class RowErrors:
    """Counts the broken rows of one source."""

    def __init__(self, source: SourceConfig, max_bad_fraction: float, rejected: TextIO | None = None) -> None:
        """`rejected`: gets a line of JSON for each broken row."""
        self._source = source
        self._max_bad_fraction = max_bad_fraction
        self._rejected = rejected
        self.first: list[Rejected] = []  # the first broken rows, for messages
        self.n_bad = self.n_rows = 0

    def counted(self, candidates: Iterable[Candidate]) -> Iterator[Candidate]:
        """Yields the same candidates, broken ones included, and counts them.

        A broken row, `Rejected` with an error, is also written to `rejected`. A source with `HOPELESS` broken rows that
        are most of its rows ends early, without an error: `check` raises it.
        """
        for candidate in candidates:
            self.n_rows += 1
            if isinstance(candidate, Rejected) and candidate.error:
                self._count(candidate)
                is_mostly_broken = self.n_bad > max(0.5, self._max_bad_fraction) * self.n_rows
                if self.n_bad >= HOPELESS and is_mostly_broken:
                    return  # `check` raises
            yield candidate

    def add(self, n_rows: int, n_bad: int, first: Iterable[Rejected]) -> None:
        """Adds the counts of a part of the source that was read elsewhere, and its first broken rows."""
        self.n_rows += n_rows
        self.n_bad += n_bad
        self.first = [*self.first, *first][:NAMED]

    def check(self) -> None:
        """Judges the counts; to be called when enough of the source was read.

        Raises:
            ArtefactError: too many of the rows were broken; the message names the first ones, and the key where a
                higher value helps.
        """
        if self.n_bad <= self._max_bad_fraction * self.n_rows:
            return
        named = "; ".join(f"{row.source}: {row.error}" for row in self.first)
        source = f"corpus source reader={self._source.reader}"
        if 2 * self.n_bad > self.n_rows:
            # Rows are seldom damaged so often: a higher limit would hide that they are read in the wrong way.
            how_many = f"none of the first {self.n_rows:,} rows can be read"
            if self.n_bad < self.n_rows:
                how_many = f"{self.n_bad:,} of the first {self.n_rows:,} rows are broken, most of them"
            raise ArtefactError(
                f"{source}: {how_many}, so reader or column do not fit these files: name others (`dist-lm data new` "
                f"looks at files and proposes them), or mend the files. The first: {named}"
            )

        raise ArtefactError(
            f"{source}: {self.n_bad:,} of {self.n_rows:,} rows are broken, more than "
            f"corpus.max_bad_fraction={self._max_bad_fraction:g}: mend them, or set that key to "
            f"{share_above(self.n_bad / self.n_rows):g}, and they are skipped. The first: {named}"
        )

    def _count(self, row: Rejected) -> None:
        # All rows may be broken, so only the first ones are kept for the message.
        self.n_bad += 1
        if len(self.first) < NAMED:
            self.first.append(row)
        if self._rejected:
            line = {"place": row.source, "reason": row.reason, "error": row.error, "language": row.language}
            self._rejected.write(json.dumps(line) + "\n")


def note_dropped(rejected: TextIO | None, document: Document, reason: str, **more: str) -> None:
    """Writes a line about a document that was dropped for what it holds.

    Args:
        rejected: the file; None: nothing is written.
        more: further fields of the line.
    """
    if rejected:
        line = {"place": document.source, "reason": reason, "error": "", "language": document.language}
        rejected.write(json.dumps(line | more) + "\n")


def share_above(share: float) -> float:
    """Returns a share in (0, 1) as the next number of two significant digits that is larger."""
    step = 10.0 ** (math.floor(math.log10(share)) - 1)
    return round((math.floor(share / step) + 1) * step, 12)


def screened(
    config: CorpusConfig,
    corpus_name: str,
    reader: SourceReader,
    keys: set[bytes],
    report: IngestReport,
    rejected: TextIO | None = None,
    exchanged: Collection[int] = (),
) -> Iterator[Screened]:
    """Yields the documents of a corpus, source by source. Of equal texts only the first one passes, unless `exchanged`
    swaps it with a later one.

    A source ends after `source.limit` new texts (0: all). Its broken rows are judged when it ends.

    Args:
        keys: hashes of the texts that came before (16 bytes each); those of this corpus are added, except those of
            sources with `held_out`. A text of such a source is compared only with other such sources of this corpus.
        report: counts what is dropped; `IngestReport.keep` is left to the caller.
        rejected: gets a line of JSON for each broken row.
        exchanged: as returned by `precedence.exchanged_copies`: places of documents whose verdict is reversed. Of equal
            texts the first one is then dropped, and the copy that the rule prefers is kept.

    Raises:
        ConfigError: as `SourceReader.read`, there is no such corpus, or there are more than `LANGUAGES` languages.
        ArtefactError: a source gives no document or cannot be read; or too many of its rows are broken, which is known
            after its last document.
        ChangedInputError: a source gives other documents than when it was read before; or as `SourceReader.read`.
    """
    held_out: set[bytes] = set()
    languages: set[str] = set()
    place = -1  # among the documents that pass the checks, copies included
    for number, source in enumerate(corpus_sources(config, corpus_name)):
        # A text that a user holds out must not be dropped because a train source before it has it.
        earlier_keys = held_out if source.held_out else keys
        n_new = n_source = 0  # texts that are new; documents that pass
        dropped: Counter[str] = Counter()
        documents = hashlib.blake2b(digest_size=16)  # hashes those that passed
        errors = RowErrors(source, config.max_bad_fraction, rejected)
        for candidate in errors.counted(reader.read(source)):
            if isinstance(candidate, Rejected):
                report.reject(candidate, source, candidate.reason)
                dropped[candidate.reason] += 1
                continue

            record, reason = screen(candidate, source, config, earlier_keys)
            is_new = not reason
            if reason in ("", "duplicate"):
                place += 1
                # The rule prefers this copy to the first one, or another copy to this first one.
                if place in exchanged:
                    reason = "duplicate" if is_new else ""
            if is_new:
                earlier_keys.add(record.key)
                n_new += 1

            if reason:
                report.reject(candidate, source, reason)
                dropped[reason] += 1
            else:
                languages.add(candidate.language)
                if len(languages) > LANGUAGES:
                    raise too_many_languages(config, corpus_name, candidate.source)

                documents.update(record.key)
                documents.update(candidate.group.encode())
                yield record
                n_source += 1
            # A limit of 0 is never reached: it stands for all.
            if is_new and n_new == source.limit:
                break

        reader.require_same(corpus_name, number, source, documents.digest())
        # Broken rows are the better explanation for a source without documents, so they are checked first.
        errors.check()
        if n_source == 0:
            raise no_document(config, corpus_name, source, dropped)


def no_document(config: CorpusConfig, corpus_name: str, source: SourceConfig, dropped: Counter[str]) -> ArtefactError:
    """Returns the error for a source without documents, for the caller to raise; its message has the way out.

    Args:
        dropped: reason -> documents that were dropped.
    """
    origin = reasons = ""
    if name := source_place(source):
        key = "dataset" if source.dataset else "path"
        origin = f" of {key}={name}"
    if dropped:
        only = f" (only={source.only})" if "other_language" in dropped else ""
        listing = ", ".join(f"{reason} {count:,}" for reason, count in dropped.most_common())
        reasons = f"dropped were {listing}{only}; "

    # The reason that most documents were dropped for tells more than the reader can.
    advice = source_traits(source).advice
    if dropped:
        main_reason = dropped.most_common(1)[0][0]
        advice = WAYS_OUT.get(main_reason, advice)
        if main_reason == "too_long":
            advice += f" (now {config.max_document_bytes:,})"

    return ArtefactError(
        f"corpus {corpus_name}: reader={source.reader} gave no document{origin}: {reasons}"
        f"{advice} (corpus={config.name})"
    )


def too_many_languages(config: CorpusConfig, corpus_name: str, place: str) -> ConfigError:
    """Returns the error for a corpus of more than `LANGUAGES` languages; `place` has the last one."""
    return ConfigError(
        f"corpus {corpus_name}: more than {LANGUAGES} languages, the last at {place}: choose "
        f"some with only, or give a source one language (corpus={config.name})"
    )


def check_candidate(candidate: object, source: SourceConfig) -> None:
    """Refuses what is neither a document of the reader's form nor `Rejected`; returns nothing.

    Raises:
        ConfigError: names the reader and what it yielded: no document, text of another type, another form, or a
            group that does not begin with 16 hexadecimal digits.
    """
    if isinstance(candidate, Rejected):
        return

    # A user's own reader may yield anything.
    form = source_form(source)
    if not isinstance(candidate, Document):
        description = f"a value of type {type(candidate).__name__}"
    elif not isinstance(candidate.text, str):
        description = f"a {candidate.form} whose text is of type {type(candidate.text).__name__} ({candidate.source})"
    elif candidate.form != form:
        description = f"a {candidate.form} ({candidate.source})"
    elif candidate.group and not GROUP.match(candidate.group):
        raise ConfigError(
            f"corpus source: reader={source.reader} yielded the group {candidate.group!r} "
            f"({candidate.source}): expected a hexadecimal hash (text_hash of its name), or none"
        )
    else:
        return
    raise ConfigError(
        f"corpus source: reader={source.reader} yielded {description}: expected Document(form={form!r}) or Rejected"
    )


def source_name(source: SourceConfig) -> str:
    """Returns the name of a source in reports: reader, data set or paths, language."""
    return " ".join(part for part in (source.reader, source_place(source), source.language) if part)


def source_place(source: SourceConfig) -> str:
    """Returns the data set or the paths of a source; empty if it is generated."""
    return source.dataset or ", ".join(source.path or [])


def text_key(content: bytes) -> bytes:
    """Returns the hash of a text in UTF-8, 16 bytes. Texts that differ in their line ends alone have one hash."""
    unified = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return hashlib.blake2b(unified, digest_size=16).digest()


def screen(
    document: Document, source: SourceConfig, config: CorpusConfig, keys: Collection[bytes]
) -> tuple[Screened, str]:
    """Returns the document with its hashes, and why it is dropped (empty: it is not). `keys` is not changed.

    Texts that differ only in their line ends have one hash. A text that is not Unicode has empty hashes and 0 bytes.

    Args:
        keys: hashes of earlier texts; a document whose text has one of these hashes is a duplicate.
    """
    text = document.text
    try:
        content = text.encode()
    except UnicodeEncodeError:
        return Screened(document, source, b"", "", 0), "not_unicode"

    key = text_key(content)
    record = Screened(document, source, key, document.group or key.hex(), len(content))

    if not text.strip():
        reason = "empty"
    elif len(content) > config.max_document_bytes:
        reason = "too_long"
    else:
        reason = reason_to_drop(document, source, config.cleaning, len(content))
        if not reason and record.key in keys:
            reason = "duplicate"
    return record, reason
