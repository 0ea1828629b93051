"""Groups texts that near-duplicates are sought in, so that groups are searched one by one, on any number of processes.

`near_duplicates` compares a text only with texts that have a band of their signatures in common. A group holds all
texts that are connected by common bands, so no text outside of it changes what is dropped in it: the searches of all
groups, each in the order of the texts, drop together what one search of all texts drops.
"""

import numpy as np

from dist_lm.data.sorted_runs import RECORD, merged


def groups_of(n_texts: int, pairs: np.ndarray) -> np.ndarray:
    """Returns the group of each text, (n_texts,) int64: the number of its first text. A text without a pair is a group
    of its own.

    Args:
        pairs: (pairs, 2) int64 numbers of texts with a band in common. Neighbours suffice where many texts share a
            band: each with the next one.
    """
    parents = np.arange(n_texts)
    left, right = pairs[:, 0], pairs[:, 1]
    while True:
        # Each text points to a text of its group with a smaller number, or to itself. Roots are joined, the smaller
        # one wins; then every text points to its root again. A pair whose roots are equal is done.
        roots_left, roots_right = parents[left], parents[right]
        is_open = roots_left != roots_right
        if not is_open.any():
            return parents
        left, right = left[is_open], right[is_open]
        lower = np.minimum(roots_left[is_open], roots_right[is_open])
        upper = np.maximum(roots_left[is_open], roots_right[is_open])
        np.minimum.at(parents, upper, lower)
        while not np.array_equal(parents, parents[parents]):
            parents = parents[parents]


def band_records(bands: np.ndarray, task: int) -> np.ndarray:
    """Returns a record for each band of the texts of a task, (texts x bands,) RECORD, sorted by hash and band.

    Args:
        bands: (texts, bands) uint64, as `near_duplicates.band_hashes` gives them.
    """
    n_texts, n_bands = bands.shape
    records = np.empty(bands.size, RECORD)
    records["high"] = bands.ravel()
    records["low"] = np.tile(np.arange(n_bands), n_texts)
    records["task"] = task
    records["number"] = np.repeat(np.arange(n_texts), n_bands)
    return merged([records])


def with_common_bands(records: np.ndarray) -> np.ndarray:
    """Returns the records whose band another one has, too, (records,) RECORD, in their order.

    Args:
        records: of `band_records`, of several tasks, sorted.
    """
    is_equal = _equals_next(records)
    is_shared = np.zeros(len(records), bool)
    is_shared[:-1] = is_equal
    is_shared[1:] |= is_equal
    return records[is_shared]


def neighbours(records: np.ndarray) -> np.ndarray:
    """Returns pairs of texts that connect all texts with a band in common: (pairs, 2, 2) uint32, task and number of
    each text.

    Args:
        records: as of `with_common_bands`.
    """
    places = np.stack([records["task"], records["number"]], axis=1)
    is_equal = _equals_next(records)
    return np.stack([places[:-1][is_equal], places[1:][is_equal]], axis=1)


def _equals_next(records: np.ndarray) -> np.ndarray:
    return (records["high"][:-1] == records["high"][1:]) & (records["low"][:-1] == records["low"][1:])
