"""The order of text, as pure functions: the sequences that an epoch is cut into.

An epoch of text is a function of (seed, epoch, document lengths, sequence length). Documents are shuffled, laid end to
end, and cut into sequences wherever a sequence is full, so no token is lost. The sequences are then visited in a
second shuffled order, so that the parts of one long document do not meet in a batch.
"""

from typing import NamedTuple

import numpy as np

from dist_lm.data.keys import Shuffle, key, permutation


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
        self.ends = np.cumsum(lengths[documents], dtype=np.int64)  # (n,) positions behind each document
        self.n_tokens = int(self.ends[-1]) if len(documents) else 0

    def slices(self, begin: int, end: int) -> list[DocumentSlice]:
        """The slices that cover positions [begin, end); `end` is at most `n_tokens`."""
        assert 0 <= begin <= end <= self.n_tokens, (begin, end, self.n_tokens)
        slices = []
        place = int(np.searchsorted(self.ends, begin, side="right"))
        opened = int(self.ends[place - 1]) if place else 0
        while begin < end:
            closed = int(self.ends[place])
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

    def __init__(
        self, lengths: np.ndarray, seed: int, epoch: int, seq_len: int, continues: np.ndarray | None = None
    ) -> None:
        """`lengths`: (documents,) tokens; `continues`: see `shuffled_documents`."""
        self.seq_len = seq_len
        word = key(Shuffle.TEXT_DOCUMENTS, seed, epoch)
        self.row = Concatenation(lengths, shuffled_documents(len(lengths), word, continues))
        self.n_sequences = sequences_an_epoch(self.row.n_tokens, seq_len)
        self._pieces = permutation(self.n_sequences, key(Shuffle.TEXT_SEQUENCES, seed, epoch))

    def begin(self, i: int) -> int:
        """Where the i-th sequence visited begins in the row of tokens."""
        return int(self._pieces[i]) * self.seq_len

    def sequence(self, i: int) -> list[DocumentSlice]:
        """The slices of the i-th sequence visited: `seq_len + 1` tokens in all."""
        begin = self.begin(i)
        return self.row.slices(begin, begin + self.seq_len + 1)


def shuffled_documents(n: int, word: int, continues: np.ndarray | None = None) -> np.ndarray:
    """The numbers 0 .. n-1 in the order of an epoch: (n,) int64.

    Args:
        continues: (n,) bool; a document stays directly behind the one before it. None: none does.
    """
    if continues is None or not continues.any():
        return permutation(n, word)
    group = np.cumsum(~continues) - (not continues[0])  # of each document
    place = np.empty(group[-1] + 1, np.int64)
    place[permutation(len(place), word)] = np.arange(len(place))
    return np.argsort(place[group], kind="stable")


def sequences_an_epoch(n_tokens: int, seq_len: int) -> int:
    """How many sequences can be cut from `n_tokens`: the last needs one more token as its last target."""
    return max(0, n_tokens - 1) // seq_len
