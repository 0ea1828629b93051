"""Finds pages that already hold the beginning of a prompt, so that requests share what they have in common.

A page is kept after its last sequence has ended, until another needs the space (`PagePool`): the least recently used
one goes first. Prompts are compared in complete blocks of BLOCK tokens. Their keys and values are a function of the
tokens up to the block's end alone, so on a CPU in fp32 a prompt gets the same bits with and without the cache.

A block is named by a digest of all tokens up to its end and of the request's cache key. Requests with different keys
never share pages, so none can learn from the time of an answer what others have asked.
"""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from dist_lm.generation.paged_cache import BLOCK, PagePool


@dataclass
class PrefixCounts:
    """Tokens of admitted prompts since the engine was built."""

    looked_up: int = 0
    reused: int = 0  # tokens of these that were found


@dataclass(frozen=True)
class Prefix:
    """The beginning of a prompt that pages hold."""

    pages: Sequence[int] = ()  # full pages, in order
    partial_page: int | None = None  # the page whose beginning continues them
    n_partial: int = 0  # tokens of `partial_page` that do
    n_tokens: int = 0  # tokens of all pages together


@dataclass
class PrefixCache:
    """The blocks that the pages of one pool hold, for one version of the weights."""

    pool: PagePool
    page_tokens: int  # a multiple of BLOCK
    _page_of: dict[bytes, int] = field(default_factory=dict)  # digest -> a page with that block and those before
    _blocks_of: dict[int, list[bytes]] = field(default_factory=dict)  # the digests that name a page

    def find(self, digests: Sequence[bytes], n_prompt: int) -> Prefix:
        """Returns the longest prefix that is held; the last token of a prompt is never part of it, because its logits
        are needed.

        Args:
            digests: of the complete blocks of the prompt, see `block_digests`.
            n_prompt: tokens of the prompt.
        """
        digests = digests[: (n_prompt - 1) // BLOCK]
        blocks_per_page = self.page_tokens // BLOCK
        pages: list[int] = []
        for begin in range(0, len(digests), blocks_per_page):
            in_page = digests[begin : begin + blocks_per_page]
            if len(in_page) == blocks_per_page and (page := self._page_of.get(in_page[-1])) is not None:
                pages.append(page)
                continue

            # The blocks of a page lie together, so the last one that is known stands for those before it.
            for n_blocks in range(len(in_page), 0, -1):
                page = self._page_of.get(in_page[n_blocks - 1])
                if page is not None:
                    n_partial = n_blocks * BLOCK
                    return Prefix(pages, page, n_partial, len(pages) * self.page_tokens + n_partial)
            break
        return Prefix(pages, n_tokens=len(pages) * self.page_tokens)

    def add(self, digests: Sequence[bytes], pages: Sequence[int], start: int, end: int) -> None:
        """Keeps the complete blocks among the positions from `start` to `end` of a sequence, which are computed.

        Args:
            digests: of the sequence's blocks.
            pages: of the sequence; it holds them.
        """
        for block in range(start // BLOCK, min(end // BLOCK, len(digests))):
            digest = digests[block]
            if digest in self._page_of:
                continue  # another sequence computed the same
            page = pages[block * BLOCK // self.page_tokens]
            self._page_of[digest] = page
            self._blocks_of.setdefault(page, []).append(digest)
            self.pool.keep(page)

    def forget(self, page: int) -> None:
        """Forgets the content of a page."""
        for digest in self._blocks_of.pop(page, ()):
            del self._page_of[digest]

    def drop(self, pages: Sequence[int]) -> None:
        """Forgets the content of pages and keeps them no longer."""
        for page in pages:
            self.forget(page)
            self.pool.drop(page)

    def clear(self) -> None:
        """Forgets everything: the weights change."""
        self.drop([*self._blocks_of])


def block_digests(tokens: Sequence[int], key: str) -> list[bytes]:
    """Returns a digest of each complete block of BLOCK tokens, of all tokens up to its end, and of the key.

    SHA-256, so that nobody finds two prompts with one digest.
    """
    digest = hashlib.sha256(key.encode()).digest()
    digests = []
    for begin in range(0, len(tokens) // BLOCK * BLOCK, BLOCK):
        digest = hashlib.sha256(digest + array("q", tokens[begin : begin + BLOCK]).tobytes()).digest()
        digests.append(digest)
    return digests
