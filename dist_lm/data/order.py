"""Orders of data: shuffles by keys, and how an epoch of text is cut into sequences. All of it is pure functions.

A shuffle sorts the numbers 0, 1, ... by the outputs of SplitMix64 (Steele, Lea and Flood, 'Fast splittable
pseudorandom number generators', OOPSLA 2014). Its outputs are a bijection of its counter, so there are no ties, and
the order depends on no library's generator or sorting algorithm. The first word of every key is a `Shuffle`, so no two
shuffles of one seed are the same.

An epoch of text is a function of (seed, epoch, document lengths, sequence length). Documents are shuffled, laid end to
end, and cut into sequences wherever a sequence is full; only the rest at the end of the epoch, which fills none, is
left out. The sequences are then visited in a second shuffled order, so that the parts of one long document do not meet
in a batch.
"""

import hashlib
from enum import IntEnum, unique
from itertools import islice
from typing import NamedTuple

import numpy as np

_WORD = 2**64
_MASK = _WORD - 1
_GAMMA = 0x9E3779B97F4A7C15


@unique
class Shuffle(IntEnum):
    """The purposes of shuffles and draws. A changed number changes the order of data: new ones go to the end."""

    TEXT_DOCUMENTS = 1  # documents of text in an epoch
    TEXT_SEQUENCES = 2  # the sequences cut from them
    PACKED_DOCUMENTS = 3  # documents of one length change places
    PACKED_ROWS = 4  # rows of whole documents
    PACKED_INSIDE = 5  # documents inside a row
    MIX = 6  # the corpora of a block of sequences
    LABEL_NOISE = 7  # judgements that are reversed
    PAIRS = 8  # pairs of a ranking
    SAMPLES = 9  # samples of stage rankings
    SAMPLE_LINES = 10  # the cuts of the beginnings of these samples
    PROMPTS = 11  # prompts of stage rlhf
    UPDATES = 12  # rollouts in an epoch of updates
    INFILL_SLICES = 13  # slices of documents that an epoch rearranges
    INFILL_MIDDLES = 14  # the cuts of these slices
    INFILL_HELD_OUT = 15  # the cuts of slices of held-out documents
    HIDDEN_TESTS = 16  # inputs of hidden tests
    UNITS = 17  # units of documents of text in an epoch
    UNIT_ROTATIONS = 18  # documents with which they begin
    UNIT_SEQUENCES = 19  # the sequences cut from them
    UNIT_INFILL = 20  # the number of slices of a block of sequences that are rearranged
    UNIT_CHUNKS = 21  # chunks of a corpus that make windows


def permutation(n: int, seed: int) -> np.ndarray:
    """Sorts the numbers 0 .. n-1 by the outputs of SplitMix64 from `seed`: (n,) int64."""
    return np.argsort(splitmix64(seed, n))


def splitmix64(seed: int, n: int) -> np.ndarray:
    """Returns the first n outputs of SplitMix64 from `seed`, of which the lowest 64 bits count: (n,) uint64."""
    return _mixed(np.arange(1, n + 1, dtype=np.uint64), seed)


def splitmix64_of(seed: int, numbers: np.ndarray) -> np.ndarray:
    """Returns the outputs of SplitMix64 of these numbers, counted from 0: uint64, of the shape of `numbers`.

    Args:
        numbers: of an integer type.
    """
    return _mixed(numbers.astype(np.uint64) + np.uint64(1), seed)


def _mixed(state: np.ndarray, seed: int) -> np.ndarray:
    """Turns counters of SplitMix64, from 1 on, into its outputs. In place, because these may be all documents."""
    state *= np.uint64(_GAMMA)
    state += np.uint64(seed % _WORD)
    state ^= state >> np.uint64(30)
    state *= np.uint64(0xBF58476D1CE4E5B9)
    state ^= state >> np.uint64(27)
    state *= np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return state


def splitmix64_at(seed: int, i: int) -> int:
    """Returns output number i of SplitMix64 from `seed`, counted from 0. One number is faster so than with NumPy."""
    # An AND takes less time than a remainder.
    state = (seed + (i + 1) * _GAMMA) & _MASK
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
    return state ^ state >> 31


