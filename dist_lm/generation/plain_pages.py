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
from itertools import chain

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses

from dist_lm.generation.paged_cache import PagedCache, Piece, in_cache, pages_for
from dist_lm.generation.shard import Share
from dist_lm.generation.transfer import upload

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


@dataclass
class PlainPrefillPlan:
    """See `PrefillPlan`."""

    position_N: torch.Tensor
    written_N: torch.Tensor
    one_call: bool
    counts: Sequence[int]  # tokens of each piece
    page_S: Sequence[torch.Tensor]  # pages of each piece; empty if it begins a sequence
    bias_TS: Sequence[torch.Tensor | None]  # 0 for visible keys, -inf for others; None: causal


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

    def read_all(own: list[int], turn: int) -> list[int]:
        for page in own:
            read(page, turn)
        if len(own) < FEWEST_SLOTS:
            own = own * FEWEST_SLOTS
            read(own[0], len(readers[own[0]]))  # a second slot that nobody reads
        return own

    first = read_all(list(range(stretch)) if in_place else used, 0)
    n_first = len(rows)
    further: list[tuple[list[int], list[int], bool]] = []  # the values of `SharedRead`
    before: list[int] = []
    for turn in range(1, max(len(held) for held in readers.values())):
        own = [page for page in used if len(readers[page]) > turn]
        begin = len(rows)
        own = read_all(own, turn)
        further.append((own, rows[begin:], own == before))
        before = own

    host = [positions, slot_of, places, first, rows[:n_first]]
    for own, row, _ in further:
        host += [own, row]
    written_B = in_cache(pages, [[position] for position in positions], page_size)
    written_B, position_B, slot_X, place_n, page_n, row_n, *reads = upload(
        device, written_B, *(torch.tensor(values) for values in host)
    )
    shared = [
        SharedRead(page_S, row_S, again)
        for page_S, row_S, (_, _, again) in zip(reads[::2], reads[1::2], further, strict=True)
    ]
    slot_BP = slot_X.view(len(pages), longest)
    summed_BP = F.pad(slot_BP, (0, -longest % SUMMED), value=absent)
    key_S = torch.arange(longest * page_size, device=device)
    bias_BS = torch.zeros(len(pages), len(key_S), device=device)
    bias_BS.masked_fill_(key_S > position_B[:, None], float("-inf"))
    return DecodePlan(
        position_B=position_B,
        written_B=written_B,
        n_pages=stretch if in_place else 0,
        page_n=page_n,
        row_n=row_n,
        shared=shared,
        slot_X=slot_BP.flatten().clamp(min=0),
        summed_X=summed_BP.masked_fill(summed_BP == absent, len(rows)).flatten(),
        place_n=place_n,
        bias_B1S=bias_BS[:, None],
    )


class PlainPages(PagedCache):
    """The cache on the CPU, and on devices or dtypes without the flash kernel."""

    def __init__(self, shape: Share, n_pages: int, page_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._padding = -shape.d_head % ALIGNED
        pages = (max(n_pages, FEWEST_SLOTS), shape.kv_heads, page_size, shape.d_head + self._padding)
        super().__init__((shape.n_layers, *pages), page_size, dtype, device)
        self._group_G = torch.arange(shape.kv_heads, device=device)

    def plan(self, pages: Sequence[Sequence[int]], positions: Sequence[int]) -> DecodePlan:
        return plan_decode(pages, positions, self.page_size, self.key.device)

    def plan_prefill(self, pieces: Sequence[Piece]) -> PlainPrefillPlan:
        own = [piece.pages if piece.start else () for piece in pieces]
        positions = [piece.positions for piece in pieces]
        written_N, position_N, *page_S = upload(
            self.key.device,
            in_cache([piece.pages for piece in pieces], positions, self.page_size),
            torch.tensor([*chain(*positions)]),
            *(torch.tensor(pages, dtype=torch.int64) for pages in own),
        )
        counts = [len(piece.tokens) for piece in pieces]
        # one call gives each piece the bits that it gets alone if all begin a sequence and are equally long, and heads
        # are aligned
        alike = not any(piece.start for piece in pieces) and len({*counts}) == 1
        return PlainPrefillPlan(
            position_N=position_N,
            written_N=written_N,
            one_call=len(pieces) > 1 and alike and not self._padding,
            counts=counts,
            page_S=page_S,
            bias_TS=[_causal_bias(piece, self.key) if piece.start else None for piece in pieces],
        )

    def places(self, written_N: torch.Tensor) -> torch.Tensor:
        written_N1, width = written_N[:, None], self.page_size
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
        self, layer: int, q_NHK: torch.Tensor, key_NGK: torch.Tensor, value_NGK: torch.Tensor, plan: PlainPrefillPlan
    ) -> torch.Tensor:
        if plan.one_call:
            n_rows = len(plan.counts)
            q_BHTK, key_BGTK, value_BGTK = (
                x.contiguous().unflatten(0, (n_rows, -1)).transpose(1, 2) for x in (q_NHK, key_NGK, value_NGK)
            )
            output = F.scaled_dot_product_attention(
                q_BHTK, key_BGTK, value_BGTK, is_causal=True, scale=1.0, enable_gqa=q_BHTK.shape[1] != key_BGTK.shape[1]
            )
            return output.transpose(1, 2).flatten(0, 1)
        outputs, begin = [], 0
        for count, pages, bias in zip(plan.counts, plan.page_S, plan.bias_TS, strict=True):
            own = slice(begin, begin + count)
            begin = own.stop
            if bias is None:
                # contiguous: the alignment of a row must not depend on the other pieces
                key, value = key_NGK[own].contiguous(), value_NGK[own].contiguous()
                key, value = key.transpose(0, 1), value.transpose(0, 1)
            else:
                n_keys = bias.shape[1]
                key, value = (
                    cache[layer].index_select(0, pages).transpose(0, 1).flatten(1, 2)[:, :n_keys, : q_NHK.shape[-1]]
                    for cache in (self.key, self.value)
                )
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


def _causal_bias(piece: Piece, like: torch.Tensor) -> torch.Tensor:
    key_S = torch.arange(piece.positions.stop, device=like.device)
    visible_TS = key_S <= key_S[piece.start :, None]
    return torch.zeros(visible_TS.shape, dtype=like.dtype, device=like.device).masked_fill_(~visible_TS, float("-inf"))
