"""Divides the documents of sources into train and val, and drops those that would leak held-out text into train.

    split_documents -> TextSplits.screened -> screening.screened -> SourceReader.read -> a reader

Each of these reads from the one behind it. `screening.screened` drops invalid documents and copies;
`TextSplits.screened` drops near-duplicates and texts with parts of benchmarks. `split_documents` divides the others,
and replaces secrets (`cleaned`).

The hash of a document's group decides between train and val; the document's position and the seed do not. Groups with
the smallest hashes are held out: a share of `val_fraction`, halved until the held-out texts of the corpus fit
`val_tokens`. So documents of a corpus that grows stay in their split. Only when val outgrows `val_tokens`, the share is
halved and half of val moves to train; nothing ever moves from train to val.

Held-out texts are compared with the train texts of all corpora that are built together (`data.containment`): one that
train texts contain is dropped. Documents of a source with `held_out` are val whatever their hash; train
documents that contain one are dropped. If a corpus has such a source, its other sources are train. Finished corpora of
the work directory are compared too, in both directions (`data.earlier`).

Texts are read up to three times: to choose val, to compare train with val, and by the caller. The corpus that the
caller reads first is usually compared during that reading; the other corpora are read for the comparison before its
val documents are yielded. With `held_out` sources or earlier corpora the comparison drops train documents, so all
corpora are compared in a reading of their own before the first document is yielded.

A corpus holds texts, or conversations, or rankings. Conversations share their forms, so shared words say nothing about
leakage. They are divided by group instead: the tools of a conversation with generated tools, the user's text of any
other conversation, the prompt of a ranking. Conversations and rankings are read once.
"""

import heapq
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple, TextIO

import numpy as np

from dist_lm.config.corpus import BYTES_PER_TOKEN, CorpusConfig, SourceConfig
from dist_lm.data.benchmarks import Benchmarks, Contamination
from dist_lm.data.containment import Comparison, HeldOutIndex
from dist_lm.data.earlier import EarlierCorpora, forms_of, has_placeholder
from dist_lm.data.near_duplicates import near_duplicates
from dist_lm.data.precedence import exchanged_copies, is_by_rule, order_of_precedence, precedence_of
from dist_lm.data.redaction import EMAIL, KEY, redacted, redacted_json
from dist_lm.data.screening import IngestReport, Screened, SourceReader, note_dropped, screened, text_key
from dist_lm.data.sources.reader import Candidate, corpus_sources, form_of, text_corpora
from dist_lm.document import Document
from dist_lm.errors import ArtefactError, ChangedInputError, ConfigError

HASH_RANGE = 2**64  # hashes of groups are below
MOST_TRIED = 64  # next records that an error compares with other corpora to find a larger share


@dataclass(frozen=True)
class SplitRule:
    """Decides which documents of a configuration are held out, and which are dropped for it."""

    held_out: Mapping[str, float]  # corpus -> share of the groups that is held out
    leaked: frozenset[bytes] = frozenset()  # keys of held-out texts that train texts contain
    refused: frozenset[bytes] = frozenset()  # keys of train texts that contain a protected text (`_Val.protected`)
    groups: frozenset[str] = frozenset()  # groups of conversations and rankings of sources with `held_out`

    def split_of(self, corpus_name: str, record: Screened) -> str:
        """Returns the split of a document, `train` or `val`, whether it is dropped or not."""
        if record.source_config.held_out:
            return "val"
        return split_of_group(record.group, self.held_out[corpus_name])

    def drop_reason(self, split: str, record: Screened) -> str:
        """Returns why a document of this split is dropped; empty if it is not."""
        if split == "val" and record.key in self.leaked:
            return "overlapping"
        if split == "train" and (record.key in self.refused or record.group in self.groups):
            return "contains_val"
        return ""


class _Val(NamedTuple):
    """The held-out texts of all corpora."""

    shares: dict[str, float]  # as `SplitRule.held_out`
    keys: list[bytes]
    # keys of the texts for which train documents are dropped: of sources with `held_out`, and of earlier corpora
    protected: set[bytes]
    index: HeldOutIndex
    comparison: Comparison
    texts: dict[bytes, str]  # key -> text, to be compared with earlier corpora; empty without them
    refused: set[bytes]  # keys of train texts that are themselves held out by an earlier corpus
    is_redacted: bool  # whether val of an earlier corpus has placeholders, so that train texts are compared with them


