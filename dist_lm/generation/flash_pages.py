"""Keys and values in pages for the flash kernel, which follows a table of pages itself (CUDA, bf16 or fp16).

The kernel does not split a sequence among blocks, so that attention gives a sequence the same bits in any batch.

Dimensions: N tokens, B sequences, P pages of the longest one, H query heads, G key/value heads, K d_head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.nn.attention.varlen import varlen_attn

from dist_lm.generation.paged_cache import HeadShape, PageStore, Piece
from dist_lm.generation.pages import pages_for

PAGE_TOKENS = 256  # the kernel takes multiples


@dataclass
class FlashPlan:
    """See `Plan`."""

    position_B: torch.Tensor
    written_B: torch.Tensor
    length_B: torch.Tensor  # int32; of each sequence with its new token
    begin_B: torch.Tensor  # int32 (B + 1,); of each sequence's queries
    page_BP: torch.Tensor  # int32

    def advance(self) -> None:
        """See `Plan`."""
        for moved in (self.position_B, self.written_B, self.length_B):
            moved += 1


class FlashPages(PageStore):
    """The cache of all layers."""

    def __init__(
        self, shape: HeadShape, n_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__((shape.n_layers, n_pages + 1, page_size, shape.kv_heads, shape.d_head), dtype, device)
        self.page_size = page_size
        self.spare_page = n_pages  # no sequence's
        self._grouped = shape.kv_heads != shape.n_heads

    def plan(self, pages: Sequence[Sequence[int]], positions: Sequence[int]) -> FlashPlan:
        """See `PagedCache`."""
        device, size = self.key.device, self.page_size
        last = [own[position // size] for own, position in zip(pages, positions, strict=True)]
        position_B = torch.tensor(positions, device=device)
        return FlashPlan(
            position_B=position_B,
            written_B=torch.tensor(last, device=device) * size + position_B % size,
            length_B=position_B.int() + 1,
            begin_B=torch.arange(len(pages) + 1, dtype=torch.int32, device=device),
            page_BP=self._table(pages, [position + 1 for position in positions]),
        )

    def places(self, written_N: torch.Tensor) -> torch.Tensor:
        """See `PagedCache`."""
        return written_N

    def write(self, layer: int, place_X: torch.Tensor, key_NGK: torch.Tensor, value_NGK: torch.Tensor) -> None:
        """See `PagedCache`."""
        for cache, new in ((self.key, key_NGK), (self.value, value_NGK)):
            cache[layer].flatten(0, 1).index_copy_(0, place_X, new)

    def decode(self, layer: int, q_BHK: torch.Tensor, plan: FlashPlan) -> torch.Tensor:
        """See `PagedCache`."""
        return self._attend(layer, q_BHK, plan.begin_B, 1, plan.length_B, plan.page_BP)

    def prefill(
        self,
        layer: int,
        q_NHK: torch.Tensor,
        key_NGK: torch.Tensor,
        value_NGK: torch.Tensor,
        pieces: Sequence[Piece],
    ) -> torch.Tensor:
        """See `PagedCache`."""
        device, counts = self.key.device, [len(piece.tokens) for piece in pieces]
        lengths = [piece.start + count for piece, count in zip(pieces, counts, strict=True)]
        begin = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)
        length = torch.tensor(lengths, dtype=torch.int32, device=device)
        table = self._table([piece.pages for piece in pieces], lengths)
        return self._attend(layer, q_NHK, begin, max(counts), length, table)

    def _attend(
        self,
        layer: int,
        q_NHK: torch.Tensor,
        begin_B: torch.Tensor,
        longest_query: int,
        length_B: torch.Tensor,
        page_BP: torch.Tensor,
    ) -> torch.Tensor:
        o_NHK = varlen_attn(
            q_NHK.contiguous(),
            self.key[layer],
            self.value[layer],
            begin_B,
            None,
            longest_query,
            page_BP.shape[1] * self.page_size,
            scale=1.0,
            window_size=(-1, 0),  # causal: the last query sees all keys
            enable_gqa=self._grouped,
            seqused_k=length_B,
            block_table=page_BP,
            num_splits=1,
        )
        assert isinstance(o_NHK, torch.Tensor)
        return o_NHK

    def _table(self, pages: Sequence[Sequence[int]], lengths: Sequence[int]) -> torch.Tensor:
        counts = [pages_for(length, self.page_size) for length in lengths]
        longest = max(counts)
        rows = [[*own[:count], *[0] * (longest - count)] for own, count in zip(pages, counts, strict=True)]
        return torch.tensor(rows, dtype=torch.int32, device=self.key.device)
