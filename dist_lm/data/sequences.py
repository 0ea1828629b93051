"""Finds training sequences by number: those of one corpus over all epochs, and of several corpora in one stream.

Both are pure functions of the number, so the state of a stream is one integer, and how a step is cut into ranks and
micro-batches changes nothing.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import numpy as np

from dist_lm.data.batch import SequenceContent
from dist_lm.data.infill import ADDED, Infill, InfillEpoch, RearrangedEpoch, UnitInfillEpoch, most_slices
from dist_lm.data.order import DocumentSlice, EpochOrder, Shuffle, key, permutation, sequences_an_epoch
from dist_lm.data.packing import DROP, SPLIT, TRUNCATE, PackedEpoch, Packing
from dist_lm.data.phases import PhasedMix
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.data.unit_order import UnitEpoch, WindowEpoch
from dist_lm.errors import ArtefactError

if TYPE_CHECKING:
    from dist_lm.data.without import DocumentIds

SEQ_LEN = "stage.seq_len"
CACHED_EPOCHS = 2  # sequences are read in rising numbers, and a step may cross the end of an epoch
BLOCK = 100  # sequences; shares are whole per cent
DOCUMENTS, UNITS, WINDOWS = ORDERS = ("documents", "units", "windows")  # items that an epoch of text shuffles

Order = TypeVar("Order")


class Epochs(Generic[Order]):
    """Caches the orders of the epochs that are being read. Every epoch has `n_sequences`, numbered over all epochs."""

    def __init__(self, n_sequences: int, order: Callable[[int], Order]) -> None:
        """`order`: computes the order of an epoch."""
        self._n_sequences, self._order = n_sequences, order
        self._cache: dict[int, Order] = {}

    def locate(self, number: int) -> tuple[Order, int]:
        """Returns the order of the epoch that holds sequence `number`, and its number inside the epoch.

        An order is computed once, and kept until `CACHED_EPOCHS` other epochs were asked for.
        """
        epoch, i = divmod(number, self._n_sequences)
        return self.order(epoch), i

    def order(self, epoch: int) -> Order:
        """Returns the order of an epoch; cached as by `locate`."""
        if epoch not in self._cache:
            self._cache[epoch] = self._order(epoch)
            while len(self._cache) > CACHED_EPOCHS:
                oldest = next(iter(self._cache))
                del self._cache[oldest]
        return self._cache[epoch]


class HasVisits(Protocol):
    """The order of an epoch, in which slices can be looked up."""

    def visits(self, part: DocumentSlice) -> list[int]: ...


def numbers_with(
    order_of: Callable[[int], HasVisits], n_sequences: int, parts: Sequence[DocumentSlice], end: int
) -> dict[DocumentSlice, list[int]]:
    """Returns the sequences, numbered over all epochs, below `end` that hold a token of each slice: rising numbers.

    Args:
        order_of: maps an epoch to its order.
        n_sequences: of an epoch.
    """
    numbers: dict[DocumentSlice, list[int]] = {part: [] for part in parts}
    # Epoch by epoch, because the order of one takes seconds in a large corpus.
    for epoch in range(-(-end // n_sequences)):
        order, first = order_of(epoch), epoch * n_sequences
        for part, numbers_of_part in numbers.items():
            numbers_of_part += [number for i in order.visits(part) if (number := first + i) < end]
    return numbers


class CorpusSequences:
    """The sequences of one corpus, numbered 0, 1, 2, ... over all epochs.

    Text is laid end to end and cut, so only the rest at the end of an epoch is left out. Conversations (a corpus with a
    loss mask) stay whole, as long as they fit into a sequence.
    """

    def __init__(
        self,
        corpus: TokenCorpus,
        seed: int,
        seq_len: int,
        seq_len_key: str = SEQ_LEN,
        infill: Infill | None = None,
        too_long: str = DROP,
        without: Collection[int] = (),
        order: str = DOCUMENTS,
    ) -> None:
        """Opens the sequences of a corpus.

        Args:
            seq_len_key: the configuration key that `seq_len` comes from, for errors.
            infill: rearranges slices of documents of text; all epochs still have `n_sequences`.
            too_long: what becomes of conversations that are longer than a sequence (`packing.TOO_LONG`).
            without: documents whose loss does not count, beside those that the corpus excludes. They keep their
                places, so the order of data stays.
            order: what an epoch of text shuffles; one of `ORDERS`.

        Raises:
            ArtefactError: the corpus does not fill a sequence.
        """
        self.corpus, self._without = corpus, corpus.excluded.union(without)
        self._seed, self._infill = seed, infill
        self._epoch_of_units = {UNITS: UnitEpoch, WINDOWS: WindowEpoch}.get(order)

        # Each sequence takes less text, which leaves space for the marks of the slices that may be rearranged.
        self._max_slices = 0
        if infill:
            assert not corpus.has_mask, "conversations are not rearranged"
            self._max_slices = most_slices(corpus.lengths, infill.rate, seq_len)
        self._text_len = seq_len - ADDED * self._max_slices

        self.packing: Packing | None = None
        if corpus.has_mask:
            self.packing = packed(corpus, seq_len, seq_len_key, too_long=too_long)
            self.n_sequences = self.packing.n_rows  # in every epoch
        else:
            self.n_sequences = sequences_an_epoch(corpus.n_tokens, self._text_len)
        if self.n_sequences == 0:
            raise ArtefactError(
                f"corpus {corpus.directory} has {corpus.n_tokens} {corpus.split} tokens, but one sequence of "
                f"{seq_len_key}={seq_len} takes {seq_len + 1}: shorten {seq_len_key} or add text"
            )
        self._epochs = Epochs(self.n_sequences, self._order)

    def content(self, number: int) -> SequenceContent:
        """Returns the content of sequence `number`: `seq_len + 1` tokens, perhaps fewer of conversations and with
        `infill`.
        """
        return self.contents([number])[0]

    def contents(self, numbers: Sequence[int]) -> list[SequenceContent]:
        """Returns the contents of some sequences, as `content` does. A sequence of text takes less time among many."""
        contents: list[SequenceContent] = []
        for epoch, numbers_of_epoch in groupby(numbers, lambda number: number // self.n_sequences):
            order, visits = self._epochs.order(epoch), [number % self.n_sequences for number in numbers_of_epoch]
            if isinstance(order, RearrangedEpoch):
                contents += [order.content(i)._replace(without=self._without) for i in visits]
            elif isinstance(order, PackedEpoch):
                contents += [SequenceContent(self.corpus, order.sequence(i), self._without) for i in visits]
            else:
                table = order.table(np.array(visits))
                rows = zip(self.corpus.located(table), table.slices(), strict=True)
                contents += [SequenceContent(located, slices, self._without) for located, slices in rows]
        return contents

    def slices(self, number: int) -> list[DocumentSlice]:
        """Returns the slices of documents in sequence `number`, with the last target, as they stand in the corpus."""
        order, i = self._epochs.locate(number)
        return order.slices(i) if isinstance(order, RearrangedEpoch) else order.sequence(i)

    def numbers(self, parts: Sequence[DocumentSlice], end: int) -> dict[DocumentSlice, list[int]]:
        """Returns the sequences below `end` that hold a token of each slice: rising numbers.

        Takes a pass over the order of each epoch for each slice.
        """
        return numbers_with(self._epochs.order, self.n_sequences, parts, end)

    def _order(self, epoch: int) -> EpochOrder | UnitEpoch | PackedEpoch | RearrangedEpoch:
        # Conversations stay whole; text is cut, and its slices may be rearranged.
        if self.packing:
            return PackedEpoch(self.packing, self._seed, epoch)

        infill = self._infill if self._max_slices else None
        if self._epoch_of_units:
            order = self._epoch_of_units(self.corpus.units, self._seed, epoch, self._text_len)
            if infill:
                return UnitInfillEpoch(self.corpus, order, infill, self._max_slices, self._seed, epoch)
            return order

        order = EpochOrder(self.corpus.lengths, self._seed, epoch, self._text_len, self.corpus.continues)
        if infill:
            return InfillEpoch(self.corpus, order, infill, self._max_slices, self._seed, epoch)
        return order


class Mix:
    """Mixes sequences of several corpora into one stream. Corpus 0 is the stage's own and has the remaining share.

    Every block of 100 sequences holds each corpus by its exact share, in a shuffled order of its own.
    """

    def __init__(self, shares: Sequence[float], seed: int) -> None:
        """`shares`: those of corpora 1, 2, ...; whole per cent, with a sum below 1."""
        mixed_sequences = [round(share * BLOCK) for share in shares]
        self._sequences_of = np.array([BLOCK - sum(mixed_sequences), *mixed_sequences])  # (corpora,) in a block
        assert self._sequences_of.min() > 0, shares
        self._seed = seed
        self._block = -1
        self._corpora = self._numbers_in_block = np.empty(0, np.int64)

    def locate(self, number: int) -> tuple[int, int]:
        """Returns (corpus, number within it) of global sequence `number`.

        Every corpus is read in its own order, without a gap.
        """
        block, i = divmod(number, BLOCK)
        # Sequences are read in rising numbers, so one block in memory is enough.
        if block != self._block:
            self._shuffle(block)
        corpus = int(self._corpora[i])
        return corpus, block * int(self._sequences_of[corpus]) + int(self._numbers_in_block[i])

    def number(self, corpus: int, number: int) -> int:
        """Returns the global number of a sequence of a corpus: the inverse of `locate`."""
        block, i = divmod(number, int(self._sequences_of[corpus]))
        if block != self._block:
            self._shuffle(block)
        return block * BLOCK + int(np.flatnonzero(self._corpora == corpus)[i])

    def count(self, corpus: int, end: int) -> int:
        """Returns how many of the global sequences below `end` are of a corpus."""
        block, rest = divmod(end, BLOCK)
        if block != self._block:
            self._shuffle(block)
        return block * int(self._sequences_of[corpus]) + int((self._corpora[:rest] == corpus).sum())

    def _shuffle(self, block: int) -> None:
        """Computes the corpus of each sequence of a block, and how many of that corpus come before it there."""
        corpora = np.repeat(np.arange(len(self._sequences_of)), self._sequences_of)
        self._corpora = corpora[permutation(BLOCK, key(Shuffle.MIX, self._seed, block))]
        is_same_corpus = self._corpora[:, None] == self._corpora[None, :]
        self._numbers_in_block = np.tril(is_same_corpus, -1).sum(1)
        self._block = block


@dataclass(frozen=True)
class PhasedCorpora:
    """The corpora beside the stage's own one in a run with phases, and how its phases mix all of them."""

    corpora: Sequence[TokenCorpus]
    mix: Callable[[Sequence[int]], PhasedMix]  # from the sequences of an epoch of each corpus, the stage's own first


