"""The paged KV cache: which sequence holds which page, and what the two implementations have in common.

A page holds keys and values of a fixed number of tokens in every layer. Several sequences may hold one page while none
of them writes to it. `PagePool` counts pages without tensors; `PagedCache` holds the tensors, and `plain_pages.py` and
`flash_pages.py` implement attention over them.

Dimensions: N tokens, B sequences, H query heads, G key/value heads, K d_head.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class PagePool:
    """Pages 0 to n - 1, each held by any number of sequences. The lowest free page is taken first, which keeps the
    pages in use close together."""

    def __init__(self, n_pages: int) -> None:
        self._free = list(range(n_pages))
        self._holders = [0] * n_pages
        self.changes = 0  # grows whenever a page is taken, shared or given back

    @property
    def n_pages(self) -> int:
        return len(self._holders)

    @property
    def n_free(self) -> int:
        return len(self._free)

    def holders(self, page: int) -> int:
        """Number of sequences that hold a page."""
        return self._holders[page]

    def take(self) -> int:
        """Take a free page, which then has one holder; `n_free` must not be 0."""
        self.changes += 1
        page = heapq.heappop(self._free)
        self._holders[page] = 1
        return page

    def share(self, pages: Iterable[int]) -> None:
        """Add one holder to each of these pages."""
        self.changes += 1
        for page in pages:
            assert self._holders[page] > 0
            self._holders[page] += 1

    def give_back(self, pages: Iterable[int]) -> None:
        """Remove one holder from each of these pages; a page without holders is free."""
        self.changes += 1
        for page in pages:
            assert self._holders[page] > 0
            self._holders[page] -= 1
            if self._holders[page] == 0:
                heapq.heappush(self._free, page)


def pages_for(n_tokens: int, page_size: int) -> int:
    """Number of pages that hold `n_tokens`."""
    return -(-n_tokens // page_size)


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one sequence, computed and cached in one step.

    Piece boundaries depend on the sequence alone, so that a result does not depend on other requests.
    """

    tokens: Sequence[int]
    start: int  # position of the first token
    pages: Sequence[int]  # hold all positions from 0 to that of the last token

    @property
    def positions(self) -> range:
        return range(self.start, self.start + len(self.tokens))


def in_cache(pages: Sequence[Sequence[int]], positions: Sequence[Iterable[int]], page_size: int) -> torch.Tensor:
    """page * page_size + offset of the positions of sequences that hold `pages`, int64, on the host."""
    return torch.tensor(
        [
            own[position // page_size] * page_size + position % page_size
            for own, several in zip(pages, positions, strict=True)
            for position in several
        ]
    )


class Plan(Protocol):
    """The part of a decode step (one new token for every sequence) that is the same in all layers."""

    position_B: torch.Tensor  # int64, of the new token
    written_B: torch.Tensor  # int64, page * page_size + offset of the new token

    def advance(self) -> None:
        """Move every sequence to its next position; allowed only if that position is in the same page."""
        ...


class PrefillPlan(Protocol):
    """The part of a computation of pieces that is the same in all layers."""

    position_N: torch.Tensor  # int64, of every token
    written_N: torch.Tensor  # int64, page * page_size + offset of every token


class PagedCache:
    """Keys and values of all layers: two tensors (L, pages, ...). Queries arrive scaled."""

    def __init__(self, shape: Sequence[int], page_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.page_size = page_size
        self.key = torch.zeros(*shape, dtype=dtype, device=device)
        self.value = torch.zeros(*shape, dtype=dtype, device=device)

    def plan(self, pages: Sequence[Sequence[int]], positions: Sequence[int]) -> Plan:
        """Plan a decode step: sequence b holds `pages[b]` and adds a token at `positions[b]`."""
        raise NotImplementedError

    def plan_prefill(self, pieces: Sequence[Piece]) -> PrefillPlan:
        """Plan the computation of pieces."""
        raise NotImplementedError

    def places(self, written_N: torch.Tensor) -> torch.Tensor:
        """The index that `write` takes for tokens at page * page_size + offset; the same in all layers."""
        raise NotImplementedError

    def write(self, layer: int, place_X: torch.Tensor, key_NGK: torch.Tensor, value_NGK: torch.Tensor) -> None:
        """Store keys and values of N tokens."""
        raise NotImplementedError

    def decode(self, layer: int, q_BHK: torch.Tensor, plan: Any) -> torch.Tensor:
        """Attention (B, H, K) of one new token per sequence, after its key and value were written."""
        raise NotImplementedError

    def prefill(
        self, layer: int, q_NHK: torch.Tensor, key_NGK: torch.Tensor, value_NGK: torch.Tensor, plan: Any
    ) -> torch.Tensor:
        """Attention (N, H, K) of concatenated pieces, after their keys and values were written."""
        raise NotImplementedError

    def clear(self, pages: Sequence[int]) -> None:
        """Write zeros, so that no nan stays behind for the next holder."""
        self.key[:, pages] = 0
        self.value[:, pages] = 0

    def copy_page(self, source: int, target: int) -> None:
        """Copy one page to another, in all layers."""
        self.key[:, target] = self.key[:, source]
        self.value[:, target] = self.value[:, source]

    def save(self, pages: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy the content of pages to host memory."""
        return self.key[:, pages].cpu(), self.value[:, pages].cpu()

    def restore(self, pages: Sequence[int], content: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Write content that `save` returned to as many pages."""
        key, value = content
        self.key[:, pages], self.value[:, pages] = key.to(self.key.device), value.to(self.value.device)
