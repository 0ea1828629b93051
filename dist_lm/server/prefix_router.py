"""Chooses the actor for a request: the one that has read the beginning of its prompt, unless that has much more to do.

A prefix cache holds whole blocks of a prompt, so blocks are what is remembered: each digest stands for a block and all
before it (`dist_lm.generation.prefix_cache.block_digests`). Pure data.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

MOST_BLOCKS = 1 << 16  # most that are remembered; the least recently used go first


class PrefixRouter:
    """Memory of which actors, called lanes by their numbers, have read which beginnings of prompts."""

    def __init__(self, most_extra: int) -> None:
        """
        Args:
            most_extra: answers that a lane may have under way more than the least loaded one, and still be chosen for
                what it has read.
        """
        self._most_extra = most_extra
        self._lanes_of: OrderedDict[bytes, set[int]] = OrderedDict()  # keys: digests of blocks

    def choose(self, digests: Sequence[bytes], loads: Mapping[int, int]) -> int:
        """Returns the lane for a prompt.

        Args:
            digests: of the complete blocks of the prompt.
            loads: answers under way by lane, of the lanes that have room; at least one.
        """
        least = min(loads.values())
        # The last digest stands for the longest beginning.
        for digest in reversed(digests):
            lanes = [
                lane
                for lane in self._lanes_of.get(digest, ())
                if lane in loads and loads[lane] - least <= self._most_extra
            ]
            if lanes:
                return min(lanes, key=lambda lane: (loads[lane], lane))
        return min(loads, key=lambda lane: (loads[lane], lane))

    def remember(self, digests: Sequence[bytes], lane: int) -> None:
        """Says that a lane reads a prompt with these blocks."""
        for digest in digests:
            self._lanes_of.setdefault(digest, set()).add(lane)
            self._lanes_of.move_to_end(digest)
        while len(self._lanes_of) > MOST_BLOCKS:
            self._lanes_of.popitem(last=False)

    def forget(self, lane: int) -> None:
        """Says that the cache of a lane is lost."""
        for digest in [digest for digest, lanes in self._lanes_of.items() if lane in lanes]:
            self._lanes_of[digest].discard(lane)
            if not self._lanes_of[digest]:
                del self._lanes_of[digest]
