"""The paged KV cache: the bookkeeping of pages, and the cache in plain PyTorch.

A page holds keys and values of a fixed number of tokens in every layer. Several sequences may hold one page while none
of them writes to it. `PagePool` counts the holders of pages, without tensors. `PagedCache` is what the decoder uses: it
plans a step once and then writes and attends in every layer. `PlainPages`, below, implements it for any device and
dtype; `flash_pages.py` implements it for the flash kernel. A cell is the space of one token in a page; its number is
page * page_tokens + offset.

Dimensions: L layers, N tokens, T tokens of a piece, B sequences, H query heads, G key/value heads, K d_head, W
page_tokens, P pages of the longest sequence or of a piece, S keys that a query may see (P * W in a decode step), n
slots, of one read or of all reads of a `PlainDecodePlan` (a slot is a page and a sequence that reads it: see above
`SharedRead`), X the dimension that an index flattens.
"""

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses

from dist_lm.generation.shard import Share
from dist_lm.generation.transfer import concatenated, upload

PLAIN_PAGE_TOKENS = 64  # tokens of a page of `PlainPages`, unless an engine's options give another size
ALIGNED = 16  # fp32 numbers in 64 bytes
MIN_SLOTS = 2  # a batched product of one matrix takes another kernel, which rounds differently
SUM_MULTIPLE = 4  # `sum` over a multiple of this many numbers gives the same bits with and without trailing zeros
# Queries of a piece attend in blocks that begin at multiples of this many tokens. Rounding depends on the size of a
# block, so the keys and values of a complete one are a function of the tokens up to its end alone.
BLOCK = 32
MAX_WASTE = 2  # read pages 0 to n in place, without a copy, if n is at most this many times the number of pages in use
ABSENT = -1


class PagePool:
    """Counts which pages, 0 to n - 1, are free and how many sequences hold the others.

    The lowest free page is taken first, which keeps the pages in use close to each other. A page that is kept
    (`keep`) is not free when its last holder gives it back, but idle: it is taken only when no page is free, the one
    that has been idle for longest first.
    """

    def __init__(self, n_pages: int, evicted: Callable[[int], None] | None = None) -> None:
        """
        Args:
            evicted: called with a kept page when it is taken for other content.
        """
        self._free = list(range(n_pages))
        self._holders = [0] * n_pages
        self._kept: set[int] = set()
        self._idle: OrderedDict[int, None] = OrderedDict()  # kept pages without a holder, idle for longest first
        self._evicted = evicted
        self.changes = 0  # grows whenever a page is taken, shared or given back

    @property
    def n_pages(self) -> int:
        return len(self._holders)

    @property
    def n_free(self) -> int:
        """Pages that `take` can return, free or idle."""
        return len(self._free) + len(self._idle)

    def holders(self, page: int) -> int:
        """Returns the number of sequences that hold a page."""
        return self._holders[page]

    def take(self) -> int:
        """Takes a free page, or else an idle one, which then has one holder; `n_free` must not be 0."""
        self.changes += 1
        if self._free:
            page = heapq.heappop(self._free)
        else:
            page, _ = self._idle.popitem(last=False)
            self._kept.discard(page)
            if self._evicted:
                self._evicted(page)
        self._holders[page] = 1
        return page

    def share(self, pages: Iterable[int]) -> None:
        """Adds one holder to each of these pages, which are held or idle."""
        self.changes += 1
        for page in pages:
            assert self._holders[page] > 0 or page in self._idle
            self._idle.pop(page, None)
            self._holders[page] += 1

    def give_back(self, pages: Iterable[int]) -> None:
        """Removes one holder from each of these pages of a sequence, which are in its order; a page without holders is
        free, or idle if it is kept."""
        self.changes += 1
        # The end of a sequence becomes idle first, because its pages are worth nothing without those before them.
        for page in reversed([*pages]):
            assert self._holders[page] > 0
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._kept:
                self._idle[page] = None
            else:
                heapq.heappush(self._free, page)

    def keep(self, page: int) -> None:
        """Keeps the content of a page that is held, until it is evicted or dropped."""
        assert self._holders[page] > 0
        self._kept.add(page)

    def drop(self, page: int) -> None:
        """Keeps a page no longer; an idle one is free."""
        self._kept.discard(page)
        if page in self._idle:
            del self._idle[page]
            heapq.heappush(self._free, page)