class TextSplits:
    """Reads the sources of a configuration, and decides on the splits of its texts when they are first needed."""

    def __init__(
        self,
        config: CorpusConfig,
        seed: int,
        preloaded: dict[str, list[Candidate]] | None = None,
        *,
        together: Sequence[str] | None = None,
        earlier: EarlierCorpora | None = None,
        reader: SourceReader | None = None,
    ) -> None:
        """Prepares the splits of the corpora of texts; sources are read when they are asked for.

        Args:
            seed: decides the text of generated sources and nothing else.
            preloaded: as for `SourceReader`.
            together: the corpora of texts whose sources are compared with each other; None: all.
            earlier: finished corpora that stay as they are, compared in both directions.
            reader: one of the same seed, which keeps what it has read; None: a new one.

        Raises:
            ConfigError: a source is invalid.
        """
        self.config = config
        self.together = text_corpora(config) if together is None else list(together)
        self.earlier = earlier or EarlierCorpora()
        self.reader = reader or SourceReader(seed, preloaded)
        # corpus of texts -> bytes of the least part that hashes could hold out, if that exceeds `val_tokens`; 0: none
        self.least_val_bytes: dict[str, int] = {}
        self._compared_corpora: set[str] = set()
        self._contaminated_of: dict[str, Mapping[bytes, Contamination]] = {}  # corpus -> texts with parts of benchmarks
        self._resembling_of: dict[str, Mapping[bytes, bytes]] = {}  # corpus -> see `_resembling`
        self._exchanged_of: dict[str, frozenset[int]] = {}  # corpus -> see `_exchanged`

    def screened(
        self, corpus_name: str, report: IngestReport | None = None, rejected: TextIO | None = None
    ) -> Iterator[Screened]:
        """Yields the documents of one corpus before they are divided, without duplicates.

        With `cleaning.across_corpora`, the corpora of texts before it are read first: a text of theirs is a duplicate.
        With `cleaning.near_duplicates`, a text that resembles an earlier one is dropped, too, and with
        `cleaning.benchmarks`, one with a part of a benchmark.

        Args:
            report, rejected: as for `screening.screened`; texts that these two drop are in `rejected`, too.

        Raises:
            ConfigError, ArtefactError: as `screening.screened`; or a file of benchmarks cannot be read.
        """
        cleaning, report = self.config.cleaning, report or IngestReport()
        is_text = form_of(self.config, corpus_name) == "text"
        resembling = self._resembling(corpus_name) if is_text and cleaning.near_duplicates else {}
        records = self._without_near_duplicates(corpus_name, resembling, report, rejected)
        if is_text and cleaning.benchmarks:
            records = self._without_benchmarks(corpus_name, records, report, rejected)
        yield from records

    def _without_near_duplicates(
        self, corpus_name: str, resembling: Mapping[bytes, bytes], report: IngestReport, rejected: TextIO | None
    ) -> Iterator[Screened]:
        """Yields the documents of a corpus that do not resemble an earlier one; held-out sources are not compared.

        Args:
            resembling: as `_resembling` returns it.

        Raises:
            ConfigError, ArtefactError: as `screening.screened`.
        """
        keys: set[bytes] = set()
        resembled = {*resembling.values()}
        source_of: dict[bytes, str] = {}  # key of a resembled text -> its source
        # Reading the earlier corpora fills `keys`, so that their texts are duplicates here.
        for earlier in self._corpora_before(corpus_name):
            for record in self._without_copies(earlier, keys, IngestReport()):
                if record.key in resembled:
                    source_of[record.key] = record.document.source
        # A text that stays by rule may stand behind those that are dropped for it.
        if resembled and is_by_rule(self.config, corpus_name):
            for record in self._without_copies(corpus_name, {*keys}, IngestReport()):
                if record.key in resembled and not record.source_config.held_out:
                    source_of[record.key] = record.document.source

        for record in self._without_copies(corpus_name, keys, report, rejected):
            if record.key in resembling and not record.source_config.held_out:
                report.reject(record.document, record.source_config, "near_duplicate")
                resembled_source = source_of[resembling[record.key]]
                note_dropped(rejected, record.document, "near_duplicate", resembles=resembled_source)
                continue
            if record.key in resembled and not record.source_config.held_out:
                source_of[record.key] = record.document.source
            yield record

    def _without_benchmarks(
        self, corpus_name: str, records: Iterable[Screened], report: IngestReport, rejected: TextIO | None
    ) -> Iterator[Screened]:
        """Yields the texts that hold no part of a benchmark.

        The first reading to the end compares the texts; later readings look its outcome up.

        Raises:
            ConfigError: a file of benchmarks cannot be read.
        """
        earlier_reading = self._contaminated_of.get(corpus_name)
        contaminated: dict[bytes, Contamination] = {}
        for record in records:
            if earlier_reading is None:
                contamination = self._benchmarks.first_in(record.document.text)
            else:
                contamination = earlier_reading.get(record.key)
            if contamination is None:
                yield record
                continue

            contaminated[record.key] = contamination
            reason = f"benchmark {contamination.benchmark}"
            report.reject(record.document, record.source_config, reason)
            note_dropped(rejected, record.document, reason, words=contamination.words)
        self._contaminated_of[corpus_name] = contaminated

    @cached_property
    def _benchmarks(self) -> Benchmarks:
        return Benchmarks.read(self.config.cleaning.benchmarks)

    def _corpora_before(self, corpus_name: str) -> Sequence[str]:
        """Returns the corpora whose texts are duplicates in this one: none without `cleaning.across_corpora`."""
        names = text_corpora(self.config)
        if not self.config.cleaning.across_corpora or corpus_name not in names:
            return ()
        return names[: names.index(corpus_name)]

    def _resembling(self, corpus_name: str) -> Mapping[bytes, bytes]:
        """Returns the keys of the texts of a corpus that are nearly those of earlier ones, each with the key of the
        earlier text; reads the corpora before it and itself twice at the first call, and remembers the answer.

        Texts of sources with `held_out` are not among them: a user chose them, and train gives way to them.

        Raises:
            ConfigError, ArtefactError: as `screening.screened`.
        """

        corpora = [*self._corpora_before(corpus_name), corpus_name]
        precedences = array("d")  # of the texts that were read last

        def texts() -> Iterator[tuple[bytes, str]]:
            keys: set[bytes] = set()
            del precedences[:]
            for number, name in enumerate(corpora):
                for record in self._without_copies(name, keys, IngestReport()):
                    if not record.source_config.held_out:
                        if by_rule:
                            # An earlier corpus never gives way to a later one: it may be finished already.
                            precedences.extend((number, *precedence_of(record.document)))
                        yield record.key, record.document.text

        def order_of_texts() -> np.ndarray:
            return order_of_precedence(np.frombuffer(precedences).reshape(-1, 3))

        if corpus_name not in self._resembling_of:
            by_rule = any(is_by_rule(self.config, name) for name in corpora)
            self._resembling_of[corpus_name] = near_duplicates(
                texts, self.config.cleaning.near_duplicates, order_of_texts if by_rule else None
            )
        return self._resembling_of[corpus_name]

    def _without_copies(
        self, corpus_name: str, keys: set[bytes], report: IngestReport, rejected: TextIO | None = None
    ) -> Iterator[Screened]:
        """Yields the documents of a corpus; of equal texts only the one that `data.precedence` prefers.

        Args:
            keys, report, rejected: as for `screening.screened`; `keys` of the corpora before this one.

        Raises:
            ConfigError, ArtefactError: as `screening.screened`.
        """
        exchanged = self._exchanged(corpus_name)
        yield from screened(self.config, corpus_name, self.reader, keys, report, rejected, exchanged)

    def _exchanged(self, corpus_name: str) -> frozenset[int]:
        """Returns `exchanged_copies` of a corpus; reads it, and those before it, at the first call. Nothing is read if
        the order of reading decides.

        Raises:
            ConfigError, ArtefactError: as `screening.screened`.
        """
        if not is_by_rule(self.config, corpus_name):
            return frozenset()
        if corpus_name not in self._exchanged_of:
            keys: set[bytes] = set()
            for earlier in self._corpora_before(corpus_name):
                for _ in self._without_copies(earlier, keys, IngestReport()):
                    pass
            self._exchanged_of[corpus_name] = exchanged_copies(self.config, corpus_name, self.reader, keys)
        return self._exchanged_of[corpus_name]

    def train_rule(self) -> SplitRule:
        """Returns the rule for train documents of texts.

        If train documents may be dropped (a source has `held_out`, or there are earlier corpora), this first compares
        all corpora. Otherwise it only chooses val.

        Raises:
            ConfigError, ArtefactError: as `split_documents`.
        """
        # Asked first, because `_val` is deleted once the complete rule is known.
        if "split_rule" in vars(self) or self._val.protected:
            return self.split_rule
        return SplitRule(self._val.shares)

    @cached_property
    def split_rule(self) -> SplitRule:
        """The rule for all texts, kept for later calls. Corpora that were not compared yet are read.

        Waits for the comparison and ends its threads; nothing can be compared behind it.

        Raises:
            ConfigError, ArtefactError: as `split_documents`.
        """
        self.compare(self.together)
        val = self._val
        # A train document that is itself a protected text was not compared: its key alone refuses it.
        refused = val.comparison.finish() | val.protected | val.refused
        leaked = {val.keys[number] for number in val.index.contained()}
        del self._val  # frees the windows of all held-out texts

        # Train of earlier corpora is read last, because nothing is compared if no val text is left.
        rest = {key: text for key, text in val.texts.items() if key not in leaked}
        keys = list(rest)
        leaked |= {keys[number] for number in self.earlier.contained([*rest.values()])}
        return SplitRule(val.shares, frozenset(leaked), frozenset(refused))

    def compare(self, corpora: Iterable[str]) -> None:
        """Reads those of `corpora` that were not compared yet, and compares their train texts with val.

        The first call reads all corpora of texts once more, to choose val. Threads may go on when it returns.

        Raises:
            ConfigError, ArtefactError: as `split_documents`.
        """
        for name in corpora:
            if name not in self._compared_corpora:
                # Reading is the comparison: the documents themselves are not needed here.
                for _ in self.comparing(name, self.screened(name)):
                    pass

    def comparing(self, corpus_name: str, records: Iterable[Screened]) -> Iterator[Screened]:
        """Yields the same documents, and compares the train texts among them with val, unless that was done.

        The corpus counts as compared only if the iterator is read to its end. The first one that is read chooses val
        before it yields, which reads all corpora. Comparing goes on in threads; `split_rule` waits for them.

        Raises:
            ConfigError, ArtefactError: as `split_documents`.
        """
        if corpus_name in self._compared_corpora:
            yield from records
            return
        val = self._val
        rule = SplitRule(val.shares)
        for record in records:
            if rule.split_of(corpus_name, record) == "train" and record.key not in val.protected:
                self._compare_train(val, record)
            yield record

        # Not in `finally`: a corpus that was not read to its end is not compared.
        self._compared_corpora.add(corpus_name)

    def _compare_train(self, val: _Val, record: Screened) -> None:
        """Compares one train text with val; with placeholders for secrets too, if val of an earlier corpus has some.

        Returns nothing: the text gets into `val.refused` if it equals a val text with placeholders, else it is added to
        `val.comparison`.
        """
        forms = [record.document.text]
        if val.is_redacted:
            forms = forms_of(record.document.text)
        # The first form is the record's, whose key is no protected one.
        if any(text_key(form.encode()) in val.protected for form in forms[1:]):
            val.refused.add(record.key)
            return
        for form in forms:
            val.comparison.add(record.key, form)

    @cached_property
    def _val(self) -> _Val:
        """Returns val of all corpora that are built together, at most `val_tokens` of each, with an index of its texts.

        Reads these corpora and val of earlier ones once, and makes the threads of the comparison. `split_rule` deletes
        the value.

        Raises:
            ConfigError, ArtefactError: as `split_documents`.
        """
        shares: dict[str, float] = {}
        texts: dict[bytes, str] = {}
        protected: set[bytes] = set()
        for name in self.together:
            shares[name], chosen = self._choose(name)
            texts |= {record.key: record.document.text for record in chosen}
            protected |= {record.key for record in chosen if record.source_config.held_out}
            del chosen  # the documents of one corpus are in memory at a time

        own_texts = dict(texts) if self.earlier else {}
        is_redacted = False
        for document in self.earlier.documents("val"):
            key = text_key(document.text.encode())
            texts.setdefault(key, document.text)
            protected.add(key)
            is_redacted = is_redacted or has_placeholder(document.text)
        keys = list(texts)
        index = HeldOutIndex([*texts.values()], [key in protected for key in keys])
        return _Val(shares, keys, protected, index, Comparison(index), own_texts, set(), is_redacted)

    def group_split_rule(self, corpus_name: str) -> SplitRule:
        """Returns the rule for the conversations or rankings of a corpus. Reads its sources with `held_out`.

        Train documents that share a group with a document of such a source will be dropped (contains_val).

        Raises:
            ConfigError: there is no such corpus; or as `SourceReader.read`, whose ArtefactError passes too.
        """
        groups = {
            candidate.group
            for source in corpus_sources(self.config, corpus_name)
            if source.held_out
            for candidate in self.reader.read(source)
            if isinstance(candidate, Document)
        }
        return SplitRule({corpus_name: largest_share(self.config, corpus_name)}, groups=frozenset(groups))

    def _choose(self, corpus_name: str) -> tuple[float, list[Screened]]:
        """Returns the share of groups of a corpus, in [0, 1], that is held out by hash, and all held-out documents.

        Reads the corpus. The share is halved until the held-out text fits `val_tokens`; it is 0 if a source has
        `held_out`. Notes in `least_val_bytes` a corpus of which nothing fits.

        Raises:
            ConfigError: the sources with `held_out` alone exceed `val_tokens`; or as `screened`.
            ArtefactError: as `screened`.
        """
        max_bytes = self.config.val_tokens * BYTES_PER_TOKEN
        share = largest_share(self.config, corpus_name)
        chosen: list[Screened] = []
        size = 0
        # Group -> bytes, for the groups that the smallest halving of the share with any group in it would hold out:
        # about one group.
        least: dict[str, int] = {}
        least_share = share
        for record in self.screened(corpus_name):
            position = group_position(record.group)
            if position < least_share:
                least[record.group] = least.get(record.group, 0) + record.n_bytes
            # Each halving drops the groups above it, so that few are in memory.
            while position < least_share / 2:
                least_share /= 2
                least = {group: n_bytes for group, n_bytes in least.items() if group_position(group) < least_share}

            if record.source_config.held_out or split_of_group(record.group, share) == "val":
                chosen.append(record)
                size += record.n_bytes

            # A smaller share cannot help against sources that are held out as a whole.
            if share == 0 and size > max_bytes:
                raise too_much_held_out(self.config, corpus_name)
            # Groups below the half of the share are groups below the share: val only shrinks.
            while size > max_bytes:
                share /= 2
                chosen = [record for record in chosen if split_of_group(record.group, share) == "val"]
                size = sum(record.n_bytes for record in chosen)
        if not chosen:
            self.least_val_bytes[corpus_name] = sum(least.values())
        return share, chosen