def key(*words: int) -> int:
    """Hashes several integers into one 64-bit key, which depends on each integer and on their order."""
    # Each word goes into the hash of those before it, so that (1, 2) and (2, 1) differ.
    state = 0
    for word in words:
        state = int(splitmix64((state + word) % _WORD, 1)[0])
    return state


def text_word(text: str) -> int:
    """Returns 64 bits of the SHA-256 of a text: the word of a key that stands for it."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# --- an epoch of text ---


class DocumentSlice(NamedTuple):
    """Tokens [start, stop) of a document."""

    document: int
    start: int
    stop: int


class SliceTable(NamedTuple):
    """Slices of documents that cover several ranges of tokens, those of one range behind those of another."""

    documents: np.ndarray  # (slices,) int64
    starts: np.ndarray  # (slices,) int64; tokens of the document before the slice
    stops: np.ndarray  # (slices,) int64
    counts: np.ndarray  # (ranges,) int64; slices of each range

    def slices(self) -> list[list[DocumentSlice]]:
        """Returns the slices of each range."""
        columns = (column.tolist() for column in (self.documents, self.starts, self.stops))
        slices = map(DocumentSlice, *columns)
        return [list(islice(slices, count)) for count in self.counts.tolist()]


def expanded(first: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers first[i], first[i] + 1, ... of each i, `counts[i]` of them, and for each number its i."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return np.arange(len(owner)) + (first - np.cumsum(counts) + counts)[owner], owner


def following(column: np.ndarray, index: np.ndarray, end: int) -> np.ndarray:
    """Returns for each index the next element of the column; `end` for the index of the last element."""
    behind = index + 1
    return np.where(behind < len(column), column[np.minimum(behind, len(column) - 1)], end)


class Concatenation:
    """Documents laid end to end. Maps positions in these tokens to slices of documents."""

    def __init__(self, lengths: np.ndarray, documents: np.ndarray) -> None:
        """`lengths`: (n,) tokens by document number; `documents`: the numbers in the order in which they are laid."""
        self._documents, self._lengths = documents, lengths
        self.ends = np.cumsum(lengths[documents], dtype=np.int64)  # (n,) positions behind each document
        self.n_tokens = int(self.ends.max(initial=0))

    def begin(self, document: int) -> int:
        """Returns the position of the first token of a document; reads the whole order."""
        index = int((self._documents == document).argmax())
        return int(self.ends[index]) - int(self._lengths[document])

    def slices(self, begin: int, end: int) -> list[DocumentSlice]:
        """Returns the slices that cover the tokens [begin, end), in order; `end` is at most `n_tokens`."""
        assert 0 <= begin <= end <= self.n_tokens, (begin, end, self.n_tokens)
        index = int(np.searchsorted(self.ends, begin, side="right"))
        document_begin = int(self.ends[index - 1]) if index else 0

        slices = []
        while begin < end:
            document_end = int(self.ends[index])
            # An empty document gives no slice.
            if n_tokens := min(end, document_end) - begin:
                start = begin - document_begin
                slices.append(DocumentSlice(int(self._documents[index]), start, start + n_tokens))
            begin += n_tokens
            document_begin = document_end
            index += 1
        return slices

    def table(self, begins: np.ndarray, ends: np.ndarray) -> SliceTable:
        """Returns the slices that cover tokens [begin, end) of each range, as `slices` does for one of them.

        Args:
            begins, ends: (ranges,) int64; no range is empty.
        """
        first = np.searchsorted(self.ends, begins, side="right")
        last = np.searchsorted(self.ends, ends - 1, side="right")
        index, owner = expanded(first, last - first + 1)

        documents, document_ends = self._documents[index], self.ends[index]
        document_begins = document_ends - self._lengths[documents]
        starts = np.maximum(begins[owner], document_begins) - document_begins
        stops = np.minimum(ends[owner], document_ends) - document_begins

        # An empty document gives no slice.
        has_tokens = starts < stops
        counts = np.bincount(owner[has_tokens], minlength=len(begins))
        return SliceTable(documents[has_tokens], starts[has_tokens], stops[has_tokens], counts)


class EpochOrder:
    """The sequences of one epoch.

    A cut is a sequence numbered by its place in the concatenated documents; a visit is a sequence numbered by its turn
    in the epoch, a shuffled order of the cuts.

    A sequence takes `seq_len + 1` tokens: `seq_len` inputs, and one more as the last target. That token is also the
    first input of the next cut. So each token of the epoch is a target exactly once, except the first token and a rest
    at the end that fills no sequence.
    """

    def __init__(
        self, lengths: np.ndarray, seed: int, epoch: int, seq_len: int, continues: np.ndarray | None = None
    ) -> None:
        """`lengths`: (documents,) tokens; `continues`: see `shuffled_documents`."""
        self.seq_len = seq_len
        shuffle_key = key(Shuffle.TEXT_DOCUMENTS, seed, epoch)
        self.concatenation = Concatenation(lengths, shuffled_documents(len(lengths), shuffle_key, continues))
        self.n_sequences = sequences_an_epoch(self.concatenation.n_tokens, seq_len)

        # A second shuffle, so that the parts of one long document do not meet in a batch.
        self._cut_of_visit = permutation(self.n_sequences, key(Shuffle.TEXT_SEQUENCES, seed, epoch))

    def begin(self, i: int) -> int:
        """Returns the position in the concatenated tokens where the sequence of visit i begins."""
        return int(self._cut_of_visit[i]) * self.seq_len

    def sequence(self, i: int) -> list[DocumentSlice]:
        """Returns the slices of the sequence of visit i: `seq_len + 1` tokens in all."""
        # One more token: the last target, which is the first input of the next cut.
        begin = self.begin(i)
        return self.concatenation.slices(begin, begin + self.seq_len + 1)

    def table(self, visits: np.ndarray) -> SliceTable:
        """Returns the slices of the sequences of these visits, (n,) int64, as `sequence` does for one."""
        begins = self._cut_of_visit[visits] * self.seq_len
        return self.concatenation.table(begins, begins + self.seq_len + 1)

    def slices(self, begin: int, end: int) -> list[DocumentSlice]:
        """Returns the slices that cover the tokens [begin, end) of the epoch, in order."""
        return self.concatenation.slices(begin, end)

    def visits(self, part: DocumentSlice) -> list[int]:
        """Returns the visits whose sequences hold a token of a slice, as input or target: rising numbers."""
        document_begin = self.concatenation.begin(part.document)
        begin, end = document_begin + part.start, document_begin + part.stop

        # A cut has one token more than `seq_len`: the first of the next cut.
        first_cut = max(0, -(-begin // self.seq_len) - 1)
        last_cut = (end - 1) // self.seq_len
        is_cut = (self._cut_of_visit >= first_cut) & (self._cut_of_visit <= last_cut)
        return np.flatnonzero(is_cut).tolist()


def shuffled_documents(n: int, shuffle_key: int, continues: np.ndarray | None = None) -> np.ndarray:
    """Returns the numbers 0 .. n-1 in the order of an epoch: (n,) int64.

    Args:
        shuffle_key: of 64 bits; equal keys give equal orders.
        continues: (n,) bool; a document stays directly behind the one before it. None: none does. That of document 0
            does not matter.
    """
    if continues is None or not continues.any():
        return permutation(n, shuffle_key)

    # Groups of documents that stay together are shuffled; a stable sort keeps their documents in order.
    group_of_document = np.cumsum(~continues) - (not continues[0])
    rank_of_group = np.empty(group_of_document[-1] + 1, np.int64)
    rank_of_group[permutation(len(rank_of_group), shuffle_key)] = np.arange(len(rank_of_group))
    return np.argsort(rank_of_group[group_of_document], kind="stable")


def sequences_an_epoch(n_tokens: int, seq_len: int) -> int:
    """Counts the sequences that `n_tokens` can be cut into. The last one needs one more token as its last target."""
    return max(0, n_tokens - 1) // seq_len