class MixedSequences:
    """The sequences of a stream of texts and conversations, numbered over all epochs: those of the stage's own corpus,
    with shares of others."""

    def __init__(
        self,
        corpus: TokenCorpus,
        *,
        seed: int,
        seq_len: int,
        mix: Mapping[TokenCorpus, float] | PhasedCorpora | None = None,
        seq_len_key: str = SEQ_LEN,
        infill: Infill | None = None,
        too_long: str = DROP,
        without: "DocumentIds | None" = None,
        order: str = DOCUMENTS,
    ) -> None:
        """Opens the sequences. Arguments that are not listed are those of `CorpusSequences`.

        Args:
            mix: further corpora with their shares of all sequences (`Mix`), or with phases (`PhasedMix`).
            infill: rearranges slices of documents of `corpus`; the corpora of `mix` stay as they are.
            without: documents whose loss does not count, by the folders of their corpora.

        Raises:
            ArtefactError: a corpus fills no sequence.
            ConfigError: a corpus cannot fill a phase.
        """
        # The stage's own corpus is number 0, as in both kinds of mixes.
        mixed_corpora = mix.corpora if isinstance(mix, PhasedCorpora) else list(mix or {})
        self.of_corpora = [
            CorpusSequences(
                each,
                seed,
                seq_len,
                seq_len_key,
                infill if each is corpus else None,
                too_long,
                (without or {}).get(each.directory.name, ()),
                order,
            )
            for each in (corpus, *mixed_corpora)
        ]

        self._mix: Mix | PhasedMix
        if isinstance(mix, PhasedCorpora):
            self._mix = mix.mix([sequences.n_sequences for sequences in self.of_corpora])
        else:
            self._mix = Mix(list((mix or {}).values()), seed)

    @property
    def corpora(self) -> list[TokenCorpus]:
        """The corpora, that of the stage first."""
        return [sequences.corpus for sequences in self.of_corpora]

    def contents(self, numbers: Sequence[int]) -> list[SequenceContent]:
        """Returns the contents of some global sequences."""
        located = [self._mix.locate(number) for number in numbers]
        contents = {
            corpus: iter(self.of_corpora[corpus].contents([number for each, number in located if each == corpus]))
            for corpus in dict(located)
        }
        return [next(contents[corpus]) for corpus, _ in located]

    def slices(self, number: int) -> tuple[TokenCorpus, list[DocumentSlice]]:
        """Returns the corpus of global sequence `number`, and the slices of its documents."""
        corpus, number_in_corpus = self._mix.locate(number)
        sequences = self.of_corpora[corpus]
        return sequences.corpus, sequences.slices(number_in_corpus)

    def numbers(self, corpus: TokenCorpus, parts: Sequence[DocumentSlice], end: int) -> dict[DocumentSlice, list[int]]:
        """Returns the global sequences below `end` that hold a token of each slice of a corpus: rising numbers."""
        number_in_mix = next(i for i, sequences in enumerate(self.of_corpora) if sequences.corpus is corpus)
        in_corpus = self.of_corpora[number_in_mix].numbers(parts, self._mix.count(number_in_mix, end))
        return {
            part: [self._mix.number(number_in_mix, number) for number in numbers] for part, numbers in in_corpus.items()
        }


