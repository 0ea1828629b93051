"""Computes the order of text by pure functions: how an epoch is cut into sequences, and in which order they come.

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
    """Documents laid end to end. Maps positions in these tokens to slices of documents."""

    def __init__(self, lengths: np.ndarray, documents: np.ndarray) -> None:
        """`lengths`: (n,) tokens by document number; `documents`: the numbers in the order in which they are laid."""
        self._documents = documents
        self.ends = np.cumsum(lengths[documents], dtype=np.int64)  # (n,) positions behind each document
        self.n_tokens = int(self.ends.max(initial=0))

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


class EpochOrder:
    """The sequences of one epoch.

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
        """Returns the position in the concatenated tokens where the i-th sequence visited begins."""
        return int(self._cut_of_visit[i]) * self.seq_len

    def sequence(self, i: int) -> list[DocumentSlice]:
        """Returns the slices of the i-th sequence visited: `seq_len + 1` tokens in all."""
        # One more token: the last target, which is the first input of the next cut.
        begin = self.begin(i)
        return self.concatenation.slices(begin, begin + self.seq_len + 1)


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
