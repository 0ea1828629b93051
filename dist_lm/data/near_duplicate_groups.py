"""Groups texts that near-duplicates are sought in, so that groups are searched one by one, on any number of processes.

`near_duplicates` compares a text only with texts that have a band of their signatures in common. A group holds all
texts that are connected by common bands, so no text outside of it changes what is dropped in it: the searches of all
groups, each in the order of the texts, drop together what one search of all texts drops.
"""

import numpy as np

from dist_lm.data.sorted_runs import RECORD, equals_next, merged

AT_ONCE = 1 << 20  # pairs or texts that are looked at together


class TextGroups:
    """Groups of texts, joined pair by pair. Memory: four bytes a text, and `AT_ONCE` pairs."""

    def __init__(self, n_texts: int) -> None:
        # Each text points to a text of its group with a smaller number, or to itself.
        self._parents = np.arange(n_texts, dtype=np.uint32)

    def join(self, pairs: np.ndarray) -> None:
        """Joins the groups of both texts of each pair.

        Args:
            pairs: (pairs, 2) numbers of texts with a band in common. Neighbours suffice where many texts share a band:
                each with the next one.
        """
        for begin in range(0, len(pairs), AT_ONCE):
            self._join(*pairs[begin : begin + AT_ONCE].T)

    def groups(self) -> np.ndarray:
        """Returns the group of each text, (n_texts,) uint32: the number of its first text. A text without a pair is a
        group of its own."""
        for begin in range(0, len(self._parents), AT_ONCE):
            part = slice(begin, begin + AT_ONCE)
            self._parents[part] = self._roots(self._parents[part])
        return self._parents

    def _join(self, left: np.ndarray, right: np.ndarray) -> None:
        parents = self._parents
        while True:
            # A pair whose roots are equal is done. Other roots are joined, the smaller one wins.
            roots_left, roots_right = self._roots(left), self._roots(right)
            is_open = roots_left != roots_right
            if not is_open.any():
                return
            left, right = roots_left[is_open], roots_right[is_open]
            lower, upper = np.minimum(left, right), np.maximum(left, right)
            np.minimum.at(parents, upper, lower)

            # They may form a long chain, which each round makes half as long.
            upper = np.unique(upper)
            while not np.array_equal(above := parents[parents[upper]], parents[upper]):
                parents[upper] = above

    def _roots(self, texts: np.ndarray) -> np.ndarray:
        """Returns the roots of texts, which then point to them."""
        roots = self._parents[texts]
        while not np.array_equal(above := self._parents[roots], roots):
            roots = above
        self._parents[texts] = roots
        return roots


def band_records(bands: np.ndarray, task: int, numbers: np.ndarray | None = None) -> np.ndarray:
    """Returns a record for each band of the texts of a task, (texts x bands,) RECORD, sorted by hash and band.

    Args:
        bands: (texts, bands) uint64, as `near_duplicates.band_hashes` gives them.
        numbers: (texts,) the number of each text in the task, rising; None: from 0.
    """
    n_texts, n_bands = bands.shape
    records = np.empty(bands.size, RECORD)
    records["high"] = bands.ravel()
    records["low"] = np.tile(np.arange(n_bands), n_texts)
    records["task"] = task
    records["number"] = np.repeat(np.arange(n_texts) if numbers is None else numbers, n_bands)
    return merged([records])


def neighbours(records: np.ndarray) -> np.ndarray:
    """Returns pairs of texts that connect all texts with a band in common: (pairs, 2, 2) uint32, task and number of
    each text.

    Args:
        records: as returned by `band_records`, of several tasks, sorted.
    """
    task_and_number = np.stack([records["task"], records["number"]], axis=1)
    is_equal = equals_next(records)
    return np.stack([task_and_number[:-1][is_equal], task_and_number[1:][is_equal]], axis=1)
