"""An order of text in two levels, for corpora of hundreds of millions of documents (`stage.order=units`).

Units of at most 64 consecutive documents (`data.split_index`) are shuffled in place of documents; those that share a
repository are a group and stay together. A group keeps its stored order; one of a single unit begins at a random
repository of it, so that other documents meet in a sequence. Groups are laid end to end and cut into sequences as
documents are in `data.order`, and the sequences are visited in the order of a keyed permutation that is computed for
each number alone. So an epoch sorts the keys of groups and nothing longer.

The price is that neighbours in a corpus are neighbours in every epoch. Sequences far from one another meet in a batch,
but a sequence of many short documents of a sorted corpus is of one language.

All of it is pure functions of (seed, epoch, documents, sequence length). A change of this file that changes an order
needs another name of the order, because runs continue in theirs.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dist_lm.data.order import (
    DocumentSlice,
    Shuffle,
    SliceTable,
    expanded,
    following,
    key,
    permutation,
    sequences_an_epoch,
    splitmix64_at,
    splitmix64_of,
)

_ROUNDS = 6


class Permutation:
    """A permutation of the numbers 0 .. n-1 that is computed for each number alone, in both directions.

    A Feistel network over pairs of numbers below the square root of n, rounded up, with sums modulo that; numbers from
    n on are mapped again until they are below ('cycle walking', Black and Rogaway, 'Ciphers with arbitrary finite
    domains', CT-RSA 2002).
    """

    def __init__(self, n: int, permutation_key: int) -> None:
        """`permutation_key`: of 64 bits; equal keys give equal permutations."""
        self.n = n
        self._side = math.isqrt(max(n - 1, 0)) + 1  # the smallest number whose square is at least n
        self._round_keys = [splitmix64_at(permutation_key, i) for i in range(_ROUNDS)]

    def __getitem__(self, i: int) -> int:
        """Returns the number at place i."""
        assert 0 <= i < self.n, (i, self.n)
        side = self._side
        while True:
            left, right = divmod(i, side)
            for round_key in self._round_keys:
                left, right = right, (left + splitmix64_at(round_key, right)) % side
            i = left * side + right
            if i < self.n:
                return i

    def numbers(self, places: np.ndarray) -> np.ndarray:
        """Returns the number at each of some places, as `[]` does for one: (places,) int64."""
        numbers = self._next(places.astype(np.uint64))
        while (is_outside := numbers >= self.n).any():
            numbers[is_outside] = self._next(numbers[is_outside])
        return numbers.astype(np.int64)

    def _next(self, numbers: np.ndarray) -> np.ndarray:
        """Passes numbers of uint64 through the network once."""
        side = np.uint64(self._side)
        left, right = np.divmod(numbers, side)
        for round_key in self._round_keys:
            # The remainder first, because the sum of a number and a hash may exceed 64 bits.
            left, right = right, (left + splitmix64_of(round_key, right) % side) % side
        return left * side + right

    def place(self, number: int) -> int:
        """Returns the place of a number: the inverse."""
        assert 0 <= number < self.n, (number, self.n)
        side = self._side
        while True:
            left, right = divmod(number, side)
            for round_key in reversed(self._round_keys):
                left, right = (right - splitmix64_at(round_key, left)) % side, left
            number = left * side + right
            if number < self.n:
                return number


class WindowedPermutation:
    """Permutes the numbers 0 .. n-1 inside consecutive windows, each as `Permutation` does."""

    def __init__(self, ends: list[int], permutation_key: int) -> None:
        """`ends`: the number behind the last of each window; rising, and n for the last one."""
        self._begins, self._ends = [0, *ends[:-1]], ends
        self._windows = [
            Permutation(end - begin, splitmix64_at(permutation_key, window))
            for window, (begin, end) in enumerate(zip(self._begins, ends, strict=True))
        ]

    def __getitem__(self, i: int) -> int:
        """Returns the number at place i."""
        window = bisect_right(self._ends, i)
        return self._begins[window] + self._windows[window][i - self._begins[window]]

    def numbers(self, places: np.ndarray) -> np.ndarray:
        """Returns the number at each of some places: (places,) int64."""
        numbers = np.empty(len(places), np.int64)
        windows = np.searchsorted(self._ends, places, side="right")
        for window in np.unique(windows).tolist():
            begin, is_inside = self._begins[window], windows == window
            numbers[is_inside] = begin + self._windows[window].numbers(places[is_inside] - begin)
        return numbers

    def place(self, number: int) -> int:
        """Returns the place of a number: the inverse."""
        window = bisect_right(self._ends, number)
        return self._begins[window] + self._windows[window].place(number - self._begins[window])


@dataclass
class Units:
    """The units of a corpus, in the order of its documents."""

    documents: np.ndarray  # (units,) int64; documents before each unit
    tokens: np.ndarray  # (units,) int64; tokens before each unit
    n_tokens: int  # tokens of all units
    n_documents: int  # documents of all units
    continues: np.ndarray  # (units,) bool; whether a unit is of the repository of the unit before it
    # From a unit to the tokens of the corpus before each of its documents, and those before the end of its last.
    ends: Callable[[int], list[int]]
    # From units to the tokens of their documents, 0 behind the last of a unit: (n,) int64 -> (n, largest unit) int64.
    lengths: Callable[[np.ndarray], np.ndarray]
    # From a unit and the place of a document in it to the first document there or later that begins a repository; 0 if
    # there is none.
    border: Callable[[int, int], int]

    @cached_property
    def first_of_group(self) -> np.ndarray:
        """(groups,) int64: the first of the units that stay together."""
        is_first = ~self.continues
        is_first[:1] = True
        return np.flatnonzero(is_first)

    @cached_property
    def group_tokens(self) -> np.ndarray:
        """(groups + 1,) int64: tokens before each group, and those of all."""
        return np.append(self.tokens[self.first_of_group], self.n_tokens)

    def slices(self, begin: int, end: int) -> list[DocumentSlice]:
        """Returns the slices that cover tokens [begin, end) of the corpus as it is stored, in order."""
        slices = []
        unit = bisect_right(self.tokens, begin) - 1
        while begin < end:
            first, ends = self.documents.item(unit), self.ends(unit)
            i = bisect_right(ends, begin) - 1
            while begin < end and i < len(ends) - 1:
                stop = min(end, ends[i + 1])
                if begin < stop:  # an empty document gives no slice
                    slices.append(DocumentSlice(first + i, begin - ends[i], stop - ends[i]))
                begin, i = stop, i + 1
            unit += 1
        return slices

    def table(self, begins: np.ndarray, ends: np.ndarray) -> SliceTable:
        """Returns the slices that cover tokens [begin, end) of each range of the corpus, as `slices` does for one.

        Args:
            begins, ends: (ranges,) int64; no range is empty.
        """
        first = np.searchsorted(self.tokens, begins, side="right") - 1
        last = np.searchsorted(self.tokens, ends - 1, side="right") - 1
        units, owner = expanded(first, last - first + 1)

        # All documents of each unit, of which a few lie in its range.
        lengths = self.lengths(units)
        document_ends = self.tokens[units, None] + np.cumsum(lengths, 1)
        document_begins = document_ends - lengths
        begins, ends = begins[owner], ends[owner]
        row, place = np.nonzero((lengths > 0) & (document_begins < ends[:, None]) & (document_ends > begins[:, None]))

        first_token = document_begins[row, place]
        starts = np.maximum(begins[row], first_token) - first_token
        stops = np.minimum(ends[row], document_ends[row, place]) - first_token
        counts = np.bincount(owner[row], minlength=len(first))
        return SliceTable(self.documents[units[row]] + place, starts, stops, counts)


class UnitEpoch:
    """The sequences of one epoch, as `order.EpochOrder` defines them, in the order of units.

    In memory are two arrays of int64 over the groups.
    """

    def __init__(self, units: Units, seed: int, epoch: int, seq_len: int) -> None:
        self.seq_len = seq_len
        self._units = units
        sizes = np.diff(units.group_tokens)
        self._groups = self._shuffled_groups(seed, epoch)  # in the order of the epoch
        self._ends = np.cumsum(sizes[self._groups])  # (groups,) positions behind each of them
        self._rotation_key = key(Shuffle.UNIT_ROTATIONS, seed, epoch)

        self.n_sequences = sequences_an_epoch(units.n_tokens, seq_len)
        self._cut_of_visit = self._shuffled_cuts(key(Shuffle.UNIT_SEQUENCES, seed, epoch))

    def _shuffled_groups(self, seed: int, epoch: int) -> np.ndarray:
        return permutation(len(self._units.first_of_group), key(Shuffle.UNITS, seed, epoch))

    def _shuffled_cuts(self, permutation_key: int) -> Permutation | WindowedPermutation:
        return Permutation(self.n_sequences, permutation_key)

    def begin(self, i: int) -> int:
        """Returns the position in the concatenated tokens where the sequence of visit i begins."""
        return self._cut_of_visit[i] * self.seq_len

    def sequence(self, i: int) -> list[DocumentSlice]:
        """Returns the slices of the sequence of visit i: `seq_len + 1` tokens in all."""
        begin = self.begin(i)
        return self.slices(begin, begin + self.seq_len + 1)

    def table(self, visits: np.ndarray) -> SliceTable:
        """Returns the slices of the sequences of these visits, (n,) int64, as `sequence` does for one."""
        begins = self._cut_of_visit.numbers(visits) * self.seq_len
        ends = begins + self.seq_len + 1
        first = np.searchsorted(self._ends, begins, side="right")
        last = np.searchsorted(self._ends, ends - 1, side="right")
        places, owner = expanded(first, last - first + 1)

        groups = self._groups[places]
        stored, stored_end = self._units.group_tokens[groups], self._units.group_tokens[groups + 1]
        group_ends = self._ends[places]
        group_begins = group_ends - (stored_end - stored)
        begins, ends = np.maximum(begins[owner], group_begins), np.minimum(ends[owner], group_ends)

        # Up to the end of the group as it is stored, then from its beginning up to where the epoch began.
        middle = self._rotated_begins(groups)
        turn = group_begins + stored_end - middle
        parts = [
            (middle + begins - group_begins, middle + np.minimum(ends, turn) - group_begins),
            (stored + np.maximum(begins, turn) - turn, stored + ends - turn),
        ]
        part_begins, part_ends = (np.stack(column, 1).ravel() for column in zip(*parts, strict=True))
        has_tokens = part_begins < part_ends

        table = self._units.table(part_begins[has_tokens], part_ends[has_tokens])
        counts = np.zeros(len(visits), np.int64)
        np.add.at(counts, np.repeat(owner, 2)[has_tokens], table.counts)
        return table._replace(counts=counts)

    def slices(self, begin: int, end: int) -> list[DocumentSlice]:
        """Returns the slices that cover the tokens [begin, end) of the epoch, in order."""
        assert 0 <= begin <= end <= self._units.n_tokens, (begin, end)
        slices = []
        index = bisect_right(self._ends, begin)
        while begin < end:
            group, group_end = self._groups.item(index), self._ends.item(index)
            stored, stored_end = self._units.group_tokens[group : group + 2].tolist()
            group_begin = group_end - (stored_end - stored)

            # Up to the end of the group as it is stored, then from its beginning up to where the epoch began.
            middle = self._rotated_begin(group)
            turn = group_begin + stored_end - middle
            if begin < turn:
                stop = min(end, turn)
                slices += self._units.slices(middle + begin - group_begin, middle + stop - group_begin)
                begin = stop
            if begin < min(end, group_end):
                stop = min(end, group_end)
                slices += self._units.slices(stored + begin - turn, stored + stop - turn)
                begin = stop
            index += 1
        return slices

    def visits(self, part: DocumentSlice) -> list[int]:
        """Returns the visits whose sequences hold a token of a slice, as input or target: rising numbers."""
        units = self._units
        unit = bisect_right(units.documents, part.document) - 1
        document_begin = units.ends(unit)[part.document - units.documents.item(unit)]

        # A document stays whole when its group is rotated.
        group = bisect_right(units.first_of_group, unit) - 1
        stored, stored_end = units.group_tokens[group : group + 2].tolist()
        size = stored_end - stored
        group_begin = self._ends.item(int((self._groups == group).argmax())) - size
        begin = group_begin + (document_begin - self._rotated_begin(group)) % size + part.start
        end = begin + part.stop - part.start

        # A cut has one token more than `seq_len`: the first of the next cut.
        first_cut = max(0, -(-begin // self.seq_len) - 1)
        last_cut = min(self.n_sequences - 1, (end - 1) // self.seq_len)
        return sorted(self._cut_of_visit.place(cut) for cut in range(first_cut, last_cut + 1))

    def _rotated_begin(self, group: int) -> int:
        """Returns the tokens of the corpus before the document with which a group begins in this epoch."""
        units = self._units
        unit = units.first_of_group.item(group)
        next_unit = units.first_of_group.item(group + 1) if group + 1 < len(self._groups) else len(units.tokens)
        begin = units.tokens.item(unit)
        if next_unit - unit > 1:  # a group of several units stays as it is stored
            return begin

        # The first repository that begins there or later; without one the group stays as it is stored.
        ends = units.ends(unit)
        first_choice = splitmix64_at(self._rotation_key, group) % (len(ends) - 1)
        rotated_begin = ends[units.border(unit, first_choice)]
        return rotated_begin if rotated_begin < units.group_tokens.item(group + 1) else begin

    def _rotated_begins(self, groups: np.ndarray) -> np.ndarray:
        """Returns what `_rotated_begin` returns for each group."""
        units = self._units
        unit = units.first_of_group[groups]
        n_units = following(units.first_of_group, groups, len(units.tokens)) - unit
        begins = units.tokens[unit]

        lengths = units.lengths(unit)
        n_documents = following(units.documents, unit, units.n_documents) - units.documents[unit]
        choices = splitmix64_of(self._rotation_key, groups) % n_documents.astype(np.uint64)
        places = np.array(list(map(units.border, unit.tolist(), choices.tolist())))
        tokens_before = np.where(np.arange(lengths.shape[1]) < places[:, None], lengths, 0).sum(1)

        # A group of several units stays as it is stored.
        rotated_begins = begins + tokens_before
        stays = (n_units > 1) | (rotated_begins >= units.group_tokens[groups + 1])
        return np.where(stays, begins, rotated_begins)


class WindowEpoch(UnitEpoch):
    """The order of units inside windows that a cache of a remote corpus holds (`stage.order=windows`).

    The corpus is cut into chunks of about `chunk_tokens` as it is stored. A window is made of as many shuffled chunks
    as have `window_tokens`. Groups are shuffled inside their window, and sequences are visited window by window. So an
    epoch reads each chunk within one window, whatever the size of the corpus. The price is that only chunks of one
    window meet in a batch.
    """

    chunk_tokens = 1 << 23  # 16 or 32 MiB
    window_tokens = 1 << 28  # 512 MiB or 1 GiB

    def _shuffled_groups(self, seed: int, epoch: int) -> np.ndarray:
        begins = self._units.group_tokens[:-1]
        chunk_of_group = begins // self.chunk_tokens
        n_chunks = int(chunk_of_group[-1]) + 1

        # A small type, because numpy sorts it in a pass.
        place_of_chunk = np.empty(n_chunks, np.min_scalar_type(n_chunks))
        place_of_chunk[permutation(n_chunks, key(Shuffle.UNIT_CHUNKS, seed, epoch))] = np.arange(n_chunks)
        window_of_group = place_of_chunk[chunk_of_group] // (self.window_tokens // self.chunk_tokens)

        # A stable sort of shuffled groups by window shuffles each window.
        shuffled = super()._shuffled_groups(seed, epoch)
        groups = shuffled[np.argsort(window_of_group[shuffled], kind="stable")]
        sizes = np.diff(self._units.group_tokens)
        windows = window_of_group[groups]
        is_last = np.append(windows[1:] != windows[:-1], True)
        self._window_ends = np.cumsum(sizes[groups])[is_last]  # (windows,) tokens of the epoch
        return groups

    def _shuffled_cuts(self, permutation_key: int) -> WindowedPermutation:
        # A cut belongs to the window in which it begins.
        ends = np.minimum(-(-self._window_ends // self.seq_len), self.n_sequences)
        ends[-1] = self.n_sequences
        return WindowedPermutation(ends.tolist(), permutation_key)
