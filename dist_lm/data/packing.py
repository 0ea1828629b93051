"""Whole documents packed into sequences: a pure function from (seed, epoch, document lengths, sequence length) to
document slices.

Which lengths share a row follows from the lengths alone, by best fit decreasing: the longest document that is left
goes where it leaves the least room. So every epoch has as many rows, and a global sequence number stands for a place
in an epoch as it does for text. Which documents of those lengths meet, in what order, and when their row comes, is
shuffled anew in every epoch.
"""

import numpy as np

from dist_lm.data.order import DocumentSlice, Shuffle, key, permutation, splitmix64


class Packing:
    """Rows of at most `seq_len + 1` tokens: the inputs of a sequence and its last target.

    The last token of a row's last document is only a target there, as nothing comes after it. A document that is
    longer than a row is in none.
    """

    def __init__(self, lengths: np.ndarray, seq_len: int) -> None:
        """`lengths`: (documents,) tokens."""
        self.seq_len = seq_len
        self.lengths = lengths
        fitting = np.flatnonzero(lengths <= seq_len + 1)
        self.n_left_out = len(lengths) - len(fitting)  # documents
        self.documents = longest_first(fitting, lengths)  # (packed documents,) numbers
        self.row_of_place = best_fit_decreasing(lengths[self.documents], seq_len + 1)  # for each of them
        self.n_rows = int(self.row_of_place.max()) + 1 if len(fitting) else 0
        self.ends = np.cumsum(np.bincount(self.row_of_place, minlength=self.n_rows))  # (rows,) places before its end
        self._in_rows = self.documents[np.argsort(self.row_of_place, kind="stable")]

    @property
    def padding(self) -> float:
        """Share of the rows' tokens that no document fills."""
        room = self.n_rows * (self.seq_len + 1)
        return 1 - int(self.lengths[self.documents].sum()) / room if room else 0.0

    def report(self) -> dict[str, float]:
        """`{sequences, padding, documents, left_out}`, ready for JSON."""
        return {
            "sequences": self.n_rows,
            "padding": self.padding,
            "documents": len(self.documents),
            "left_out": self.n_left_out,
        }

    def sequence(self, row: int) -> list[DocumentSlice]:
        """Row `row` in the order that nothing shuffled, for evaluation: rows with the longest documents first."""
        return self.slices(self._in_rows, row)

    def slices(self, in_rows: np.ndarray, row: int) -> list[DocumentSlice]:
        """The documents of one row, whole. `in_rows`: (packed documents,) numbers, row after row."""
        begin = int(self.ends[row - 1]) if row else 0
        documents = in_rows[begin : int(self.ends[row])].tolist()
        return [DocumentSlice(document, 0, int(self.lengths[document])) for document in documents]


class PackedEpoch:
    """The sequences of one epoch: every document that fits into one, once, whole."""

    def __init__(self, packing: Packing, seed: int, epoch: int) -> None:
        self._packing = packing
        self.n_sequences = packing.n_rows
        n = len(packing.documents)
        shuffled = packing.documents[permutation(n, key(Shuffle.PACKED_DOCUMENTS, seed, epoch))]
        documents = longest_first(shuffled, packing.lengths)  # those of one length have changed places
        inside = np.lexsort((splitmix64(key(Shuffle.PACKED_INSIDE, seed, epoch), n), packing.row_of_place))
        self._in_rows = documents[inside]
        self._rows = permutation(packing.n_rows, key(Shuffle.PACKED_ROWS, seed, epoch))

    def sequence(self, i: int) -> list[DocumentSlice]:
        """The i-th row visited: whole documents of `seq_len + 1` tokens in all, or fewer."""
        return self._packing.slices(self._in_rows, int(self._rows[i]))


def longest_first(documents: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`documents` by length; those of one length stay in their order."""
    return documents[np.argsort(-lengths[documents], kind="stable")]


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """A row for each length, so that no row holds more than `capacity`: (n,) int64.

    Args:
        lengths: (n,) from the longest to the shortest, in [1, capacity].

    Documents of one length are placed together, so the time depends on the number of different lengths (Krell et al.,
    'Efficient Sequence Packing without Cross-contamination', 2021, pack the histogram in this way).
    """
    assert not len(lengths) or (lengths[0] <= capacity and lengths[-1] > 0), "lengths in [1, capacity]"
    rows = np.empty(len(lengths), np.int64)
    n_rows = 0
    by_room: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # open rows, by the tokens that are free
    has_room = np.zeros(capacity + 1, bool)
    begin = 0
    for length in np.unique(lengths)[::-1].tolist():
        end = begin + int(np.searchsorted(-lengths[begin:], -length, side="right"))
        while begin < end:
            room = length + int(has_room[length:].argmax())
            if has_room[room]:
                there = np.concatenate(by_room[room])
            else:
                room = capacity
                there = np.arange(n_rows, n_rows - (-(end - begin) // (capacity // length)))
                n_rows += len(there)
            # what is best for the first is best for the next of the same length, until that row is full
            most = room // length
            used, left = np.split(there, [min(len(there), -(-(end - begin) // most))])
            placed = min(end - begin, most * len(used))
            rows[begin : begin + placed] = np.repeat(used, most)[:placed]
            begin += placed
            full, in_last = divmod(placed, most)
            by_room[room] = []
            has_room[room] = False
            for part, free in (
                (left, room),
                (used[:full], room - most * length),
                (used[full:], room - in_last * length),
            ):
                if len(part):
                    by_room[free].append(part)
                    has_room[free] = True
    return rows
