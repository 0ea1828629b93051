"""What a decoder asks of a cache in pages, whatever reads it; and the piece of a prompt.

Dimensions: N tokens, B sequences, H query heads, G key/value heads, K d_head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Piece:
    """A stretch of one sequence's tokens, to be computed and cached at once.

    Where a sequence is cut depends on the sequence alone, so that what a token gets does not depend on other work.
    """

    tokens: Sequence[int]
    start: int  # position of the first
    pages: Sequence[int]  # that hold positions 0 to the last one's


class HeadShape(Protocol):
    """The numbers a cache is made for: of a whole model, or of what one of several ranks computes."""

    @property
    def n_layers(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def d_head(self) -> int: ...


class Plan(Protocol):
    """One new token for every sequence of a batch: what is the same in every layer."""

    position_B: torch.Tensor  # int64; of the new token
    written_B: torch.Tensor  # int64; page * page_size + offset

    def advance(self) -> None:
        """To the next position of every sequence, none of which begins a new page."""
        ...


class PagedCache(Protocol):
    """Keys and values of all layers. Queries come scaled."""

    def plan(self, pages: Sequence[Sequence[int]], positions: Sequence[int]) -> Plan:
        """Of a step that adds a token at `positions` of sequences that hold `pages`."""
        ...

    def places(self, written_N: torch.Tensor) -> torch.Tensor:
        """Where `write` puts tokens at page * page_size + offset: the same in every layer."""
        ...

    def write(self, layer: int, place_X: torch.Tensor, key_NGK: torch.Tensor, value_NGK: torch.Tensor) -> None:
        """Store keys and values of N tokens."""
        ...

    def decode(self, layer: int, q_BHK: torch.Tensor, plan: Any) -> torch.Tensor:
        """Attention (B, H, K) of one new token a sequence, whose own key and value are written already."""
        ...

    def prefill(
        self,
        layer: int,
        q_NHK: torch.Tensor,
        key_NGK: torch.Tensor,
        value_NGK: torch.Tensor,
        pieces: Sequence[Piece],
    ) -> torch.Tensor:
        """Attention (N, H, K) of pieces that lie one behind the other, whose keys and values are written already."""
        ...

    def clear(self, pages: Sequence[int]) -> None:
        """Zeros in place of what may not be a number, and would spread."""
        ...

    def copy_page(self, source: int, target: int) -> None:
        """One page's content to another one, in all layers."""
        ...

    def save(self, pages: Sequence[int]) -> Any:
        """The content of some pages in the host's memory, to be put back with `restore`."""
        ...

    def restore(self, pages: Sequence[int], content: Any) -> None:
        """Put back what `save` gave, into as many pages."""
        ...


class PageStore:
    """The tensors of a cache, (L, pages, ...) each for keys and values, and what can be done with whole pages."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.key = torch.zeros(*shape, dtype=dtype, device=device)
        self.value = torch.zeros(*shape, dtype=dtype, device=device)

    def clear(self, pages: Sequence[int]) -> None:
        """See `PagedCache`."""
        self.key[:, pages] = 0
        self.value[:, pages] = 0

    def copy_page(self, source: int, target: int) -> None:
        """See `PagedCache`."""
        self.key[:, target] = self.key[:, source]
        self.value[:, target] = self.value[:, source]

    def save(self, pages: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """See `PagedCache`."""
        return self.key[:, pages].cpu(), self.value[:, pages].cpu()

    def restore(self, pages: Sequence[int], content: tuple[torch.Tensor, torch.Tensor]) -> None:
        """See `PagedCache`."""
        key, value = content
        self.key[:, pages], self.value[:, pages] = key.to(self.key.device), value.to(self.value.device)
