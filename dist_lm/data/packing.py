"""Packs whole documents into sequences, as a pure function from (seed, epoch, document lengths, sequence length)
to document slices.

Best fit decreasing assigns lengths to rows: the longest remaining document goes into the row with the least free space
that still holds it. The assignment depends on the lengths alone, so every epoch has the same number of rows, and a
global sequence number gives a position in an epoch. Every epoch shuffles documents of equal length, the order inside a
row, and the order of the rows. Documents that no row holds are left out, truncated or split.
"""

import numpy as np

from dist_lm.data.order import DocumentSlice, Shuffle, key, permutation, splitmix64

DROP, TRUNCATE, SPLIT = TOO_LONG = ("drop", "truncate", "split")  # treatments of a document longer than a row


class Packing:
    """Rows of at most `seq_len + 1` tokens: the inputs of a sequence and its last target.

    The last token of a row is only a target. Rows hold pieces of documents. A document that fits is one piece. Of a
    longer one, `too_long` decides: no piece, one piece with its beginning, or pieces that each fill a row but the last.
    """

    def __init__(self, lengths: np.ndarray, seq_len: int, too_long: str = DROP) -> None:
        """`lengths`: (documents,) tokens; `too_long`: one of `TOO_LONG`."""
        self.seq_len = seq_len
        self.n_documents = len(lengths)
        self.n_too_long = int((lengths > seq_len + 1).sum())  # documents
        self.n_left_out = self.n_too_long if too_long == DROP else 0  # documents
        self.too_long = too_long
        self._piece_documents, self._piece_starts, piece_stops = _pieces(lengths, seq_len, too_long)
        self.lengths = piece_stops - self._piece_starts  # (pieces,) tokens
        self.pieces = longest_first(np.arange(len(self.lengths)), self.lengths)  # (pieces,) numbers

        # (pieces,) the row of each of `pieces`
        self.row_of_piece = best_fit_decreasing(self.lengths[self.pieces], seq_len + 1)
        self.n_rows = int(self.row_of_piece.max(initial=-1)) + 1
        self.ends = np.cumsum(np.bincount(self.row_of_piece, minlength=self.n_rows))  # (rows,) end in `in_rows`
        # A stable sort: the pieces of a row stay in the order of `pieces`, the longest first.
        self._in_rows = self.pieces[np.argsort(self.row_of_piece, kind="stable")]

    @property
    def padding(self) -> float:
        """The share of the rows' tokens that are padding, in [0, 1]."""
        if self.n_rows == 0:
            return 0.0
        capacity = self.n_rows * (self.seq_len + 1)
        return 1 - int(self.lengths.sum()) / capacity

    def report(self) -> dict[str, float]:
        """Returns `{sequences, padding, documents, left_out}` for JSON: numbers of an epoch, and a share in [0, 1].

        The number of documents that are too long and not left out is added as `truncated` or `split`.
        """
        figures = {
            "sequences": self.n_rows,
            "padding": self.padding,
            "documents": self.n_documents - self.n_left_out,
            "left_out": self.n_left_out,
        }
        if self.n_too_long and not self.n_left_out:
            figures["truncated" if self.too_long == TRUNCATE else "split"] = self.n_too_long
        return figures

    def sequence(self, row: int) -> list[DocumentSlice]:
        """Returns row `row` without shuffling, for evaluation: rows with the longest documents come first."""
        return self.slices(self._in_rows, row)

    def slices(self, in_rows: np.ndarray, row: int) -> list[DocumentSlice]:
        """Returns the pieces of one row, in the order of `in_rows`.

        Args:
            in_rows: (pieces,) numbers of pieces, row after row.
        """
        begin = int(self.ends[row - 1]) if row else 0
        slices = []
        for piece in in_rows[begin : int(self.ends[row])].tolist():
            start = int(self._piece_starts[piece])
            slices.append(DocumentSlice(int(self._piece_documents[piece]), start, start + int(self.lengths[piece])))
        return slices

    def rows_with(self, in_rows: np.ndarray, part: DocumentSlice) -> np.ndarray:
        """Returns the rows that hold a token of a slice: (n,) numbers.

        Args:
            in_rows: as for `slices`.
        """
        stops = self._piece_starts + self.lengths
        has_part = (self._piece_documents == part.document) & (self._piece_starts < part.stop) & (stops > part.start)
        indices = np.flatnonzero(has_part[in_rows])
        return np.searchsorted(self.ends, indices, side="right")


class PackedEpoch:
    """The sequences of one epoch: every piece of `Packing` once."""

    def __init__(self, packing: Packing, seed: int, epoch: int) -> None:
        self._packing = packing
        self.n_sequences = packing.n_rows

        # A stable sort after the shuffle exchanges only pieces of equal length, so every row still fits.
        n = len(packing.pieces)
        shuffled = packing.pieces[permutation(n, key(Shuffle.PACKED_DOCUMENTS, seed, epoch))]
        pieces = longest_first(shuffled, packing.lengths)

        # Sorted by row, and inside a row by a hash.
        order_in_rows = np.lexsort((splitmix64(key(Shuffle.PACKED_INSIDE, seed, epoch), n), packing.row_of_piece))
        self._in_rows = pieces[order_in_rows]
        self._rows = permutation(packing.n_rows, key(Shuffle.PACKED_ROWS, seed, epoch))

    def sequence(self, i: int) -> list[DocumentSlice]:
        """Returns the i-th row of the epoch: documents or pieces of long ones, at most `seq_len + 1` tokens in all."""
        return self._packing.slices(self._in_rows, int(self._rows[i]))

    def visits(self, part: DocumentSlice) -> list[int]:
        """Returns the rows of the epoch that hold a token of a slice: rising numbers."""
        return np.flatnonzero(np.isin(self._rows, self._packing.rows_with(self._in_rows, part))).tolist()


def _pieces(lengths: np.ndarray, seq_len: int, too_long: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (document, start, stop) of each piece, in the order of the documents: three arrays (pieces,) of int64.

    Pieces of a split document overlap by one token, the last target of one and the first input of the next, so each
    token but the first is a target once.
    """
    fits = lengths <= seq_len + 1
    counts = np.where(fits, 1, 0)
    if too_long == TRUNCATE:
        counts = np.ones(len(lengths), np.int64)
    elif too_long == SPLIT:
        counts = np.where(fits, 1, -(-(lengths.astype(np.int64) - 1) // seq_len))
    documents = np.repeat(np.arange(len(lengths)), counts)
    number_in_document = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = number_in_document * seq_len
    return documents, starts, np.minimum(lengths[documents], starts + seq_len + 1)


def longest_first(pieces: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Sorts `pieces` by descending length; a stable sort.

    Args:
        pieces: (n,) numbers.
        lengths: tokens by number of a piece.
    """
    return pieces[np.argsort(-lengths[pieces], kind="stable")]


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
