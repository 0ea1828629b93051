"""Pages of the cache, as numbers: who holds which, and which are free. No tensors here.

A page holds keys and values of a fixed number of tokens in every layer. Several sequences may hold the same page as
long as none of them writes to it.
"""

import heapq
from collections.abc import Iterable


class NoFreePageError(Exception):
    """Every page is held; somebody has to give up some first."""


class PagePool:
    """Pages 0 to n - 1, each held by any number of sequences.

    Lowest numbers are taken first, so that those in use stay together.
    """

    def __init__(self, n_pages: int) -> None:
        self.n_pages = n_pages
        self._free = list(range(n_pages))
        self._holders = [0] * n_pages
        self.changes = 0  # grows whenever a page is taken, shared or given back

    @property
    def n_free(self) -> int:
        return len(self._free)

    def holders(self, page: int) -> int:
        """How many sequences hold a page."""
        return self._holders[page]

    def take(self) -> int:
        """A free page, now held once.

        Raises:
            NoFreePageError: there is none.
        """
        if not self._free:
            raise NoFreePageError
        self.changes += 1
        page = heapq.heappop(self._free)
        self._holders[page] = 1
        return page

    def share(self, pages: Iterable[int]) -> None:
        """One more sequence holds these."""
        self.changes += 1
        for page in pages:
            assert self._holders[page] > 0
            self._holders[page] += 1

    def give_back(self, pages: Iterable[int]) -> None:
        """One sequence less holds these; a page that nobody holds is free."""
        self.changes += 1
        for page in pages:
            assert self._holders[page] > 0
            self._holders[page] -= 1
            if self._holders[page] == 0:
                heapq.heappush(self._free, page)


def pages_for(n_tokens: int, page_size: int) -> int:
    """Pages that hold `n_tokens`."""
    return -(-n_tokens // page_size)
