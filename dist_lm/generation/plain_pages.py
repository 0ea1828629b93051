"""The paged cache in plain PyTorch: batched matrix products that read pages in place.

A query's scores with one page are one small product, independent of the batch, and the results of a sequence's pages
are added in their order. A sequence therefore gets the same bits in any batch and wherever its pages lie. Rounding also
depends on the memory alignment of a row, so heads are padded with zeros to whole vectors.

A decode step is planned once and the plan is used in every layer. The plan assigns slots: a slot is one page as one
sequence reads it. The first read takes each page for one of its holders; a page with several holders is read again for
each of the others.

Dimensions: N tokens, B sequences, H query heads, G key/value heads, K d_head, W page size, n slots, P pages of the
longest sequence, S = P * W.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses

from dist_lm.generation.paged_cache import PagedCache, Piece, pages_for
from dist_lm.generation.shard import Share

PLAIN_PAGE_TOKENS = 64  # of a page, unless an engine's options give another size
ALIGNED = 16  # fp32 numbers in 64 bytes
FEWEST_SLOTS = 2  # a single product takes another kernel, which rounds differently
SUMMED = 4  # `sum` over a multiple of this many numbers gives the same bits with and without trailing zeros
WASTE = 2  # read the pool's leading pages in place if they are at most this many times the pages in use, else copy


@dataclass(frozen=True)
class SharedRead:
    """A further read of pages with several holders, each for its next holder."""

    page_S: torch.Tensor
    row_S: torch.Tensor
    again: bool  # the pages are those of the read before


@dataclass
class DecodePlan:
    """See `Plan`."""

    position_B: torch.Tensor  # int64, of the new token
    written_B: torch.Tensor  # int64, page * page_size + offset
    n_pages: int  # the first read takes the pool's pages 0 to n_pages - 1 in place; 0: it copies `page_n`
    page_n: torch.Tensor  # page of each slot of the first read
    row_n: torch.Tensor  # sequence that reads the slot; arbitrary if none does
    shared: list[SharedRead]  # the slots after those of the first read, in this order
    slot_X: torch.Tensor  # (B * P,), slot of each page of a sequence; arbitrary if it has no such page
    summed_X: torch.Tensor  # slot_X with P rounded up to a multiple of SUMMED; n (zeros) if there is no such page
    place_n: torch.Tensor  # index of each slot in `slot_X`
    bias_B1S: torch.Tensor  # fp32, 0 for visible keys, -inf for others

    def advance(self) -> None:
        """See `Plan`."""
        self.position_B += 1
        self.written_B += 1
        row_B = torch.arange(len(self.position_B), device=self.position_B.device)
        self.bias_B1S[row_B, 0, self.position_B] = 0


def plan_decode(
    pages: Sequence[Sequence[int]], positions: Sequence[int], page_size: int, device: torch.device
) -> DecodePlan:
    """See `PagedCache.plan`."""
    counts = [pages_for(position + 1, page_size) for position in positions]
    longest = max(counts)
    readers: dict[int, list[tuple[int, int]]] = {}  # page -> (row, index in slot_X) of each holder
    for row, (own, count) in enumerate(zip(pages, counts, strict=True)):
        for place, page in enumerate(own[:count]):
            readers.setdefault(page, []).append((row, row * longest + place))
    used = sorted(readers)
    stretch = max(used[-1] + 1, FEWEST_SLOTS)
    in_place = stretch <= WASTE * max(len(used), FEWEST_SLOTS)

    absent = -1
    slot_of = [absent] * (len(pages) * longest)
    rows: list[int] = []
    places: list[int] = []

    def read(page: int, turn: int) -> None:
        """Add a slot: the page as read by its holder number `turn`, or by nobody if there are fewer holders."""
        held = readers.get(page, ())
        row, place = held[turn] if turn < len(held) else (0, 0)
        if turn < len(held):
            slot_of[place] = len(rows)
        rows.append(row)
        places.append(place)

    def on_device(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, device=device)

    def read_all(own: list[int], turn: int) -> list[int]:
        for page in own:
            read(page, turn)
        if len(own) < FEWEST_SLOTS:
            own = own * FEWEST_SLOTS
            read(own[0], len(readers[own[0]]))  # a second slot that nobody reads
        return own

    first = read_all(list(range(stretch)) if in_place else used, 0)
    n_first = len(rows)
    shared: list[SharedRead] = []
    before: list[int] = []
    for turn in range(1, max(len(held) for held in readers.values())):
        own = [page for page in used if len(readers[page]) > turn]
        begin = len(rows)
        own = read_all(own, turn)
        shared.append(SharedRead(on_device(own), on_device(rows[begin:]), again=own == before))
        before = own

    slot_BP = on_device(slot_of).view(len(pages), longest)
    summed_BP = F.pad(slot_BP, (0, -longest % SUMMED), value=absent)
    position_B = on_device(positions)
    key_S = torch.arange(longest * page_size, device=device)
    bias_BS = torch.zeros(len(pages), len(key_S), device=device)
    bias_BS.masked_fill_(key_S > position_B[:, None], float("-inf"))
    last = [own[position // page_size] for own, position in zip(pages, positions, strict=True)]
    return DecodePlan(
        position_B=position_B,
        written_B=on_device(last) * page_size + position_B % page_size,
        n_pages=stretch if in_place else 0,
        page_n=on_device(first),
        row_n=on_device(rows[:n_first]),
        shared=shared,
        slot_X=slot_BP.flatten().clamp(min=0),
        summed_X=summed_BP.masked_fill(summed_BP == absent, len(rows)).flatten(),
        place_n=on_device(places),
        bias_B1S=bias_BS[:, None],
    )


class PlainPages(PagedCache):
    """The cache on the CPU, and on devices or dtypes without the flash kernel."""

    def __init__(self, shape: Share, n_pages: int, page_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._padding = -shape.d_head % ALIGNED
        pages = (max(n_pages, FEWEST_SLOTS), shape.kv_heads, page_size, shape.d_head + self._padding)
        super().__init__((shape.n_layers, *pages), dtype, device)
        self._page_size = page_size
        self._group_G = torch.arange(shape.kv_heads, device=device)

    def plan(self, pages: Sequence[Sequence[int]], positions: Sequence[int]) -> DecodePlan:
        return plan_decode(pages, positions, self._page_size, self.key.device)

    def places(self, written_N: torch.Tensor) -> torch.Tensor:
        written_N1, width = written_N[:, None], self._page_size
        return ((written_N1 // width * len(self._group_G) + self._group_G) * width + written_N1 % width).flatten()

    def write(self, layer: int, place_X: torch.Tensor, key_NGK: torch.Tensor, value_NGK: torch.Tensor) -> None:
        for cache, new_NGK in ((self.key, key_NGK), (self.value, value_NGK)):
            new = F.pad(new_NGK, (0, self._padding)) if self._padding else new_NGK
            cache[layer].view(-1, new.shape[-1]).index_copy_(0, place_X, new.reshape(-1, new.shape[-1]))

    def decode(self, layer: int, q_BHK: torch.Tensor, plan: DecodePlan) -> torch.Tensor:
        q_BHK = F.pad(q_BHK, (0, self._padding)) if self._padding else q_BHK
        n_rows, heads, width = q_BHK.shape
        reads = self._reads(layer, plan)
        groups, page = reads[0][0].shape[1:3]
        scores = [
            torch.bmm(
                q_BHK.index_select(0, row).view(-1, heads // groups, width),
                key.flatten(0, 1).transpose(1, 2),
            ).view(-1, heads * page)
            for key, _, row in reads
        ]
        score_nX = scores[0] if len(scores) == 1 else torch.cat(scores)
        score_BPHW = score_nX.index_select(0, plan.slot_X).view(n_rows, -1, heads, page)
        n_pages = score_BPHW.shape[1]
        weight_BHS = (score_BPHW.transpose(1, 2).flatten(2) + plan.bias_B1S).softmax(dim=-1).to(q_BHK.dtype)
        weight_BPHW = weight_BHS.view(n_rows, heads, n_pages, page).transpose(1, 2)
        weight_nX = weight_BPHW.reshape(n_rows * n_pages, heads * page).index_select(0, plan.place_n)
        # one more slot of zeros: the output of pages that a sequence does not have
        output_nX = q_BHK.new_zeros(len(score_nX) + 1, heads * width)
        begin = 0
        for _, value, row in reads:
            own = slice(begin, begin + len(row))
            into = output_nX[own].view(-1, heads // groups, width)
            torch.bmm(weight_nX[own].view(-1, heads // groups, page), value.flatten(0, 1), out=into)
            begin = own.stop
        output_BPX = output_nX.index_select(0, plan.summed_X).view(n_rows, -1, heads * width)
        return output_BPX.sum(dim=1).view(n_rows, heads, width)[..., : width - self._padding]

    def _reads(self, layer: int, plan: DecodePlan) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(keys (n, G, W, K), values, the sequence that reads each slot) for every read of a plan."""
        key, value = self.key[layer], self.value[layer]
        if plan.n_pages:
            reads = [(key[: plan.n_pages], value[: plan.n_pages], plan.row_n)]
        else:
            reads = [(key.index_select(0, plan.page_n), value.index_select(0, plan.page_n), plan.row_n)]
        copied = key[:0], value[:0]
        for shared in plan.shared:
            if not shared.again:
                copied = key.index_select(0, shared.page_S), value.index_select(0, shared.page_S)
            reads.append((copied[0], copied[1], shared.row_S))
        return reads

    def prefill(
        self,
        layer: int,
        q_NHK: torch.Tensor,
        key_NGK: torch.Tensor,
        value_NGK: torch.Tensor,
        pieces: Sequence[Piece],
    ) -> torch.Tensor:
        if self._is_one_call(pieces, q_NHK):
            n_rows = len(pieces)
            q_BHTK, key_BGTK, value_BGTK = (
                x.contiguous().unflatten(0, (n_rows, -1)).transpose(1, 2) for x in (q_NHK, key_NGK, value_NGK)
            )
            output = F.scaled_dot_product_attention(
                q_BHTK, key_BGTK, value_BGTK, is_causal=True, scale=1.0, enable_gqa=q_BHTK.shape[1] != key_BGTK.shape[1]
            )
            return output.transpose(1, 2).flatten(0, 1)
        outputs, begin = [], 0
        for piece in pieces:
            own = slice(begin, begin + len(piece.tokens))
            begin = own.stop
            if piece.start == 0:
                # contiguous: the alignment of a row must not depend on the other pieces
                key, value, bias = key_NGK[own].contiguous(), value_NGK[own].contiguous(), None
                key, value = key.transpose(0, 1), value.transpose(0, 1)
            else:
                n_keys = piece.start + len(piece.tokens)
                pages = torch.tensor(piece.pages, device=q_NHK.device)
                key, value = (
                    cache[layer].index_select(0, pages).transpose(0, 1).flatten(1, 2)[:, :n_keys, : q_NHK.shape[-1]]
                    for cache in (self.key, self.value)
                )
                bias = _causal_bias(piece.start, n_keys, q_NHK)
            output = F.scaled_dot_product_attention(
                q_NHK[own].contiguous().transpose(0, 1)[None],
                key[None],
                value[None],
                attn_mask=bias,
                is_causal=bias is None,
                scale=1.0,
                enable_gqa=key.shape[0] != q_NHK.shape[1],
            )
            outputs.append(output[0].transpose(0, 1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _is_one_call(self, pieces: Sequence[Piece], q_NHK: torch.Tensor) -> bool:
        """Whether one call gives each piece the bits that it gets alone: all begin a sequence and are equally long, and
        heads are aligned."""
        n_tokens = len(pieces[0].tokens)
        alike = all(piece.start == 0 and len(piece.tokens) == n_tokens for piece in pieces)
        return len(pieces) > 1 and alike and q_NHK.shape[-1] % ALIGNED == 0


def _causal_bias(start: int, n_keys: int, like: torch.Tensor) -> torch.Tensor:
    key_S = torch.arange(n_keys, device=like.device)
    visible_TS = key_S <= key_S[start:, None]
    return torch.zeros(visible_TS.shape, dtype=like.dtype, device=like.device).masked_fill_(~visible_TS, float("-inf"))
