"""Groups texts that near-duplicates are sought in, so that groups are searched one by one, on any number of processes.

`near_duplicates` compares a text only with texts that have a band of their signatures in common. A group holds all
texts that are connected by common bands, so no text outside of it changes what is dropped in it: the searches of all
groups, each in the order of the texts, drop together what one search of all texts drops.
"""

import numpy as np


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


def neighbours_in_bands(bands: np.ndarray) -> np.ndarray:
    """Returns pairs of texts that connect all texts with a band in common: (pairs, 2) int64.

    Args:
        bands: (texts, bands) uint64, as `near_duplicates.band_hashes` gives them.
    """
    pairs = [np.empty((0, 2), np.int64)]
    for hashes in bands.T:
        order = np.argsort(hashes, kind="stable")
        is_equal_to_next = hashes[order[:-1]] == hashes[order[1:]]
        pairs.append(np.stack([order[:-1][is_equal_to_next], order[1:][is_equal_to_next]], axis=1))
    return np.concatenate(pairs)
