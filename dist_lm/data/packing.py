"""Whole documents packed into sequences: a pure function from (seed, epoch, document lengths, sequence length) to
document slices.

Best fit decreasing assigns lengths to rows: the longest remaining document goes into the row with the least free space
that still holds it. The assignment depends on the lengths alone, so every epoch has the same number of rows, and a
global sequence number gives a position in an epoch. Every epoch shuffles documents of equal length, the order inside a
row, and the order of the rows.
"""

import numpy as np

from dist_lm.data.keys import Shuffle, key, permutation, splitmix64
from dist_lm.data.order import DocumentSlice


class Packing:
    """Rows of at most `seq_len + 1` tokens: the inputs of a sequence and its last target.

    The last token of a row is only a target. Documents longer than a row are left out.
    """

    def __init__(self, lengths: np.ndarray, seq_len: int) -> None:
        """`lengths`: (documents,) tokens."""
        self.seq_len = seq_len
        self.lengths = lengths
        fitting = np.flatnonzero(lengths <= seq_len + 1)
        self.n_left_out = len(lengths) - len(fitting)  # documents
        self.documents = longest_first(fitting, lengths)  # (packed documents,) numbers
        self.row_of_place = best_fit_decreasing(lengths[self.documents], seq_len + 1)  # (packed documents,)
        self.n_rows = int(self.row_of_place.max()) + 1 if len(fitting) else 0
        self.ends = np.cumsum(np.bincount(self.row_of_place, minlength=self.n_rows))  # (rows,) places before its end
        self._in_rows = self.documents[np.argsort(self.row_of_place, kind="stable")]

    @property
    def padding(self) -> float:
        """Share of the rows' tokens that are padding."""
        capacity = self.n_rows * (self.seq_len + 1)
        return 1 - int(self.lengths[self.documents].sum()) / capacity if capacity else 0.0

    def report(self) -> dict[str, float]:
        """`{sequences, padding, documents, left_out}` for JSON."""
        return {
            "sequences": self.n_rows,
            "padding": self.padding,
            "documents": len(self.documents),
            "left_out": self.n_left_out,
        }

    def sequence(self, row: int) -> list[DocumentSlice]:
        """Row `row` without shuffling, for evaluation: rows with the longest documents come first."""
        return self.slices(self._in_rows, row)

    def slices(self, in_rows: np.ndarray, row: int) -> list[DocumentSlice]:
        """The documents of one row. `in_rows`: (packed documents,) document numbers, row after row."""
        begin = int(self.ends[row - 1]) if row else 0
        documents = in_rows[begin : int(self.ends[row])].tolist()
        return [DocumentSlice(document, 0, int(self.lengths[document])) for document in documents]


class PackedEpoch:
    """The sequences of one epoch: every document that fits, once and whole."""

    def __init__(self, packing: Packing, seed: int, epoch: int) -> None:
        self._packing = packing
        self.n_sequences = packing.n_rows
        n = len(packing.documents)
        shuffled = packing.documents[permutation(n, key(Shuffle.PACKED_DOCUMENTS, seed, epoch))]
        documents = longest_first(shuffled, packing.lengths)  # shuffles only documents of equal length
        inside = np.lexsort((splitmix64(key(Shuffle.PACKED_INSIDE, seed, epoch), n), packing.row_of_place))
        self._in_rows = documents[inside]
        self._rows = permutation(packing.n_rows, key(Shuffle.PACKED_ROWS, seed, epoch))

    def sequence(self, i: int) -> list[DocumentSlice]:
        """The i-th row of the epoch: whole documents with at most `seq_len + 1` tokens in total."""
        return self._packing.slices(self._in_rows, int(self._rows[i]))


def longest_first(documents: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`documents` sorted by descending length; a stable sort."""
    return documents[np.argsort(-lengths[documents], kind="stable")]


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Assign a row to each length so that no row exceeds `capacity`: (n,) int64 row numbers.

    Documents of equal length are placed together, so the time depends on the number of different lengths (as Krell et
    al. 2021, 'Efficient Sequence Packing without Cross-contamination', pack a histogram).

    Args:
        lengths: (n,) descending, in [1, capacity].
    """
    assert not len(lengths) or (lengths[0] <= capacity and lengths[-1] > 0), "lengths in [1, capacity]"
    rows = np.empty(len(lengths), np.int64)
    n_rows = 0
    by_room: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # open rows, by number of free tokens
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
            # the row that fits the first document best also fits the next ones of this length best, until it is full
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