def packed(
    corpus: TokenCorpus,
    seq_len: int,
    seq_len_key: str = SEQ_LEN,
    kind: str = "conversations",
    too_long: str = DROP,
) -> Packing:
    """Returns the rows into which a corpus whose documents stay whole is packed.

    Args:
        seq_len: in tokens.
        seq_len_key: the configuration key, for the message.
        kind: conversations | rankings.
        too_long: what becomes of documents that no row holds (`packing.TOO_LONG`).

    Raises:
        ArtefactError: no document fits into a sequence; names the corpus, the key and the length that would fit.
    """
    # `Packing` allows one token more than `seq_len`, for the last target; rankings have none.
    targets = _only_targets(kind)
    packing = Packing(corpus.lengths, seq_len + targets - 1, too_long)
    if packing.n_rows == 0:
        raise ArtefactError(
            f"corpus {corpus.directory}: all {corpus.n_documents:,} {corpus.split} {kind} are longer than "
            f"{seq_len_key}={seq_len}: raise it (the shortest takes {int(corpus.lengths.min()) - targets})"
        )
    return packing


def note_of_left_out(
    corpus: TokenCorpus,
    seq_len: int,
    seq_len_key: str = SEQ_LEN,
    kind: str = "conversations",
    too_long: str = DROP,
) -> str:
    """Returns a line about the documents that no sequence holds; empty if there are none, or for a corpus of texts.

    Args:
        seq_len: in tokens.
        seq_len_key: the configuration key, for the line.
        kind: conversations | rankings.
        too_long: what becomes of them (`packing.TOO_LONG`).
    """
    if not corpus.has_mask:
        return ""
    targets = _only_targets(kind)
    left_out = int((corpus.lengths > seq_len + targets).sum())
    if not left_out:
        return ""
    fate = {DROP: "left out", TRUNCATE: "truncated", SPLIT: "split"}[too_long]
    return (
        f"corpus {corpus.directory}: {left_out:,} of {corpus.n_documents:,} {corpus.split} {kind} "
        f"({left_out / corpus.n_documents:.1%}) are longer than {seq_len_key}={seq_len} and are {fate}; "
        f"{int(corpus.lengths.max()) - targets} would take all"
    )


def _only_targets(kind: str) -> int:
    """Returns how many tokens of a row are targets but no inputs: 1, the last; 0 for rankings, which lack targets."""
    if kind == "rankings":
        return 0
    return 1