def split_documents(
    config: CorpusConfig,
    corpus_name: str,
    seed: int,
    report: IngestReport,
    text_splits: TextSplits | None = None,
    rejected: TextIO | None = None,
) -> Iterator[tuple[str, Document, SourceConfig]]:
    """Yields `(split, document, source)` of every document of a corpus: all of train, then all of val, by source.

    The order and the documents depend on the configuration, the seed and the inputs alone. In memory are val, and a
    hash of every text that passed, to find duplicates. Before val of a text corpus is yielded, all corpora of texts
    must have been compared; those that were not are read at that point.

    Secrets and addresses are replaced by placeholders, as `corpus.cleaning` says.

    Args:
        report: counts what is kept and dropped.
        text_splits: of the same config and seed, so that the splits are decided once for several corpora; None: a new
            one.
        rejected: gets a line of JSON for each broken row.

    Raises:
        ConfigError: the corpus or a reader does not exist, a reader yields something else than documents, sources
            with `held_out` exceed `val_tokens`, or there are too many languages.
        ArtefactError: a source gives no document or cannot be read, or too many of its rows are broken; after the last
            document: none is left for val or train.
    """
    text_splits = text_splits or TextSplits(config, seed)
    splits: Counter[str] = Counter()

    def checked(
        record: Screened, split: str, rule: SplitRule, forbidden: str = ""
    ) -> Iterator[tuple[str, Document, SourceConfig]]:
        """Yields the document of a record, cleaned, unless it is forbidden or the rule drops it; reports either."""
        if reason := forbidden or rule.drop_reason(split, record):
            report.reject(record.document, record.source_config, reason)
        else:
            splits[split] += 1
            yield split, cleaned(config, record, split, report), record.source_config

    records = text_splits.screened(corpus_name, report, rejected)
    is_text = form_of(config, corpus_name) == "text"
    if is_text:
        rule = text_splits.train_rule()
        records = text_splits.comparing(corpus_name, records)
    else:
        rule = text_splits.group_split_rule(corpus_name)

    # Texts of earlier corpora are in the rule. Conversations and rankings are compared here, one by one.
    marked = ((record, "") for record in records)
    if not is_text:
        marked = text_splits.earlier.marked(records, partial(rule.split_of, corpus_name))

    # Val stays in memory: only all of train tells which of its documents are dropped.
    val = []
    held_out_earlier = []  # records with the beginning of val of an earlier corpus
    next_for_val = _Lowest(MOST_TRIED)
    groups = Groups()
    for record, forbidden in marked:
        groups.add(record.group)
        # The rule was made from an earlier reading of the sources with `held_out`, and has all of their groups.
        if not is_text and record.source_config.held_out and record.document.group not in rule.groups:
            raise ChangedInputError(record.document.source, "it was not there before")
        if rule.split_of(corpus_name, record) == "val":
            val.append((record, forbidden))
        elif forbidden:
            held_out_earlier.append(record)
        else:
            if not is_text:
                next_for_val.add(record)
            yield from checked(record, "train", rule)

    if is_text:
        rule = text_splits.split_rule
    for record, forbidden in val:
        yield from checked(record, "val", rule, forbidden)

    # Preferences often have the prompts of conversations. If a corpus of conversations trains on all prompts that were
    # chosen for val here, the rankings of the prompts that it holds out become val.
    if held_out_earlier and not splits["val"]:
        for record, forbidden in text_splits.earlier.marked(held_out_earlier, lambda _: "val"):
            yield from checked(record, "val", rule, forbidden)
    else:
        for record in held_out_earlier:
            report.reject(record.document, record.source_config, "contains_val")

    if not splits["val"]:
        least_val_bytes = text_splits.least_val_bytes.get(corpus_name, 0)
        cause = why_nothing_is_held_out(config, corpus_name, groups, len(val), least_val_bytes)
        # Only where there are too few documents does a larger share hold some out.
        share = groups.smallest if groups.several and not val and not least_val_bytes else None
        if val and largest_share(config, corpus_name):
            # Those chosen stand in train of other corpora by chance; the next ones may not.
            share = _smallest_allowed(text_splits.earlier, next_for_val.records())
            if share is not None:
                cause += f"; or set corpus.val_fraction above {share:.4f}, so that more are chosen"
        raise NothingHeldOutError(
            f"corpus {corpus_name}: none of its {splits.total()} documents is held out: {cause}", share, groups.n_read
        )
    if not splits["train"]:
        raise no_train(corpus_name, splits.total())