def pages_for(n_tokens: int, page_tokens: int) -> int:
    """Returns the number of pages that hold `n_tokens`."""
    return -(-n_tokens // page_tokens)


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one sequence, computed and cached in one step: of its prompt, or forced by a constraint.

    Piece boundaries depend on the sequence alone, so that its logits do not depend on other requests.
    """

    tokens: Sequence[int]
    start: int  # position of the first token
    pages: Sequence[int]  # hold all positions from 0 to that of the last token
    adapter: str = ""  # name of the sequence's adapter; empty: none

    @property
    def positions(self) -> range:
        return range(self.start, self.start + len(self.tokens))

    def blocks(self, block_tokens: int) -> Iterator[range]:
        """Yields the positions of its tokens in blocks, which begin at multiples of `block_tokens`."""
        start, stop = self.start, self.positions.stop
        while start < stop:
            end = min(stop, (start // block_tokens + 1) * block_tokens)
            yield range(start, end)
            start = end


def cells_of(pages: Sequence[Sequence[int]], positions: Sequence[Iterable[int]], page_tokens: int) -> torch.Tensor:
    """Returns the cells of `positions[b]` of the sequences b that hold `pages[b]`, concatenated: (cells,) int64 on
    the host."""
    return torch.tensor(
        [
            sequence_pages[position // page_tokens] * page_tokens + position % page_tokens
            for sequence_pages, sequence_positions in zip(pages, positions, strict=True)
            for position in sequence_positions
        ]
    )


class DecodePlan(Protocol):
    """The part of a decode step (one new token for every sequence) that is the same in all layers."""

    position_B: torch.Tensor  # int64, position of the new token
    cell_B: torch.Tensor  # int64, cell of the new token

    def advance(self) -> None:
        """Moves every sequence to its next position; allowed only if that position is in the same page."""


class PrefillPlan(Protocol):
    """The part of a computation of pieces that is the same in all layers."""

    position_N: torch.Tensor  # int64, position of every token
    cell_N: torch.Tensor  # int64, cell of every token


class PagedCache:
    """Keys and values of all layers: two tensors (L, pages, ...)."""

    score_scale = 1.0  # factor of attention scores; 1 if queries arrive scaled
    token_dim: int  # dimension of a page's tokens, counted without that of the pages

    def __init__(self, shape: Sequence[int], page_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self.page_tokens = page_tokens
        self.key = torch.zeros(*shape, dtype=dtype, device=device)
        self.value = torch.zeros(*shape, dtype=dtype, device=device)

    def plan(self, pages: Sequence[Sequence[int]], positions: Sequence[int]) -> DecodePlan:
        """Plans a decode step: sequence b holds `pages[b]` and adds a token at `positions[b]`."""
        raise NotImplementedError

    def plan_prefill(self, pieces: Sequence[Piece]) -> PrefillPlan:
        """Plans the computation of pieces."""
        raise NotImplementedError

    def write_index(self, cell_N: torch.Tensor) -> torch.Tensor:
        """Returns the index that `write` takes for these cells; the same in all layers."""
        raise NotImplementedError

    def write(self, layer: int, index_X: torch.Tensor, k_NGK: torch.Tensor, v_NGK: torch.Tensor) -> None:
        """Stores keys and values of N tokens."""
        raise NotImplementedError

    def decode(self, layer: int, q_BHK: torch.Tensor, plan: Any) -> torch.Tensor:
        """Returns the attention (B, H, K) of one new token per sequence, after its key and value were written."""
        raise NotImplementedError

    def prefill(
        self, layer: int, q_NHK: torch.Tensor, k_NGK: torch.Tensor, v_NGK: torch.Tensor, plan: Any
    ) -> torch.Tensor:
        """Returns the attention (N, H, K) of concatenated pieces, after their keys and values were written."""
        raise NotImplementedError

    def clear(self, pages: Sequence[int]) -> None:
        """Writes zeros, so that no nan stays behind for the next holder."""
        # A masked key has weight 0, but 0 * nan would still be nan.
        self.key[:, pages] = 0
        self.value[:, pages] = 0

    def copy_page(self, source: int, target: int, n_tokens: int) -> None:
        """Copies the first `n_tokens` tokens of one page to another, in all layers."""
        for cache in (self.key, self.value):
            copied = cache[:, source].narrow(self.token_dim, 0, n_tokens)
            cache[:, target].narrow(self.token_dim, 0, n_tokens).copy_(copied)

    def save(self, pages: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns copies of the keys and values of pages in host memory, in the shape that the cache has for so many
        pages."""
        return self.key[:, pages].cpu(), self.value[:, pages].cpu()

    def restore(self, pages: Sequence[int], content: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Writes content that `save` returned to as many pages."""
        key, value = content
        self.key[:, pages], self.value[:, pages] = key.to(self.key.device), value.to(self.value.device)


# The cache in plain PyTorch: batched matrix products that read pages in place.
#
# A query's scores with one page are one small product, independent of the batch, and the outputs for the pages of a
# sequence are added in their order. A sequence therefore gets the same bits in any batch and wherever its pages lie.
# Rounding also depends on the memory alignment of a row, so heads are padded with zeros to full vector registers.
#
# A decode step reads pairs (page, sequence). For example, sequences A and B hold page 0, and B holds page 1: the first
# read is (0, A), (1, B), the second (0, B). Each pair is a slot. The first read covers every page once, for one of its
# holders; each further holder of a page needs one more read.


@dataclass(frozen=True)
class SharedRead:
    """A further read of pages with several holders, each for its next holder; n are the slots of this read."""

    page_n: torch.Tensor  # page of each slot
    row_n: torch.Tensor  # sequence that reads each slot
    repeats: bool  # the pages are those of the previous read


@dataclass
class PlainDecodePlan:
    """The `DecodePlan` of `PlainPages`."""

    position_B: torch.Tensor  # int64, position of the new token
    cell_B: torch.Tensor  # int64, cell of the new token
    n_leading: int  # the first read takes the pool's pages 0 to n_leading - 1 in place; 0: it copies `page_n`
    page_n: torch.Tensor  # page of each slot of the first read
    row_n: torch.Tensor  # sequence that reads each slot of the first read; arbitrary if none does
    shared: list[SharedRead]  # the slots after those of the first read, in this order
    # (B * P,): at b * P + p the slot, among those of all reads, of page p of sequence b; arbitrary if b has no page p
    slot_X: torch.Tensor
    # the same with P rounded up to SUM_MULTIPLE; if b has no page p, the number of one more slot, which holds zeros
    summed_slot_X: torch.Tensor
    index_n: torch.Tensor  # the inverse of `slot_X`: for each slot its b * P + p; arbitrary if no sequence reads it
    bias_B1S: torch.Tensor  # fp32, 0 for visible keys, -inf for others
    window: int | None  # width of the window of layers that have one; None: no layer has
    window_bias_B1S: torch.Tensor  # the mask of those layers; without any, `bias_B1S`

    def advance(self) -> None:
        # No page changes, so of the mask only the new position has to become visible.
        self.position_B += 1
        self.cell_B += 1
        self.bias_B1S.scatter_(-1, self.position_B[:, None, None], 0.0)
        if self.window is not None:
            self.window_bias_B1S = _within_window(self.bias_B1S, self.position_B, self.window)


@dataclass
class PlainPrefillPlan:
    """The `PrefillPlan` of `PlainPages`."""

    position_N: torch.Tensor
    cell_N: torch.Tensor
    in_one_call: bool
    lengths: Sequence[int]  # tokens of each piece
    pages_read: Sequence[torch.Tensor]  # int64, pages of each piece, in order; empty if no block reads the cache
    blocks: Sequence[Sequence["Block"]]  # blocks of each piece
    windowed: "PlainPrefillPlan | None" = None  # the plan of layers with a window, if any piece is longer


@dataclass(frozen=True)
class Block:
    """Consecutive queries of a piece that attend together; not a layer (`model.transformer.Block`)."""

    queries: slice  # among the tokens of the piece
    bias_TS: torch.Tensor | None  # 0 for visible keys, -inf for others; None: the block begins a sequence


class _Slots:
    """Collects the slots of a plan, in the order of reads."""

    def __init__(self, readers: Mapping[int, Sequence[tuple[int, int]]], n_indices: int) -> None:
        """
        Args:
            readers: by page, (row of the sequence, index in `PlainDecodePlan.slot_X`) of each holder.
            n_indices: length of `PlainDecodePlan.slot_X`.
        """
        self._readers = readers
        self.rows: list[int] = []  # sequence that reads each slot
        self.indices: list[int] = []  # index of each slot in `PlainDecodePlan.slot_X`
        self.slot_of = [ABSENT] * n_indices

    def read(self, pages: list[int], holder: int) -> list[int]:
        """Adds a slot for each page, at least one, for its holder number `holder`, from 0. Returns the page of each
        slot; a single page gets a second slot that no sequence reads, since a read has at least MIN_SLOTS."""
        for page in pages:
            self._add(page, holder)
        if len(pages) < MIN_SLOTS:
            pages = pages * MIN_SLOTS
            self._add(pages[0], len(self._readers[pages[0]]))  # a second slot that no sequence reads
        return pages

    def _add(self, page: int, holder: int) -> None:
        """Adds the slot of `page` for its holder number `holder`, from 0, or a slot that no sequence reads if it has
        fewer holders."""
        holders = self._readers.get(page, ())
        row, index = 0, 0  # arbitrary if the page has fewer holders
        if holder < len(holders):
            row, index = holders[holder]
            self.slot_of[index] = len(self.rows)
        self.rows.append(row)
        self.indices.append(index)


def plan_decode(
    pages: Sequence[Sequence[int]],
    positions: Sequence[int],
    page_tokens: int,
    device: torch.device,
    window: int | None = None,
) -> PlainDecodePlan:
    """Returns the plan of a decode step of `PlainPages`, on `device`, after one copy; at least one sequence.

    Arguments are those of `PagedCache.plan`; `pages[b]` may have more pages than the positions need.

    Args:
        window: of the layers with a window; None: no layer has one.
    """
    n_pages = [pages_for(position + 1, page_tokens) for position in positions]
    longest = max(n_pages)
    readers: dict[int, list[tuple[int, int]]] = {}
    for row, (sequence_pages, count) in enumerate(zip(pages, n_pages, strict=True)):
        for index, page in enumerate(sequence_pages[:count]):
            readers.setdefault(page, []).append((row, row * longest + index))
    used_pages = sorted(readers)
    slots = _Slots(readers, len(pages) * longest)

    # The pool keeps used pages close to page 0, so mostly all leading pages can be read without a copy.
    first_pages, n_leading = used_pages, 0
    n_in_place = max(used_pages[-1] + 1, MIN_SLOTS)
    if n_in_place <= MAX_WASTE * max(len(used_pages), MIN_SLOTS):
        first_pages, n_leading = list(range(n_in_place)), n_in_place
    first_pages = slots.read(first_pages, holder=0)
    first_rows = list(slots.rows)

    # Answers to one request share the pages of its prompt: one more read for each further holder.
    further_reads: list[tuple[list[int], list[int], bool]] = []  # the fields of `SharedRead`
    previous: list[int] = []
    for holder in range(1, max(len(holders) for holders in readers.values())):
        begin = len(slots.rows)
        shared_pages = slots.read([page for page in used_pages if len(readers[page]) > holder], holder)
        further_reads.append((shared_pages, slots.rows[begin:], shared_pages == previous))
        previous = shared_pages

    # All indices travel in one copy.
    host_lists = [positions, slots.slot_of, slots.indices, first_pages, first_rows]
    for shared_pages, rows, _ in further_reads:
        host_lists += [shared_pages, rows]
    cell_B = cells_of(pages, [[position] for position in positions], page_tokens)
    cell_B, position_B, slot_X, index_n, page_n, row_n, *uploaded = upload(
        device, cell_B, *(torch.tensor(numbers) for numbers in host_lists)
    )
    shared = [
        SharedRead(read_page_n, read_row_n, repeats)
        for read_page_n, read_row_n, (_, _, repeats) in zip(uploaded[::2], uploaded[1::2], further_reads, strict=True)
    ]

    slot_BP = slot_X.view(len(pages), longest)
    summed_slot_BP = F.pad(slot_BP, (0, -longest % SUM_MULTIPLE), value=ABSENT)
    key_S = torch.arange(longest * page_tokens, device=device)
    bias_BS = torch.zeros(len(pages), len(key_S), device=device)
    bias_BS.masked_fill_(key_S > position_B[:, None], float("-inf"))
    bias_B1S = bias_BS[:, None]
    return PlainDecodePlan(
        position_B=position_B,
        cell_B=cell_B,
        n_leading=n_leading,
        page_n=page_n,
        row_n=row_n,
        shared=shared,
        slot_X=slot_BP.flatten().clamp(min=0),
        summed_slot_X=summed_slot_BP.masked_fill(summed_slot_BP == ABSENT, len(slots.rows)).flatten(),
        index_n=index_n,
        bias_B1S=bias_B1S,
        window=window,
        window_bias_B1S=bias_B1S if window is None else _within_window(bias_B1S, position_B, window),
    )


def _within_window(bias_B1S: torch.Tensor, position_B: torch.Tensor, window: int) -> torch.Tensor:
    """Returns the mask of a decode step for layers with a window, a new tensor."""
    key_S = torch.arange(bias_B1S.shape[-1], device=bias_B1S.device)
    return bias_B1S.masked_fill((key_S <= position_B[:, None] - window)[:, None], float("-inf"))


class PlainPages(PagedCache):
    """The cache on the CPU, and on devices or dtypes without the flash kernel."""

    token_dim = 2

    def __init__(self, share: Share, n_pages: int, page_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocates keys and values of `share` for `n_pages` pages of `page_tokens` tokens, at least MIN_SLOTS pages.

        Heads are padded to a multiple of ALIGNED channels.
        """
        self._padding = -share.d_head % ALIGNED
        pages = (max(n_pages, MIN_SLOTS), share.kv_heads, page_tokens, share.d_head + self._padding)
        super().__init__((share.n_layers, *pages), page_tokens, dtype, device)
        # Each layer reads them in every step, and to index the tensors of all layers costs a microsecond each time.
        self._key_of_layer, self._value_of_layer = self.key.unbind(), self.value.unbind()
        self._head_G = torch.arange(share.kv_heads, device=device)
        self._has_window = [window is not None for window in share.windows]
        self._window = next((window for window in share.windows if window is not None), None)

    def plan(self, pages: Sequence[Sequence[int]], positions: Sequence[int]) -> PlainDecodePlan:
        return plan_decode(pages, positions, self.page_tokens, self.key.device, self._window)

    def plan_prefill(self, pieces: Sequence[Piece]) -> PlainPrefillPlan:
        """Returns the plan of computing pieces, on the cache's device, after one copy; nothing is computed or
        written."""
        positions = [piece.positions for piece in pieces]
        longest = max(piece.positions.stop for piece in pieces)
        has_windowed = self._window is not None and longest > self._window
        blocks = [self._blocks(piece) for piece in pieces]
        windowed = [self._blocks(piece, self._window) for piece in pieces] if has_windowed else blocks

        # Only the first block of a sequence attends to new keys; any other reads the pages up to its piece's end.
        pages_to_read = [
            piece.pages[: pages_for(piece.positions.stop, self.page_tokens)]
            if any(block.bias_TS is not None for block in (*piece_blocks, *piece_windowed))
            else ()
            for piece, piece_blocks, piece_windowed in zip(pieces, blocks, windowed, strict=True)
        ]
        cell_N, position_N, *pages_read = upload(
            self.key.device,
            cells_of([piece.pages for piece in pieces], positions, self.page_tokens),
            torch.tensor([*chain(*positions)]),
            *(torch.tensor(pages, dtype=torch.int64) for pages in pages_to_read),
        )

        # All pieces go into one call only where each gets the bits that it would get alone: if all are one block that
        # begins a sequence and have one length, and heads are aligned.
        lengths = [len(piece.tokens) for piece in pieces]
        are_alike = not any(map(len, pages_to_read)) and len({*lengths}) == 1
        plan = PlainPrefillPlan(
            position_N=position_N,
            cell_N=cell_N,
            in_one_call=len(pieces) > 1 and are_alike and not self._padding,
            lengths=lengths,
            pages_read=pages_read,
            blocks=blocks,
        )
        if has_windowed:
            plan.windowed = replace(plan, blocks=windowed, in_one_call=False)
        return plan

    def _blocks(self, piece: Piece, window: int | None = None) -> list[Block]:
        """Returns the blocks of a piece, for layers with a window or without; on a card, which rounds as it likes, the
        piece is one block."""
        block_tokens = BLOCK if self.key.device.type == "cpu" else piece.positions.stop
        return [
            Block(
                slice(block.start - piece.start, block.stop - piece.start),
                _causal_bias(block, self.key, window),
            )
            for block in piece.blocks(block_tokens)
        ]

    def write_index(self, cell_N: torch.Tensor) -> torch.Tensor:
        # The cache is (pages, G, W, K), so the heads of a token are not adjacent.
        page_N1, offset_N1 = cell_N[:, None] // self.page_tokens, cell_N[:, None] % self.page_tokens
        return ((page_N1 * len(self._head_G) + self._head_G) * self.page_tokens + offset_N1).flatten()

    def write(self, layer: int, index_X: torch.Tensor, k_NGK: torch.Tensor, v_NGK: torch.Tensor) -> None:
        for cache, new_NGK in ((self._key_of_layer[layer], k_NGK), (self._value_of_layer[layer], v_NGK)):
            if self._padding:
                new_NGK = F.pad(new_NGK, (0, self._padding))
            width = new_NGK.shape[-1]
            cache.view(-1, width).index_copy_(0, index_X, new_NGK.reshape(-1, width))

    def decode(self, layer: int, q_BHK: torch.Tensor, plan: PlainDecodePlan) -> torch.Tensor:
        """Returns the attention (B, H, K) of one new token per sequence, whose key and value are in the cache already.

        A row gets the same bits whatever other rows are in the batch and wherever its pages lie.
        """
        if self._padding:
            q_BHK = F.pad(q_BHK, (0, self._padding))
        n_rows, n_heads, width = q_BHK.shape
        reads = self._reads(layer, plan)
        n_groups, page_tokens = reads[0][0].shape[1:3]

        # Scores of every slot, then sorted by sequence and page for the softmax.
        scores_nX = [
            torch.bmm(
                q_BHK.index_select(0, row_n).view(-1, n_heads // n_groups, width),
                k_nGWK.flatten(0, 1).transpose(1, 2),
            ).view(-1, n_heads * page_tokens)
            for k_nGWK, _, row_n in reads
        ]
        score_nX = concatenated(scores_nX)
        score_BPHW = score_nX.index_select(0, plan.slot_X).view(n_rows, -1, n_heads, page_tokens)
        if self.score_scale != 1:
            score_BPHW = score_BPHW.float() * self.score_scale
        n_pages = score_BPHW.shape[1]
        bias_B1S = plan.window_bias_B1S if self._has_window[layer] else plan.bias_B1S
        weight_BHS = (score_BPHW.transpose(1, 2).flatten(2) + bias_B1S).softmax(dim=-1).to(q_BHK.dtype)

        # Back to slots for the products with values.
        weight_BPHW = weight_BHS.view(n_rows, n_heads, n_pages, page_tokens).transpose(1, 2)
        weight_nX = weight_BPHW.reshape(n_rows * n_pages, n_heads * page_tokens).index_select(0, plan.index_n)
        output_nX = q_BHK.new_zeros(len(score_nX) + 1, n_heads * width)  # a last slot of zeros for absent pages
        begin = 0
        for _, v_nGWK, row_n in reads:
            read = slice(begin, begin + len(row_n))
            torch.bmm(
                weight_nX[read].view(-1, n_heads // n_groups, page_tokens),
                v_nGWK.flatten(0, 1),
                out=output_nX[read].view(-1, n_heads // n_groups, width),
            )
            begin = read.stop

        output_BPX = output_nX.index_select(0, plan.summed_slot_X).view(n_rows, -1, n_heads * width)
        return output_BPX.sum(dim=1).view(n_rows, n_heads, width)[..., : width - self._padding]

    def _reads(self, layer: int, plan: PlainDecodePlan) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Returns (keys (n, G, W, K), values, the sequence that reads each slot) for every read of a plan."""
        key, value = self._key_of_layer[layer], self._value_of_layer[layer]
        if plan.n_leading:
            reads = [(key[: plan.n_leading], value[: plan.n_leading], plan.row_n)]
        else:
            reads = [(key.index_select(0, plan.page_n), value.index_select(0, plan.page_n), plan.row_n)]

        copied = key[:0], value[:0]
        for shared in plan.shared:
            if not shared.repeats:
                copied = key.index_select(0, shared.page_n), value.index_select(0, shared.page_n)
            reads.append((copied[0], copied[1], shared.row_n))
        return reads

    def prefill(
        self, layer: int, q_NHK: torch.Tensor, k_NGK: torch.Tensor, v_NGK: torch.Tensor, plan: PlainPrefillPlan
    ) -> torch.Tensor:
        """Returns the attention (N, H, K) of concatenated pieces, causal inside each sequence.

        A block that begins a sequence attends to `k_NGK` and `v_NGK`; any other to the cache, which holds them already.
        """
        if plan.windowed is not None and self._has_window[layer]:
            plan = plan.windowed
        if plan.in_one_call:
            n_rows = len(plan.lengths)
            q_BHTK, k_BGTK, v_BGTK = (
                x_N.contiguous().unflatten(0, (n_rows, -1)).transpose(1, 2) for x_N in (q_NHK, k_NGK, v_NGK)
            )
            o_BHTK = F.scaled_dot_product_attention(
                q_BHTK,
                k_BGTK,
                v_BGTK,
                is_causal=True,
                scale=self.score_scale,
                enable_gqa=q_BHTK.shape[1] != k_BGTK.shape[1],
            )
            return o_BHTK.transpose(1, 2).flatten(0, 1)

        outputs_THK = []
        begin = 0
        for length, page_P, blocks in zip(plan.lengths, plan.pages_read, plan.blocks, strict=True):
            q_THK, k_TGK, v_TGK = (x_N[begin : begin + length] for x_N in (q_NHK, k_NGK, v_NGK))
            begin += length
            cached_GSK: list[torch.Tensor] = []
            if len(page_P):
                caches = (self._key_of_layer[layer], self._value_of_layer[layer])
                cached_GSK = [cache.index_select(0, page_P).transpose(0, 1).flatten(1, 2) for cache in caches]
            for block in blocks:
                if block.bias_TS is None:
                    # A copy, because the alignment of a row must not depend on the pieces before it.
                    k_GSK, v_GSK = (x[block.queries].contiguous().transpose(0, 1) for x in (k_TGK, v_TGK))
                else:
                    n_keys, width = block.bias_TS.shape[1], q_NHK.shape[-1]
                    k_GSK, v_GSK = (x_GSK[:, :n_keys, :width] for x_GSK in cached_GSK)
                o_1HTK = F.scaled_dot_product_attention(
                    q_THK[block.queries].contiguous().transpose(0, 1)[None],
                    k_GSK[None],
                    v_GSK[None],
                    attn_mask=block.bias_TS,
                    is_causal=block.bias_TS is None,
                    scale=self.score_scale,
                    enable_gqa=k_GSK.shape[0] != q_NHK.shape[1],
                )
                outputs_THK.append(o_1HTK[0].transpose(0, 1))
        return concatenated(outputs_THK)


def _causal_bias(block: range, like: torch.Tensor, window: int | None = None) -> torch.Tensor | None:
    # A block that begins a sequence sees no cached keys, and the kernel masks its own keys itself.
    if not block.start and (window is None or block.stop <= window):
        return None
    key_S = torch.arange(block.stop, device=like.device)
    visible_TS = key_S <= key_S[block.start :, None]
    if window is not None:
        visible_TS &= key_S > key_S[block.start :, None] - window
    return torch.zeros(visible_TS.shape, dtype=like.dtype, device=like.device).masked_fill_(~visible_TS, float("-inf"))
