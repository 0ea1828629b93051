"""Shuffles by keys: every order of data and every random choice of data, with all keys in one place.

A shuffle sorts the numbers 0, 1, ... by the outputs of SplitMix64 (Steele, Lea and Flood, 'Fast splittable
pseudorandom number generators', OOPSLA 2014). Its outputs are a bijection of its counter, so there are no ties, and
the order depends on no library's generator or sorting algorithm. The first word of every key is a `Shuffle`, so no two
shuffles of one seed are the same.
"""

import hashlib
from enum import IntEnum, unique

import numpy as np

_WORD = 2**64
_GAMMA = 0x9E3779B97F4A7C15


@unique
class Shuffle(IntEnum):
    """The purposes of shuffles and draws. A changed number changes the order of data: new ones go to the end."""

    TEXT_DOCUMENTS = 1  # documents of text in an epoch
    TEXT_SEQUENCES = 2  # the sequences cut from them
    PACKED_DOCUMENTS = 3  # documents of one length change places
    PACKED_ROWS = 4  # rows of whole documents
    PACKED_INSIDE = 5  # documents inside a row
    MIX = 6  # the corpora of a block of sequences
    LABEL_NOISE = 7  # judgements that are reversed
    PAIRS = 8  # pairs of a ranking
    SAMPLES = 9  # samples of stage rankings
    SAMPLE_LINES = 10  # the cuts of the beginnings of these samples
    PROMPTS = 11  # prompts of stage rlhf
    UPDATES = 12  # rollouts in an epoch of updates
    INFILL_SLICES = 13  # slices of documents that an epoch rearranges
    INFILL_MIDDLES = 14  # the cuts of these slices
    INFILL_HELD_OUT = 15  # the cuts of slices of held-out documents
    HIDDEN_TESTS = 16  # inputs of hidden tests


def permutation(n: int, seed: int) -> np.ndarray:
    """Sorts the numbers 0 .. n-1 by the outputs of SplitMix64 from `seed`: (n,) int64."""
    return np.argsort(splitmix64(seed, n))


def splitmix64(seed: int, n: int) -> np.ndarray:
    """Returns the first n outputs of SplitMix64 from `seed`, of which the lowest 64 bits count: (n,) uint64."""
    # In place, because n may be the number of all documents.
    state = np.arange(1, n + 1, dtype=np.uint64)
    state *= np.uint64(_GAMMA)
    state += np.uint64(seed % _WORD)
    state ^= state >> np.uint64(30)
    state *= np.uint64(0xBF58476D1CE4E5B9)
    state ^= state >> np.uint64(27)
    state *= np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return state


def key(*words: int) -> int:
    """Hashes several integers into one 64-bit key, which depends on each integer and on their order."""
    # Each word goes into the hash of those before it, so that (1, 2) and (2, 1) differ.
    state = 0
    for word in words:
        state = int(splitmix64((state + word) % _WORD, 1)[0])
    return state


def text_word(text: str) -> int:
    """Returns 64 bits of the SHA-256 of a text: the word of a key that stands for it."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
