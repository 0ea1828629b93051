"""From sources to train and val: which documents are held out, and that nothing of them is left in train.

The hash of a document's group decides between train and val; the document's position and the seed do not. Groups with
the smallest hashes are held out: a share of `val_fraction`, halved until the held-out texts of the corpus fit
`val_tokens`. So a corpus that grows keeps its sides, until twice as much is held out: then half of val moves to train,
and nothing ever moves from train to val.

Held-out texts are compared with the train texts of all corpora of the configuration (`data.containment`): one that
train texts contain is dropped. Documents of a source with `held_out` are val whatever their hash; train
documents that contain one are dropped. Where a corpus has such a source, its other sources are train.

Texts are read to choose val, to compare, and by the caller. The first corpus that the caller reads is compared
meanwhile, unless a user holds texts out: train documents are dropped for these. A corpus holds texts, or conversations,
or rankings. Conversations share their forms, so shared words say nothing about leakage: the group of one
with generated tools is its tools, of any other what its user says, and of a ranking its prompt. They are read once.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, TextIO

from dist_lm.config.corpus import BYTES_PER_TOKEN, CorpusConfig, SourceConfig
from dist_lm.data.containment import HeldOut, Notes
from dist_lm.data.redaction import EMAIL, KEY, redacted, redacted_json
from dist_lm.data.screening import IngestReport, Screened, SourceReader, screened
from dist_lm.data.sources.reader import Candidate, corpus_sources, form_of, text_corpora
from dist_lm.document import Document
from dist_lm.errors import ArtefactError, ConfigError

LARGEST = 2**64  # of the hash of a group


@dataclass(frozen=True)
class Sides:
    """Which documents of a configuration are held out, and which are dropped for it."""

    held_out: Mapping[str, float]  # corpus -> share of the groups that is held out
    leaked: frozenset[bytes] = frozenset()  # keys of held-out texts that train texts contain
    refused: frozenset[bytes] = frozenset()  # keys of train texts that contain a text of a source with `held_out`
    groups: frozenset[str] = frozenset()  # of conversations and rankings of sources with `held_out`

    def split_of(self, corpus_name: str, item: Screened) -> str:
        """The side of a document, whether it is dropped or not."""
        if item.source.held_out:
            return "val"
        return split_of(item.group, self.held_out[corpus_name])

    def reason(self, split: str, item: Screened) -> str:
        """Why a document of this side is dropped (empty: it is not)."""
        if split == "val":
            return "overlapping" if item.key in self.leaked else ""
        return "contains_val" if item.key in self.refused or item.group in self.groups else ""


class _Val(NamedTuple):
    """The held-out texts of all corpora."""

    shares: dict[str, float]  # as `Sides.held_out`
    keys: list[bytes]
    given: set[bytes]  # keys of the texts for which train documents are dropped
    index: HeldOut
    notes: Notes


class Texts:
    """What the sources of a configuration give, and the sides of its texts, computed when they are first needed."""

    def __init__(
        self,
        config: CorpusConfig,
        seed: int,
        made: dict[str, list[Candidate]] | None = None,
        frozen: frozenset[str] = frozenset(),
    ) -> None:
        """Open the sources.

        Args:
            seed: decides the text of generated sources and nothing else.
            made: as for `SourceReader`.
            frozen: corpora that are not built again: train documents that contain one of their val are dropped.
        """
        self.config = config
        self.frozen = frozen
        self.reader = SourceReader(seed, made)
        self._compared: set[str] = set()  # corpora

    def screened(
        self, corpus_name: str, report: IngestReport | None = None, rejected: TextIO | None = None
    ) -> Iterator[Screened]:
        """The documents of one corpus before they are divided."""
        texts: set[bytes] = set()
        if self.config.cleaning.across_corpora and corpus_name in (names := text_corpora(self.config)):
            for earlier in names[: names.index(corpus_name)]:
                for _ in screened(self.config, earlier, self.reader, texts, IngestReport()):
                    pass
        yield from screened(self.config, corpus_name, self.reader, texts, report or IngestReport(), rejected)

    @property
    def train_sides(self) -> Sides:
        """The sides of train documents, known before they are compared unless a user holds texts out.

        Raises:
            ConfigError, ArtefactError: as `divided`.
        """
        return self.sides if "sides" in vars(self) or self._val.given else Sides(self._val.shares)

    @cached_property
    def sides(self) -> Sides:
        """The sides of all texts. Corpora that were not compared yet are read.

        Raises:
            ConfigError, ArtefactError: as `divided`.
        """
        self.compare(text_corpora(self.config))
        val = self._val
        refused = val.notes.finish() | val.given
        leaked = {val.keys[number] for number in val.index.contained()}
        del self._val  # and the windows
        return Sides(val.shares, frozenset(leaked), frozenset(refused))

    def compare(self, corpora: Iterable[str]) -> None:
        """Compare train of `corpora` with val, unless that was done."""
        for name in corpora:
            if name not in self._compared:
                for _ in self.compared(name, self.screened(name)):
                    pass

    def compared(self, corpus_name: str, items: Iterable[Screened]) -> Iterator[Screened]:
        """The same documents; the train texts among them are compared with val, unless that was done."""
        if corpus_name in self._compared:
            yield from items
            return
        val = self._val
        sides = Sides(val.shares)
        for item in items:
            if sides.split_of(corpus_name, item) == "train" and item.key not in val.given:
                val.notes.add(item.key, item.document.text)
            yield item
        self._compared.add(corpus_name)

    @cached_property
    def _val(self) -> _Val:
        """Read all corpora of texts once. The texts of val, at most `val_tokens` of a corpus, become an index."""
        shares: dict[str, float] = {}
        texts: dict[bytes, str] = {}
        given: set[bytes] = set()
        for name in text_corpora(self.config):
            shares[name], chosen = self._choose(name)
            texts |= {item.key: item.document.text for item in chosen}
            given |= {item.key for item in chosen if item.source.held_out or name in self.frozen}
            del chosen
        keys = list(texts)
        index = HeldOut([*texts.values()], [key in given for key in keys])
        return _Val(shares, keys, given, index, Notes(index))

    def sides_by_group(self, corpus_name: str) -> Sides:
        """The sides of the conversations or rankings of a corpus."""
        given = [source for source in corpus_sources(self.config, corpus_name) if source.held_out]
        groups = (one.group for source in given for one in self.reader.read(source) if isinstance(one, Document))
        return Sides({corpus_name: largest_share(self.config, corpus_name)}, groups=frozenset(groups))

    def _choose(self, corpus_name: str) -> tuple[float, list[Screened]]:
        """`(share, held-out documents)` of a corpus: the share of groups that is held out by hash."""
        room = self.config.val_tokens * BYTES_PER_TOKEN
        share = largest_share(self.config, corpus_name)
        chosen: list[Screened] = []
        size = 0
        for item in self.screened(corpus_name):
            if item.source.held_out or split_of(item.group, share) == "val":
                chosen.append(item)
                size += item.n_bytes
            if share == 0 and size > room:
                raise ConfigError(
                    f"corpus {corpus_name}: its sources with held_out=true have more text than "
                    f"corpus.val_tokens={self.config.val_tokens} ({BYTES_PER_TOKEN} bytes a token): expected a larger "
                    "val_tokens, or less text"
                )
            while size > room:
                share /= 2
                chosen = [one for one in chosen if split_of(one.group, share) == "val"]
                size = sum(one.n_bytes for one in chosen)
        return share, chosen


def divided(
    config: CorpusConfig,
    corpus_name: str,
    seed: int,
    report: IngestReport,
    texts: Texts | None = None,
    rejected: TextIO | None = None,
) -> Iterator[tuple[str, Document, SourceConfig]]:
    """`(split, document, source)` of every document of a corpus: all of train, then all of val, source by source.

    The order and the documents depend on the configuration, the seed and the inputs alone. In memory are val, and a
    hash of every kept text, to find duplicates.

    Args:
        report: counts what is kept and dropped.
        texts: of the same config and seed, to decide on the sides once for several corpora.
        rejected: gets a line of JSON for each broken row.

    Raises:
        ConfigError: the corpus or a reader does not exist, or a reader yields something else than documents.
        ArtefactError: a source gives no document, too many of its rows are broken, or no document is left for
            val or train.
    """
    texts = texts or Texts(config, seed)
    splits: Counter[str] = Counter()

    def kept(item: Screened, split: str, sides: Sides) -> Iterator[tuple[str, Document, SourceConfig]]:
        if reason := sides.reason(split, item):
            report.reject(item.document, item.source, reason)
        else:
            splits[split] += 1
            yield split, cleaned(config, item, split, report), item.source

    items, val = texts.screened(corpus_name, report, rejected), []
    if is_text := form_of(config, corpus_name) == "text":
        sides, items = texts.train_sides, texts.compared(corpus_name, items)
    else:
        sides = texts.sides_by_group(corpus_name)
    for item in items:
        if sides.split_of(corpus_name, item) == "val":
            val.append(item)
        else:
            yield from kept(item, "train", sides)
    sides = texts.sides if is_text else sides
    for item in val:
        yield from kept(item, "val", sides)
    if not splits["val"]:
        raise ArtefactError(
            f"corpus {corpus_name}: none of its {splits.total()} documents is held out at "
            f"corpus.val_fraction={config.val_fraction} and corpus.val_tokens={config.val_tokens}: raise them, or the "
            "limit of the sources"
        )
    if not splits["train"]:
        raise ArtefactError(
            f"corpus {corpus_name}: none of its {splits.total()} documents is left for train: val holds all of them, "
            "or train documents contain val (contains_val): give a source of train documents"
        )


def largest_share(config: CorpusConfig, corpus_name: str) -> float:
    """The share of groups that a corpus holds out by hash if `val_tokens` allows."""
    given = any(source.held_out for source in corpus_sources(config, corpus_name))
    return 0.0 if given else config.val_fraction


def cleaned(config: CorpusConfig, item: Screened, split: str, report: IngestReport) -> Document:
    """The document with placeholders for what `corpus.cleaning` replaces; it is counted as kept."""
    document, steps = item.document, config.cleaning
    replaced = redacted if document.form == "text" else redacted_json
    found = replaced(document.text, secrets=steps.secrets, emails=steps.emails)
    counts = {KEY: found.secrets, EMAIL: found.emails}
    report.keep(item, split, {placeholder: times for placeholder, times in counts.items() if times})
    return replace(document, text=found.text) if any(counts.values()) else document


def split_of(group: str, val_fraction: float) -> str:
    """The side of a group: its hash as a number in [0, 1), held out below `val_fraction`."""
    return "val" if int(group[:16], 16) / LARGEST < val_fraction else "train"
