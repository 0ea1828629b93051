"""Sequences of several corpora in one stream: a pure function from the global sequence number to a corpus and a
number within it.

Every block of 100 sequences holds each corpus by its exact share, in an order of its own. So the state of a stream is
still one integer, and how a step is cut into ranks and micro-batches changes nothing.
"""

from collections.abc import Sequence

import numpy as np

from dist_lm.data.order import key, permutation

BLOCK = 100  # sequences; shares are whole per cent
_MIX = 6  # what is shuffled; 1 to 5 are those of `order` and `packing`


class Mix:
    """Corpus 0 is the stage's own and takes what the others leave."""

    def __init__(self, shares: Sequence[float], seed: int) -> None:
        """`shares`: those of corpora 1, 2, ...; whole per cent, with a sum below 1."""
        others = [round(share * BLOCK) for share in shares]
        self._counts = np.array([BLOCK - sum(others), *others])
        assert self._counts.min() > 0, shares
        self._seed = seed
        self._block = -1
        self._corpora = self._places = np.empty(0, np.int64)

    def place(self, number: int) -> tuple[int, int]:
        """(corpus, number within it) of global sequence `number`; a corpus is read in its order, without a gap."""
        block, i = divmod(number, BLOCK)
        if block != self._block:
            self._shuffle(block)
        corpus = int(self._corpora[i])
        return corpus, block * int(self._counts[corpus]) + int(self._places[i])

    def _shuffle(self, block: int) -> None:
        """The corpus of each sequence of a block, and how many of that corpus come before it there."""
        corpora = np.repeat(np.arange(len(self._counts)), self._counts)
        self._corpora = corpora[permutation(BLOCK, key(_MIX, self._seed, block))]
        same = self._corpora[:, None] == self._corpora[None, :]
        self._places = np.tril(same, -1).sum(1)
        self._block = block
