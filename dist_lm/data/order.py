"""The order of data, as pure functions: keyed shuffles, and the sequences that an epoch of text is cut into.

A shuffle sorts the numbers 0, 1, ... by the outputs of SplitMix64 (Steele, Lea and Flood, 'Fast splittable
pseudorandom number generators', OOPSLA 2014). Its outputs are a bijection of its counter, so there are no ties, and
the order depends on no library's generator or sorting algorithm. The first word of every key is a `Shuffle`, so no two
shuffles of one seed are the same.

An epoch of text is a function of (seed, epoch, document lengths, sequence length). Documents are shuffled, laid end to
end, and cut into sequences wherever a sequence is full, so no token is lost. The sequences are then visited in a
second shuffled order, so that the parts of one long document do not meet in a batch.
"""

from enum import IntEnum, unique
from typing import NamedTuple

import numpy as np

_WORD = 2**64
_GAMMA = 0x9E3779B97F4A7C15


@unique
class Shuffle(IntEnum):
    """What is shuffled or drawn. A changed number changes the order of data: new ones go to the end."""

    TEXT_DOCUMENTS = 1  # documents of text in an epoch
    TEXT_SEQUENCES = 2  # the sequences cut from them
    PACKED_DOCUMENTS = 3  # documents of one length change places
    PACKED_ROWS = 4  # rows of whole documents
    PACKED_INSIDE = 5  # documents inside a row
    MIX = 6  # the corpora of a block of sequences
    LABEL_NOISE = 7  # judgements that are turned round
    PAIRS = 8  # pairs of a ranking
    SAMPLES = 9  # samples of stage rankings
    SAMPLE_LINES = 10  # where the openings of these samples are cut
    PROMPTS = 11  # prompts of stage rlhf
    UPDATES = 12  # rollouts in an epoch of updates


def permutation(n: int, seed: int) -> np.ndarray:
    """The numbers 0 .. n-1, sorted by the outputs of SplitMix64 from `seed`: (n,) int64."""
    return np.argsort(splitmix64(seed, n))


def splitmix64(seed: int, n: int) -> np.ndarray:
    """The first n outputs of SplitMix64 from `seed`: (n,) uint64."""
    state = np.arange(1, n + 1, dtype=np.uint64)
    state *= np.uint64(_GAMMA)
    state += np.uint64(seed % _WORD)
    state ^= state >> np.uint64(30)
    state *= np.uint64(0xBF58476D1CE4E5B9)
    state ^= state >> np.uint64(27)
    state *= np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return state


def key(*words: int) -> int:
    """One 64-bit key of several integers, each of them and their order mattering."""
    value = 0
    for word in words:
        value = int(splitmix64((value + word) % _WORD, 1)[0])
    return value


class DocumentSlice(NamedTuple):
    """Tokens [start, stop) of a document."""

    document: int
    start: int
    stop: int


class Concatenation:
    """Documents laid end to end: positions in that row of tokens to slices of documents."""

    def __init__(self, lengths: np.ndarray, documents: np.ndarray) -> None:
        """`lengths`: (n,) tokens by document number; `documents`: the numbers in the order of the row."""
        self._documents = documents
        self._ends = np.cumsum(lengths[documents], dtype=np.int64)
        self.n_tokens = int(self._ends[-1]) if len(documents) else 0

    def slices(self, begin: int, end: int) -> list[DocumentSlice]:
        """The slices that cover positions [begin, end); `end` is at most `n_tokens`."""
        assert 0 <= begin <= end <= self.n_tokens, (begin, end, self.n_tokens)
        slices = []
        place = int(np.searchsorted(self._ends, begin, side="right"))
        opened = int(self._ends[place - 1]) if place else 0
        while begin < end:
            closed = int(self._ends[place])
            if stop := min(end, closed) - begin:
                start = begin - opened
                slices.append(DocumentSlice(int(self._documents[place]), start, start + stop))
            begin += stop
            opened = closed
            place += 1
        return slices


class EpochOrder:
    """The sequences of one epoch.

    Sequence i covers `seq_len + 1` tokens; its last one is only a target, and the first input of the piece
    after it. So every token but the first of the epoch and its tail (less than a sequence) is a target
    exactly once.
    """

    def __init__(self, lengths: np.ndarray, seed: int, epoch: int, seq_len: int) -> None:
        """`lengths`: (documents,) tokens."""
        self.seq_len = seq_len
        self._row = Concatenation(lengths, permutation(len(lengths), key(Shuffle.TEXT_DOCUMENTS, seed, epoch)))
        self.n_sequences = sequences_an_epoch(self._row.n_tokens, seq_len)
        self._pieces = permutation(self.n_sequences, key(Shuffle.TEXT_SEQUENCES, seed, epoch))

    def sequence(self, i: int) -> list[DocumentSlice]:
        """The slices of the i-th sequence visited: `seq_len + 1` tokens in all."""
        begin = int(self._pieces[i]) * self.seq_len
        return self._row.slices(begin, begin + self.seq_len + 1)


def sequences_an_epoch(n_tokens: int, seq_len: int) -> int:
    """How many sequences can be cut from `n_tokens`: the last needs one more token as its last target."""
    return max(0, n_tokens - 1) // seq_len
