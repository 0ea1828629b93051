"""Rearranges slices of documents so that a model learns to fill in the middle between two texts.

At the level of tokens, after Bavarian et al. 2022, 'Efficient Training of Language Models to Fill in the Middle'
(arXiv 2207.14255), sections 3 and 4:

    slice   before middle after
    PSM     <|fim_prefix|> before <|fim_suffix|> after <|fim_middle|> middle
    SPM     <|fim_prefix|> <|fim_suffix|> after <|fim_middle|> before middle

The end-of-text that opens a document stays first. What follows a rearranged slice is end-of-text: it ends the middle.

This is their 'context-level' form. The text is cut into sequences first. A slice is the part of one document in one
sequence, so a rearranged slice always lies in one attention window, however long the document is. A sequence takes
fewer tokens of text, so that the marks fit in as well, and no token is lost.

The shards hold plain documents. Which slices of an epoch are rearranged, and where they are cut, are pure functions of
(seed, epoch) and the order of the epoch.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

from dist_lm.data.batch import SequenceContent
from dist_lm.data.order import DocumentSlice, EpochOrder, Shuffle, key, sequences_an_epoch, splitmix64, splitmix64_at
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.data.unit_order import UnitEpoch
from dist_lm.tokenizer.symbols import FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX
from dist_lm.tokenizer.tokenizer import Tokenizer

ADDED = 3  # marks of a rearranged slice, in tokens
LEAST = 16  # tokens of the shortest eligible slice
PLAIN, PSM, SPM = 0, 1, 2
INFILL_BLOCK = 16  # sequences of which `UnitInfillEpoch` chooses slices together


class InfillMarks(NamedTuple):
    """Ids of the three marks."""

    prefix: int
    suffix: int
    middle: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self:
        """Looks up the marks of a tokenizer.

        Raises:
            UserError: it lacks one.
        """
        return cls(*(tokenizer.mark_id(mark) for mark in (FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE)))

    def prompt(self, before: list[int], after: list[int]) -> list[int]:
        """Returns the ids that a model continues with the middle: PSM, as other programs ask.

        Args:
            before: ids of the text before the middle; the first one is end-of-text.
            after: ids of the text behind it.
        """
        return [before[0], self.prefix, *before[1:], self.suffix, *after, self.middle]


@dataclass(frozen=True)
class Infill:
    """How a corpus is rearranged."""

    rate: float  # share of the eligible slices of every epoch, half of them PSM, half SPM
    marks: InfillMarks


def rearranged(
    tokens: np.ndarray, begin: int, end: int, marks: InfillMarks, form: int = PSM, opens: bool = True
) -> np.ndarray:
    """Returns a slice whose tokens [begin, end) are the middle, rearranged: (n + 3,), of the same dtype.

    `tokens` is not changed.

    Args:
        tokens: (n,) ids.
        begin: at least 1 if `opens`.
        form: PSM | SPM.
        opens: whether the slice opens its document: the first token is end-of-text and stays first.
    """
    # The end-of-text that opens a document stays first, as in a plain slice.
    head = int(opens)
    assert head <= begin <= end <= len(tokens), (begin, end, len(tokens))
    before, middle, after = tokens[head:begin], tokens[begin:end], tokens[end:]
    prefix, suffix, mid = (np.array([mark], tokens.dtype) for mark in marks)
    if form == SPM:
        parts = (tokens[:head], prefix, suffix, after, mid, before, middle)
    else:
        parts = (tokens[:head], prefix, before, suffix, after, mid, middle)
    return np.concatenate(parts)


def restored(tokens: np.ndarray, marks: InfillMarks) -> np.ndarray:
    """Returns the plain slice, (n,), that `rearranged` made `tokens`, (n + 3,), of; any other slice as it is."""
    if marks.prefix not in tokens[:2]:
        return tokens

    # In SPM nothing stands before the suffix, and `before` stands with the middle, so one expression fits both forms.
    prefix, suffix, mid = (int(np.flatnonzero(tokens == mark)[0]) for mark in marks)
    return np.concatenate([tokens[:prefix], tokens[prefix + 1 : suffix], tokens[mid + 1 :], tokens[suffix + 1 : mid]])


def middle_of(length: int, draw_key: int, opens: bool = True) -> tuple[int, int]:
    """Draws the middle, tokens [begin, end) of a slice of `length` tokens; all pairs of cuts are equally likely.

    The middle is never empty; the text before it or behind it may be. The end-of-text that opens the slice is in none
    of the three.

    Args:
        length: in tokens, with the end-of-text that opens the slice; at least one other token.
        draw_key: of 64 bits; equal keys give equal draws.
        opens: as for `rearranged`.
    """
    head = int(opens)
    n_cuts = length - head + 1  # from before the first token to behind the last
    draws = splitmix64(draw_key, 2).tolist()

    # The second cut is drawn from one fewer and skips the first.
    first_cut = draws[0] % n_cuts
    second_cut = draws[1] % (n_cuts - 1)
    second_cut += second_cut >= first_cut
    return head + min(first_cut, second_cut), head + max(first_cut, second_cut)


def chosen_count(rate: float, n_eligible: int) -> int:
    """Counts the slices of an epoch that are rearranged: `rate` x eligible slices, rounded half up."""
    return int(rate * n_eligible + 0.5)


def most_slices(lengths: np.ndarray, rate: float, seq_len: int) -> int:
    """Returns how many slices of a sequence are eligible at most: as many documents as a sequence holds on average.

    It is 0 if the rate would choose none.

    Args:
        lengths: (documents,) tokens.
    """
    n_tokens = int(lengths.sum())
    most = min(1 + round(seq_len * len(lengths) / n_tokens), seq_len // LEAST)
    if not chosen_count(rate, most * sequences_an_epoch(n_tokens, seq_len)):
        return 0
    return most


class RearrangedEpoch(ABC):
    """The sequences of one epoch of text, some of their slices rearranged. Subclasses choose these slices."""

    def __init__(
        self,
        corpus: TokenCorpus,
        order: EpochOrder | UnitEpoch,
        infill: Infill,
        seed: int,
        epoch: int,
    ) -> None:
        self._corpus, self._order, self._marks = corpus, order, infill.marks
        self._key_prefix = (Shuffle.INFILL_MIDDLES, seed, epoch)

    @abstractmethod
    def _forms(self, begin: int, end: int) -> list[int]:
        """Returns the form of each slice of the sequence of tokens [begin, end) of the epoch."""

    def slices(self, i: int) -> list[DocumentSlice]:
        """Returns the slices of the sequence of visit i as they stand in their documents."""
        return self._order.sequence(i)

    def visits(self, part: DocumentSlice) -> list[int]:
        """Returns the visits whose sequences hold a token of a slice, which may have been rearranged there."""
        return self._order.visits(part)

    def content(self, i: int) -> SequenceContent:
        """Returns the content of the sequence of visit i, with its last target.

        A rearranged slice is longer by `ADDED` tokens than the text it is made of. Behind such a slice the last target
        is end-of-text. Only the slices are computed here; the tokens are read, and rearranged, when they are asked for.
        """
        begin = self._order.begin(i)
        end = begin + self._order.seq_len
        forms = self._forms(begin, end)
        slices = self._order.slices(begin, end)

        # Room for the marks makes the slice longer, and by that `_Rearranged` knows it again.
        rearranged_slices: dict[DocumentSlice, tuple[int, int]] = {}
        for j, form in enumerate(forms):
            if form != PLAIN:
                document, start, stop = slices[j]
                slices[j] = DocumentSlice(document, start, stop + ADDED)
                rearranged_slices[slices[j]] = form, stop

        # The last target follows the last slice; behind a middle it is always end-of-text.
        (following,) = self._order.slices(end, end + 1)
        if forms[-1] != PLAIN:
            slices.append(DocumentSlice(following.document, 0, 1))  # end-of-text, even where the document continues
        elif following.start:
            document, start, stop = slices[-1]
            slices[-1] = DocumentSlice(document, start, stop + 1)
        else:
            slices.append(following)
        return SequenceContent(_Rearranged(self._corpus, self._marks, self._key_prefix, rearranged_slices), slices)


class InfillEpoch(RearrangedEpoch):
    """Rearranges the exact share of the slices of an epoch; they are computed at once."""

    def __init__(
        self, corpus: TokenCorpus, order: EpochOrder, infill: Infill, most: int, seed: int, epoch: int
    ) -> None:
        """Chooses the slices.

        Args:
            order: of sequences that leave space for the marks of `most` slices.
            most: eligible slices of a sequence; of more slices the longest are eligible.
        """
        super().__init__(corpus, order, infill, seed, epoch)
        # The tail of the epoch is in no sequence.
        end = order.n_sequences * order.seq_len
        cuts = np.union1d(order.concatenation.ends, np.arange(order.n_sequences) * order.seq_len)
        self._begins = cuts[cuts < end]  # (slices,) position in the concatenated tokens
        lengths = np.diff(self._begins, append=end)
        self.eligible = _longest(lengths, self._begins // order.seq_len, most)  # (eligible slices,)

        n_chosen = chosen_count(infill.rate, len(self.eligible))
        hashes = splitmix64(key(Shuffle.INFILL_SLICES, seed, epoch), len(lengths))
        self.form = _chosen_forms(hashes, self.eligible, n_chosen, n_chosen // 2)  # (slices,)

    def _forms(self, begin: int, end: int) -> list[int]:
        return self.form[slice(*np.searchsorted(self._begins, (begin, end)))].tolist()


class UnitInfillEpoch(RearrangedEpoch):
    """Rearranges the share of the slices of each block of `INFILL_BLOCK` sequences, which are computed when they are
    asked for. The number of slices of a block is rounded up or down by chance, so that no rate is off its share."""

    def __init__(self, corpus: TokenCorpus, order: UnitEpoch, infill: Infill, most: int, seed: int, epoch: int) -> None:
        """Arguments are those of `InfillEpoch`."""
        super().__init__(corpus, order, infill, seed, epoch)
        self._rate, self._most = infill.rate, most
        self._slice_key, self._count_key = (
            key(purpose, seed, epoch) for purpose in (Shuffle.INFILL_SLICES, Shuffle.UNIT_INFILL)
        )

    def _forms(self, begin: int, end: int) -> list[int]:
        begins, form, _ = self.block(begin // self._order.seq_len // INFILL_BLOCK)
        return form[slice(*np.searchsorted(begins, (begin, end)))].tolist()

    def block(self, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns three arrays on the slices of a block of sequences: the token positions in the epoch where they begin
        (slices,) int64, their forms (slices,) uint8, and the numbers in the block of those that are eligible (eligible
        slices,).
        """
        seq_len = self._order.seq_len
        first, last = block * INFILL_BLOCK, min((block + 1) * INFILL_BLOCK, self._order.n_sequences)
        cuts = np.arange(first, last) * seq_len
        sizes = [stop - start for _, start, stop in self._order.slices(first * seq_len, last * seq_len)]
        ends = np.cumsum(sizes) + first * seq_len
        begins = np.union1d(ends[:-1], cuts)
        lengths = np.diff(begins, append=last * seq_len)
        eligible = _longest(lengths, begins // seq_len, self._most)

        # An odd slice is of either form, by chance too.
        chance = splitmix64_at(self._count_key, block)
        n_chosen = int(self._rate * len(eligible) + (chance >> 11) / 2**53)
        n_spm = (n_chosen + (chance & 1)) // 2
        hashes = splitmix64(splitmix64_at(self._slice_key, block), len(lengths))
        return begins, _chosen_forms(hashes, eligible, n_chosen, n_spm), eligible


@dataclass(frozen=True, slots=True)
class _Rearranged:
    """A corpus as one sequence reads it: slices that carry marks are rearranged."""

    corpus: TokenCorpus
    marks: InfillMarks
    key_prefix: tuple[int, ...]
    rearranged_slices: Mapping[DocumentSlice, tuple[int, int]]  # slice with marks -> form, and end in the document
    has_mask = False

    def tokens_of(self, slices: Sequence[DocumentSlice]) -> np.ndarray:
        """Returns the tokens of slices end to end, each as `tokens`: (n,).

        Raises:
            ArtefactError: the tar is damaged.
        """
        return np.concatenate([self.tokens(*part) for part in slices])

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Returns the tokens of a slice, rearranged if it was chosen: (stop - start,).

        Raises:
            ArtefactError: the tar is damaged.
        """
        form, end = self.rearranged_slices.get(DocumentSlice(document, start, stop), (PLAIN, stop))
        plain = self.corpus.tokens(document, start, end)
        if form == PLAIN:
            return plain

        # The key holds neither rank nor sequence number: the layout and a resume change no cut.
        opens = start == 0
        cuts = middle_of(len(plain), key(*self.key_prefix, document, start), opens)
        return rearranged(plain, *cuts, self.marks, form, opens)

    def mask(self, document: int, start: int, stop: int) -> np.ndarray:
        """Returns ones, because every token is learned: (stop - start,) uint8."""
        return np.ones(stop - start, np.uint8)


def _chosen_forms(hashes: np.ndarray, eligible: np.ndarray, n_chosen: int, n_spm: int) -> np.ndarray:
    """Returns the form of each slice: the eligible slices with the smallest hashes are rearranged, the first of them as
    SPM. (slices,) uint8.

    Args:
        hashes: (slices,) uint64.
        eligible: (eligible slices,) numbers.
    """
    forms = np.zeros(len(hashes), np.uint8)
    hashes_of_eligible = hashes[eligible]
    for form, count in ((PSM, n_chosen), (SPM, n_spm)):
        if count:
            largest_hash = np.partition(hashes_of_eligible, count - 1)[count - 1]
            forms[eligible[hashes_of_eligible <= largest_hash]] = form
    return forms


def _longest(lengths: np.ndarray, sequence: np.ndarray, most: int) -> np.ndarray:
    """Selects slices of at least `LEAST` tokens, of each sequence the `most` longest: their numbers, rising.

    Args:
        lengths: (slices,) tokens.
        sequence: (slices,) rising numbers.
    """
    slices = np.flatnonzero(lengths >= LEAST)
    slices = slices[np.lexsort((-lengths[slices], sequence[slices]))]
    sequence_of_slice = sequence[slices]
    n_longer = np.arange(len(slices)) - np.searchsorted(sequence_of_slice, sequence_of_slice)  # in the same sequence
    return np.sort(slices[n_longer < most])
