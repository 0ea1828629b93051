"""Packs whole documents into sequences, as a pure function from (seed, epoch, document lengths, sequence length)
to document slices.

Best fit decreasing assigns lengths to rows: the longest remaining document goes into the row with the least free space
that still holds it. The assignment depends on the lengths alone, so every epoch has the same number of rows, and a
global sequence number gives a position in an epoch. Every epoch shuffles documents of equal length, the order inside a
row, and the order of the rows.
"""

import numpy as np

from dist_lm.data.order import DocumentSlice, Shuffle, key, permutation, splitmix64


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

        # (packed documents,) the row of each of `documents`
        self.row_of_document = best_fit_decreasing(lengths[self.documents], seq_len + 1)
        self.n_rows = int(self.row_of_document.max(initial=-1)) + 1
        self.ends = np.cumsum(np.bincount(self.row_of_document, minlength=self.n_rows))  # (rows,) end in `in_rows`
        # A stable sort: the documents of a row stay in the order of `documents`, the longest first.
        self._in_rows = self.documents[np.argsort(self.row_of_document, kind="stable")]

    @property
    def padding(self) -> float:
        """The share of the rows' tokens that are padding, in [0, 1]."""
        if self.n_rows == 0:
            return 0.0
        capacity = self.n_rows * (self.seq_len + 1)
        return 1 - int(self.lengths[self.documents].sum()) / capacity

    def report(self) -> dict[str, float]:
        """Returns `{sequences, padding, documents, left_out}` for JSON: numbers of an epoch, and a share in [0, 1]."""
        return {
            "sequences": self.n_rows,
            "padding": self.padding,
            "documents": len(self.documents),
            "left_out": self.n_left_out,
        }

    def sequence(self, row: int) -> list[DocumentSlice]:
        """Returns row `row` without shuffling, for evaluation: rows with the longest documents come first."""
        return self.slices(self._in_rows, row)

    def slices(self, in_rows: np.ndarray, row: int) -> list[DocumentSlice]:
        """Returns the documents of one row, whole, in the order of `in_rows`.

        Args:
            in_rows: (packed documents,) document numbers, row after row.
        """
        begin = int(self.ends[row - 1]) if row else 0
        documents = in_rows[begin : int(self.ends[row])].tolist()
        return [DocumentSlice(document, 0, int(self.lengths[document])) for document in documents]


class PackedEpoch:
    """The sequences of one epoch: every document that fits, once and whole."""

    def __init__(self, packing: Packing, seed: int, epoch: int) -> None:
        self._packing = packing
        self.n_sequences = packing.n_rows

        # A stable sort after the shuffle exchanges only documents of equal length, so every row still fits.
        n = len(packing.documents)
        shuffled = packing.documents[permutation(n, key(Shuffle.PACKED_DOCUMENTS, seed, epoch))]
        documents = longest_first(shuffled, packing.lengths)

        # Sorted by row, and inside a row by a hash.
        order_in_rows = np.lexsort((splitmix64(key(Shuffle.PACKED_INSIDE, seed, epoch), n), packing.row_of_document))
        self._in_rows = documents[order_in_rows]
        self._rows = permutation(packing.n_rows, key(Shuffle.PACKED_ROWS, seed, epoch))

    def sequence(self, i: int) -> list[DocumentSlice]:
        """Returns the i-th row of the epoch: whole documents with at most `seq_len + 1` tokens in total."""
        return self._packing.slices(self._in_rows, int(self._rows[i]))


def longest_first(documents: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Sorts `documents` by descending length; a stable sort.

    Args:
        documents: (n,) numbers.
        lengths: tokens by document number.
    """
    return documents[np.argsort(-lengths[documents], kind="stable")]


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Returns a row for each length so that no row exceeds `capacity`: (n,) int64 row numbers from 0, without gaps.

    Documents of equal length are placed together, so the time depends on the number of different lengths (as Krell et
    al. 2021, 'Efficient Sequence Packing without Cross-contamination', pack a histogram).

    Args:
        lengths: (n,) tokens, descending, in [1, capacity].
    """
    assert not len(lengths) or (lengths[0] <= capacity and lengths[-1] > 0), "lengths in [1, capacity]"
    rows = np.empty(len(lengths), np.int64)
    n_rows = 0
    rows_by_room: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # open rows, by number of free tokens
    has_rows = np.zeros(capacity + 1, bool)

    begin = 0
    for length in np.unique(lengths)[::-1].tolist():
        end = begin + int(np.searchsorted(-lengths[begin:], -length, side="right"))
        while begin < end:
            # The tightest open rows, or as many new ones as the remaining documents of this length fill.
            room = length + int(has_rows[length:].argmax())
            if has_rows[room]:
                candidates = np.concatenate(rows_by_room[room])
            else:
                room = capacity
                candidates = np.arange(n_rows, n_rows - (-(end - begin) // (capacity // length)))
                n_rows += len(candidates)

            # The row that fits the first document best also fits the next ones of this length best, until it is full.
            docs_per_row = room // length
            n_used = min(len(candidates), -(-(end - begin) // docs_per_row))
            used, unused = np.split(candidates, [n_used])
            n_placed = min(end - begin, docs_per_row * len(used))
            rows[begin : begin + n_placed] = np.repeat(used, docs_per_row)[:n_placed]
            begin += n_placed

            n_full, docs_in_last = divmod(n_placed, docs_per_row)
            # Full rows get 0 free tokens, into which no length fits.
            rows_by_room[room] = []
            has_rows[room] = False
            for part, free in (
                (unused, room),
                (used[:n_full], room - docs_per_row * length),
                (used[n_full:], room - docs_in_last * length),
            ):
                if len(part):
                    rows_by_room[free].append(part)
                    has_rows[free] = True
    return rows
