"""Decides on the documents of corpora of texts task by task, as `data.ingest` does in one reading after the other.

What tasks find is merged by sums, unions and the smallest place, so neither the number of workers nor the order in
which tasks end changes a decision:

1. `survey` reads a task: key, group and size of each document that passes the checks, and the texts that could be val.
   A source with `limit` ends where `SourceLimit` says, which knows the texts of all tasks before.
2. Of equal keys, the first in the order of the plan stays (`data.sorted_runs`), or the one that `data.precedence` puts
   before the others; these are copies.
3. `sizes_below` sums the bytes that each halving of `val_fraction` would hold out; `fitting_share` chooses the share.
4. `compare` compares train of a task with all held-out texts.
5. `fates_of` applies the merged rule to a task.

Later readings of a task must give the documents of the survey again: `same_documents` compares their keys.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TextIO

import numpy as np

from dist_lm.config.corpus import REPOSITORY, CorpusConfig, SourceConfig
from dist_lm.data.benchmarks import Benchmarks
from dist_lm.data.build_plan import BuildTask
from dist_lm.data.containment import BATCH_BYTES, HeldOutIndex
from dist_lm.data.earlier import forms_of
from dist_lm.data.ingest import group_position, largest_share, split_of_group
from dist_lm.data.inputs import Inputs, changes
from dist_lm.data.near_duplicates import BANDS, bands_of_signature, text_signature
from dist_lm.data.precedence import precedence_of
from dist_lm.data.screening import RowErrors, Screened, check_candidate, screen, text_key
from dist_lm.data.sources.reader import Candidate, Rejected, corpus_sources, reader_of, source_traits
from dist_lm.data.sources.snapshot import Snapshot
from dist_lm.document import Document
from dist_lm.errors import ChangedInputError

HALVINGS = 64  # of `val_fraction`: positions of groups have 64 bits
KEY = 16  # bytes
TRAIN, VAL, DUPLICATE, NEAR_DUPLICATE, BENCHMARK, OVERLAPPING, CONTAINS_VAL, EXCLUDED = range(8)
"""What becomes of a document: it is kept in a split, or dropped for a reason (`screening.Tally.dropped`). `EXCLUDED`
ones are in the tars of train, but an added source has excluded them (`data.exclusions`)."""

Screening = tuple[Candidate, Screened | None, str]
"""What a source gave, its document if it passes the checks, and else why it is dropped."""


@dataclass(frozen=True)
class Survey:
    """The documents of a task that pass the checks, duplicates included, in their order (D)."""

    keys: np.ndarray  # (D, KEY) uint8: hashes of the texts
    positions: np.ndarray  # (D,) float64: hash of the group in [0, 1)
    n_bytes: np.ndarray  # (D,) int64, UTF-8
    is_contaminated: np.ndarray  # (D,) bool: the text has a part of a benchmark
    precedences: np.ndarray  # (D, 2) float64: as in `precedence_of`; (0, 2) if the source has no column for them
    # (D,) int64: the number of the first document of a unit, which is compared as a whole: a document or a repository
    units: np.ndarray
    bands: np.ndarray  # (units, bands) uint64: as in `band_hashes`; (0, bands) where near-duplicates are not sought
    val_texts: dict[int, str]  # number of a document -> text, of those that `val_fraction` could hold out
    groups: list[str]  # names of the groups (D), as the reader gave them; empty where they were not read
    rows: RowErrors  # counts of all rows
    dropped: Counter[str]  # reason -> documents that do not pass the checks
    languages: dict[str, str]  # language -> place of its first document
    left: int | None = None  # documents that the limit of the source leaves to later tasks; None: it has no limit


@dataclass(frozen=True)
class Rule:
    """What a reading needs to know to decide on each document."""

    shares: dict[str, float]  # corpus -> share of the groups that is held out
    leaked: np.ndarray = field(default_factory=lambda: sorted_keys([]))  # of held-out texts that train texts contain
    refused: np.ndarray = field(default_factory=lambda: sorted_keys([]))  # of train texts that contain a protected text
    excluded: np.ndarray = field(default_factory=lambda: sorted_keys([]))  # the same of the corpus that is extended
    causes: np.ndarray = field(default_factory=lambda: sorted_keys([]))  # of texts for which such ones are excluded


def source_of(config: CorpusConfig, task: BuildTask) -> SourceConfig:
    return corpus_sources(config, task.corpus)[task.source]


def candidates_of(config: CorpusConfig, seed: int, task: BuildTask, listing: Inputs) -> Iterator[Candidate]:
    """Yields everything that the files of a task give, broken rows included.

    Args:
        seed: of the run; decides the text of generated sources and nothing else.
        listing: what `left_beside` kept of the files of the whole source.

    Raises:
        ChangedInputError: a file is not as it was listed.
        ConfigError, ArtefactError: as the reader, or it yields no documents of texts.
    """
    source = source_of(config, task)
    read, traits = reader_of(source), source_traits(source)
    if traits.takes_files:
        files = Inputs((*task.files, *listing.files))
        candidates = read(source, seed, Snapshot(lambda: files))
    else:
        candidates = read(source, seed)

    for candidate in candidates:
        check_candidate(candidate, source)
        yield candidate

    # The files that such a reader opens are not known here, so they are listed again behind it.
    if not traits.takes_files and traits.inputs and (words := changes(listing, traits.inputs(source))):
        raise ChangedInputError(f"corpus source reader={source.reader}", "; ".join(words))


def left_beside(source: SourceConfig, listing: Inputs) -> Inputs:
    """Returns the files of a whole source that a task of it must know beside its own: every `.git`, by which
    repositories are found, or all files of a reader that does not tell which ones it opens."""
    if not source_traits(source).takes_files:
        return listing
    return Inputs(tuple(file for file in listing.left_out if file.name.endswith("/.git") or "/.git/" in file.name))


def screenings(
    config: CorpusConfig, source: SourceConfig, candidates: Iterable[Candidate], rejected: TextIO | None = None
) -> tuple[RowErrors, Iterator[Screening]]:
    """Checks each candidate, but for duplicates. Returns the counts of rows and a screening of each candidate, in their
    order; the counts grow while the screenings are read.

    Args:
        rejected: gets a line of JSON for each broken row.

    Raises:
        What `candidates` raises, while the screenings are read.
    """
    # A task is not ended early, however many of its rows are broken: the counts of the whole source decide.
    rows = RowErrors(source, 1.0, rejected)

    def screened_candidates() -> Iterator[Screening]:
        for candidate in rows.counted(candidates):
            if isinstance(candidate, Rejected):
                yield candidate, None, candidate.reason
                continue
            record, reason = screen(candidate, source, config, ())
            yield candidate, None if reason else record, reason

    return rows, screened_candidates()


class SourceLimit:
    """Ends a source behind as many documents as its `limit` allows, which does not count copies of earlier texts.

    Keys are looked up in batches as large as what is left of the limit. If none of a batch is a copy, the source ends
    at its last document, so nothing is read behind that one.
    """

    def __init__(self, left: int, count_new: Callable[[Sequence[bytes]], int]) -> None:
        """
        Args:
            left: documents that the limit leaves to the task.
            count_new: returns how many of these different keys no earlier task has.
        """
        self.left = left
        self._count_new = count_new

    def cut(self, screened_candidates: Iterable[Screening]) -> Iterator[Screening]:
        """Yields the same values up to the last document of the source; `left` is right when they have ended."""
        if not self.left:
            return
        seen: set[bytes] = set()
        batch: list[bytes] = []
        for candidate, record, reason in screened_candidates:
            yield candidate, record, reason
            if record is None or record.key in seen:
                continue

            seen.add(record.key)
            batch.append(record.key)
            if len(batch) == self.left:
                self.left -= self._count_new(batch)
                batch = []
                if not self.left:
                    return
        self.left -= self._count_new(batch)


def survey(
    config: CorpusConfig, task: BuildTask, candidates: Iterable[Candidate], limit: SourceLimit | None = None
) -> Survey:
    """Reads a task for the first time. Returns what the decisions need to know of its documents, as hashes and sizes;
    of the texts only those that may be held out.

    Args:
        candidates: what `candidates_of` yields for the task; read to the end, or to that of the limit.
        limit: of the source, if it has one.

    Raises:
        ConfigError: a file of cleaning.benchmarks cannot be read, or as `candidates`.
        ArtefactError: as `candidates`.
    """
    benchmarks = Benchmarks.read(config.cleaning.benchmarks) if config.cleaning.benchmarks else None
    share = largest_share(config, task.corpus)
    source = source_of(config, task)
    keys, positions, sizes, contaminated, precedences, groups = [], [], [], [], [], []
    units = _Units(config.cleaning.near_duplicates_by == REPOSITORY)
    val_texts: dict[int, str] = {}
    dropped: Counter[str] = Counter()
    languages: dict[str, str] = {}
    rows, screened_candidates = screenings(config, source, candidates)
    if limit:
        screened_candidates = limit.cut(screened_candidates)
    for _, record, reason in screened_candidates:
        if record is None:
            dropped[reason] += 1
            continue

        text = record.document.text
        if record.source_config.held_out or split_of_group(record.group, share) == "val":
            val_texts[len(keys)] = text
        if config.cleaning.near_duplicates and not record.source_config.held_out:
            units.add(record.document)
        if source.has_precedence:
            precedences.append(precedence_of(record.document))
        keys.append(record.key)
        groups.append(record.document.group)
        positions.append(group_position(record.group))
        sizes.append(record.n_bytes)
        contaminated.append(benchmarks is not None and benchmarks.first_in(text) is not None)
        languages.setdefault(record.document.language, record.document.source)
    return Survey(
        key_array(keys),
        np.array(positions, float),
        np.array(sizes, np.int64),
        np.array(contaminated, bool),
        np.array(precedences, float).reshape(-1, 2),
        np.array(units.first_documents, np.int64),
        units.bands(),
        val_texts,
        groups,
        rows,
        dropped,
        languages,
        limit.left if limit else None,
    )


class _Units:
    """What is compared as a whole: each document, or all documents of a repository, which are neighbours."""

    def __init__(self, by_repository: bool) -> None:
        self._by_repository = by_repository
        self._repository = ""  # of the last document
        self._signature: np.ndarray | None = None  # of the last unit
        self._bands: list[np.ndarray] = []  # of the units before it
        self.first_documents: list[int] = []  # of each document, the number of the first one of its unit

    def add(self, document: Document) -> None:
        """Adds the next document."""
        signature = text_signature(document.text)
        if self._by_repository and self._signature is not None and document.repository == self._repository != "":
            np.minimum(self._signature, signature, out=self._signature)
            self.first_documents.append(self.first_documents[-1])
            return

        self._end_unit()
        self._signature, self._repository = signature, document.repository
        self.first_documents.append(len(self.first_documents))

    def bands(self) -> np.ndarray:
        """Returns the hashes of the bands of each unit, (units, bands) uint64. Nothing can be added behind it."""
        self._end_unit()
        return np.array(self._bands, np.uint64).reshape(-1, BANDS)

    def _end_unit(self) -> None:
        if self._signature is not None:
            self._bands.append(bands_of_signature(self._signature))
            self._signature = None


def same_documents(
    keys: np.ndarray, screened_candidates: Iterable[Screening], name: str, *, is_cut: bool = False
) -> Iterator[Screening]:
    """Yields the same values if their documents are those of the survey.

    Args:
        keys: of the survey.
        name: the source, for messages.
        is_cut: the limit of the source was reached, so nothing is read behind the last document.

    Raises:
        ChangedInputError: they are others.
    """
    if is_cut and not len(keys):
        return
    n_documents = 0
    for candidate, record, reason in screened_candidates:
        if record is not None:
            if n_documents == len(keys) or record.key != keys[n_documents].tobytes():
                raise ChangedInputError(candidate.source, "it has another text than at the first reading")
            n_documents += 1
        yield candidate, record, reason
        if is_cut and n_documents == len(keys):
            return
    if n_documents != len(keys):
        raise ChangedInputError(name, f"{n_documents:,} documents, was {len(keys):,}")


def sizes_below(task: Survey, is_dropped: np.ndarray, val_fraction: float) -> np.ndarray:
    """Returns the bytes of text that `val_fraction / 2**i` of the groups would hold out of a task, for each i from 0:
    (HALVINGS,) int64.

    Args:
        is_dropped: (D,) bool: documents that do not count.
        val_fraction: share in [0, 1].
    """
    sizes = np.where(is_dropped, 0, task.n_bytes)
    return np.array([sizes[task.positions < val_fraction / 2**halving].sum() for halving in range(HALVINGS)], np.int64)


def fitting_share(n_bytes: np.ndarray, val_fraction: float, max_bytes: int) -> float:
    """Returns the largest share `val_fraction / 2**i` whose held-out text has at most `max_bytes`; 0 if none has.

    Args:
        n_bytes: (HALVINGS,) sums of `sizes_below` over all tasks of a corpus.
    """
    fits = np.flatnonzero(n_bytes <= max_bytes)
    return val_fraction / 2 ** int(fits[0]) if len(fits) else 0.0


def fates_of(
    task: Survey, is_copy: np.ndarray, is_near_copy: np.ndarray, is_held_out: bool, share: float, rule: Rule
) -> np.ndarray:
    """Returns what becomes of each document of a task: (D,) int8 of `TRAIN` to `CONTAINS_VAL`.

    Args:
        is_copy, is_near_copy: (D,) bool: of an earlier document.
        is_held_out: whether the source has `held_out`.
        share: of the corpus, in `rule.shares`.
    """
    is_val = np.full(len(task.keys), True) if is_held_out else task.positions < share
    fates = np.where(is_val, VAL, TRAIN).astype(np.int8)
    fates[is_val & is_among(task.keys, rule.leaked)] = OVERLAPPING
    fates[~is_val & is_among(task.keys, rule.refused)] = CONTAINS_VAL
    fates[task.is_contaminated] = BENCHMARK
    fates[is_near_copy] = NEAR_DUPLICATE
    fates[is_copy] = DUPLICATE
    return fates


def compare(
    index: HeldOutIndex, protected: set[bytes], is_redacted: bool, fates: np.ndarray, documents: Iterable[Screened]
) -> np.ndarray:
    """Compares train of a task with the held-out texts of an index, which remembers what it finds.

    Args:
        protected: keys of held-out texts that train gives way to; documents with one of these are dropped anyway.
        is_redacted: whether some held-out texts have placeholders, so that train is compared with them, too.
        fates: of the documents, with an empty rule.

    Returns:
        The keys of the train documents that contain a protected text: (refused, KEY) uint8, as in `sorted_keys`.
    """
    refused: list[bytes] = []

    def texts() -> Iterator[tuple[bytes, bytes]]:
        for record, fate in zip(documents, fates, strict=True):
            if fate != TRAIN or record.key in protected:
                continue
            forms = forms_of(record.document.text) if is_redacted else [record.document.text]
            # The first form is the text itself.
            if any(text_key(form.encode()) in protected for form in forms[1:]):
                refused.append(record.key)
                continue
            yield from ((record.key, form.encode()) for form in forms)

    refused += [key for key, _ in refused_texts(index, texts(), has_protected=bool(protected))]
    return sorted_keys(refused)


def refused_texts(
    index: HeldOutIndex, texts: Iterable[tuple[bytes, bytes]], *, has_protected: bool
) -> Iterator[tuple[bytes, bytes]]:
    """Compares train texts with an index, which remembers what it finds in them. Yields those that contain a protected
    text.

    Args:
        texts: (key, UTF-8) of each.
        has_protected: whether a text of the index is protected.
    """
    batch: list[tuple[bytes, bytes]] = []
    n_bytes = 0
    # Texts that are refused do not count as train. A batch shares its bytes, so such texts are compared one by one.
    largest = 0 if has_protected else BATCH_BYTES
    # An empty text at the end compares the last batch.
    for text in itertools.chain(texts, [None]):
        if text:
            batch.append(text)
            n_bytes += len(text[1])
        if batch and (n_bytes >= largest or not text):
            is_refused = index.compare([content for _, content in batch])
            yield from itertools.compress(batch, is_refused)
            batch, n_bytes = [], 0


def order_in_tar(task: Survey, is_written: np.ndarray, *, is_shuffled: bool) -> np.ndarray:
    """Returns the numbers of the documents of a task that are written to a split, in the order of its tar: int64.

    Args:
        is_written: (D,) bool.
        is_shuffled: as `corpus.shuffle_in_tasks`.
    """
    documents = np.flatnonzero(is_written)
    if is_shuffled:
        # Positions are hashes of repositories, and of texts without one, so their order is a random one. The sort is
        # stable: a repository stays whole, its documents in the order of the source.
        documents = documents[np.argsort(task.positions[documents], kind="stable")]
    return documents


def key_array(keys: Sequence[bytes]) -> np.ndarray:
    """Returns keys as an array, (keys, KEY) uint8."""
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY)


def sorted_keys(keys: Iterable[bytes]) -> np.ndarray:
    """Returns keys without repetitions, sorted by their bytes: (keys, KEY) uint8."""
    return key_array(sorted(set(keys)))


def is_among(keys: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Returns which of `keys`, (D, KEY) uint8, are in `members`, which is sorted: (D,) bool."""
    if not len(members):
        return np.zeros(len(keys), bool)
    # As texts of fixed length, which numpy compares byte by byte. It ignores zeros at the end, but all keys have one
    # length.
    texts, member_texts = (np.ascontiguousarray(array).view(f"S{KEY}").ravel() for array in (keys, members))
    indices = np.searchsorted(member_texts, texts).clip(max=len(member_texts) - 1)
    return member_texts[indices] == texts