def too_much_held_out(config: CorpusConfig, corpus_name: str) -> ConfigError:
    """Returns the error for sources with `held_out` that exceed `val_tokens`."""
    return ConfigError(
        f"corpus {corpus_name}: its sources with held_out=true have more text than "
        f"corpus.val_tokens={config.val_tokens} ({BYTES_PER_TOKEN} bytes a token): expected a larger "
        "val_tokens, or less text"
    )


def no_train(corpus_name: str, n_documents: int) -> ArtefactError:
    """Returns the error for a corpus whose documents are all val."""
    return ArtefactError(
        f"corpus {corpus_name}: none of its {n_documents} documents is left for train: val holds all of them, "
        "or train documents contain val (contains_val): give a source of train documents"
    )


class NothingHeldOutError(ArtefactError):
    """A corpus has no document in val."""

    def __init__(self, words: str, share: float | None, n_read: int) -> None:
        """`share`: a `corpus.val_fraction` above it holds some out; None: none does. `n_read`: documents that were
        read."""
        super().__init__(words)
        self.share = share
        self.n_read = n_read


class _Lowest:
    """Keeps the records whose groups have the smallest hashes, in bounded memory: a larger share would hold these out
    next."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._records: list[tuple[float, int, Screened]] = []  # a heap, the largest hash first
        self._n_added = 0

    def add(self, record: Screened) -> None:
        """Takes a record, and gives up the one with the largest hash if there are too many."""
        self._n_added += 1
        # The number decides between equal hashes, because records are not compared.
        entry = (-group_position(record.group), self._n_added, record)
        if len(self._records) < self._most:
            heapq.heappush(self._records, entry)
        else:
            heapq.heappushpop(self._records, entry)

    def records(self) -> list[Screened]:
        """Returns the records, by hash."""
        return [record for _, _, record in sorted(self._records, reverse=True, key=lambda entry: entry[:2])]


def _smallest_allowed(earlier: EarlierCorpora, records: Sequence[Screened]) -> float | None:
    """Returns the hash of the group of the first record that no earlier corpus has in train; None: earlier corpora have
    all of them there.

    Args:
        records: sorted by the hashes of their groups.

    Raises:
        ArtefactError, UserError: as `EarlierCorpora.marked`.
    """
    for record, forbidden in earlier.marked(records, lambda _: "val"):
        if not forbidden:
            return group_position(record.group)
    return None


@dataclass
class Groups:
    """Facts about the groups of a corpus for an error about held-out documents, in constant memory."""

    first: str = ""
    several: bool = False  # whether there is more than one
    n_read: int = 0  # documents
    smallest: float = 1.0  # smallest hash in [0, 1)

    def add(self, group: str) -> None:
        """Counts the group of a document."""
        self.n_read += 1
        self.first = self.first or group
        self.several = self.several or group != self.first
        self.smallest = min(self.smallest, group_position(group))


def why_nothing_is_held_out(
    config: CorpusConfig, corpus_name: str, groups: Groups, n_dropped: int, least_val_bytes: int
) -> str:
    """Returns why a corpus has no val document, and the way out.

    Args:
        n_dropped: held-out documents that were dropped.
        least_val_bytes: as in `TextSplits.least_val_bytes`; 0: `val_tokens` is not the cause.
    """
    own_source = "give a source of its own for val (held_out: true)"
    words_of_form = {
        "text": "are one text or of one repository",
        "conversation": "begin with the same user turn or have the same tools",
        "ranking": "have the same prompt",
    }

    if n_dropped:
        return (
            f"train documents contain each of the {n_dropped} that were chosen (overlapping): remove copies from the "
            f"data, or {own_source}, whose copies in train are dropped instead"
        )

    # No share helps, because a group is never divided.
    if not groups.several:
        words = words_of_form[form_of(config, corpus_name)]
        return f"they {words}, which is not divided: add other documents, or {own_source}"

    if least_val_bytes:
        return (
            f"the least part that could be has {least_val_bytes:,} bytes, and corpus.val_tokens={config.val_tokens} "
            f"is less ({BYTES_PER_TOKEN} bytes a token): expected at least {-(-least_val_bytes // BYTES_PER_TOKEN)}"
        )

    return (
        f"there are too few for corpus.val_fraction={config.val_fraction}: expected above {groups.smallest:.4f}, or "
        "more documents (limit of the sources)"
    )


def largest_share(config: CorpusConfig, corpus_name: str) -> float:
    """Returns the share of groups, in [0, 1], that a corpus holds out by hash if `val_tokens` allows.

    Raises:
        ConfigError: as `corpus_sources`.
    """
    # Sources that a user holds out replace the choice by hash.
    if any(source.held_out for source in corpus_sources(config, corpus_name)):
        return 0.0
    return config.val_fraction


def cleaned(config: CorpusConfig, record: Screened, split: str, report: IngestReport) -> Document:
    """Returns the document with placeholders for secrets and addresses, as `corpus.cleaning` says.

    Counts it in `report` as kept in `split`, with the placeholders.
    """
    document, steps = record.document, config.cleaning
    # In the JSON of a conversation, an escape before an address would count as a part of it.
    redact = redacted if document.form == "text" else redacted_json
    clean = redact(document.text, secrets=steps.secrets, emails=steps.emails)

    replaced = {KEY: clean.secrets, EMAIL: clean.emails}
    report.keep(record, split, {placeholder: times for placeholder, times in replaced.items() if times})
    # The columns that a corpus keeps of a row are as clean as its text.
    row = document.row
    if row:
        row = redacted_json(row, secrets=steps.secrets, emails=steps.emails).text
    return replace(document, text=clean.text, row=row)


def split_of_group(group: str, val_fraction: float) -> str:
    """Returns the split of a group: its hash, read as a number in [0, 1), is held out below `val_fraction`.

    Args:
        group: hexadecimal; the first 16 digits count.
    """
    return "val" if group_position(group) < val_fraction else "train"


def group_position(group: str) -> float:
    """Returns the hash of a group as a number in [0, 1)."""
    return int(group[:16], 16) / HASH_RANGE
