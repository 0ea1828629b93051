"""The paged cache for the flash kernel (CUDA, bf16 or fp16), and decode steps over it as CUDA graphs.

The kernel follows a table of pages. It may split the keys of a sequence among thread blocks, because few long sequences
would leave most of a GPU idle otherwise. It chooses the number of parts by the size of the batch and its longest
sequence, so the last bits of an answer depend on other requests.

A decode step launches hundreds of small kernels, which would wait for Python; a graph launches them as one. A graph has
fixed tensors and a fixed number of sequences. One graph is captured for each of a few sizes when first needed. A step
takes the smallest graph that fits and fills it with sequences that write to a spare page.

Dimensions: N tokens, B sequences, P pages of the longest sequence, H query heads, G key/value heads, K d_head,
V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch.nn.attention import current_flash_attention_impl

from dist_lm.generation.paged_cache import PagedCache, Piece, cells_of, pages_for
from dist_lm.generation.shard import Share
from dist_lm.generation.transfer import upload
from dist_lm.model.size import flash_window

PAGE_TOKENS = 256  # the kernel accepts pages of multiples of this many tokens
DENSE, STRIDE = 8, 8  # graph sizes: powers of two up to DENSE, then multiples of STRIDE
WARM_UP = 2  # steps before a capture, in which libraries choose kernels and allocate memory

Step = Callable[[], torch.Tensor]
Capture = Callable[[Step], tuple[Callable[[], None], torch.Tensor]]
"""Records a step. Returns a function that replays it, and the tensor that holds the logits afterwards."""


@dataclass
class Queries:
    """Says which keys the queries of each sequence see; the queries are the sequence's last tokens."""

    longest: int  # most queries of a sequence
    begin_B: torch.Tensor  # int32 (B + 1,), begin of each sequence's queries
    key_begin_B: torch.Tensor  # int32 (B + 1,), see `FlashPages.key_begins`
    length_B: torch.Tensor  # int32, tokens of each sequence, including the new ones
    page_BP: torch.Tensor  # int32, table of pages


@dataclass
class FlashPrefillPlan:
    """The `PrefillPlan` of `FlashPages`."""

    position_N: torch.Tensor
    cell_N: torch.Tensor
    queries: Queries


@dataclass
class FlashDecodePlan:
    """The `DecodePlan` of `FlashPages`."""

    position_B: torch.Tensor
    cell_B: torch.Tensor
    queries: Queries

    def advance(self) -> None:
        # In place: graphs read these tensors.
        self.position_B += 1
        self.cell_B += 1
        self.queries.length_B += 1


class FlashPages(PagedCache):
    """The cache for the flash kernel. Its last page is spare: no sequence holds it."""

    token_dim = 1

    def __init__(self, share: Share, n_pages: int, page_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(
            (share.n_layers, n_pages + 1, page_tokens, share.kv_heads, share.d_head), page_tokens, dtype, device
        )
        self.spare_page = n_pages
        self._is_grouped = share.kv_heads != share.n_heads
        self._window_sizes = [flash_window(window) for window in share.windows]

    def plan(self, pages: Sequence[Sequence[int]], positions: Sequence[int]) -> FlashDecodePlan:
        return FlashDecodePlan(*self._plan(pages, [range(position, position + 1) for position in positions]))

    def plan_prefill(self, pieces: Sequence[Piece]) -> FlashPrefillPlan:
        return FlashPrefillPlan(*self._plan([piece.pages for piece in pieces], [piece.positions for piece in pieces]))

    def _plan(
        self, pages: Sequence[Sequence[int]], positions: Sequence[range]
    ) -> tuple[torch.Tensor, torch.Tensor, Queries]:
        """Returns (position of every new token, its cell, its queries), on the cache's device, after one copy.

        Args:
            positions: of the new tokens of each sequence.
        """
        n_queries = [len(new) for new in positions]
        n_pages = max(pages_for(new.stop, self.page_tokens) for new in positions)
        # Rows of the table have one length; the kernel does not read the padding.
        table = [[*row[:n_pages], *[0] * (n_pages - len(row))] for row in pages]
        position_N, cell_N, begin_B, key_begin_B, length_B, page_BP = upload(
            self.key.device,
            torch.tensor([*chain(*positions)]),
            cells_of(pages, positions, self.page_tokens),
            _int32([0, *accumulate(n_queries)]),
            self.key_begins(len(pages), n_pages, torch.device("cpu")),
            _int32([new.stop for new in positions]),
            _int32(table),
        )
        return position_N, cell_N, Queries(max(n_queries), begin_B, key_begin_B, length_B, page_BP)

    def key_begins(self, n_rows: int, n_pages: int, device: torch.device) -> torch.Tensor:
        """Returns the begins of each row's keys as if all pages of its table lay in a line: int32 (n_rows + 1,).

        FlashAttention-2 refuses query offsets without key offsets. It then reads only the first `length_B` keys of a
        row, so the offsets depend on the table's shape alone, and steps and graphs never change them.
        FlashAttention-3, which torch uses only if it is activated, refuses key offsets beside a table of pages.
        """
        return torch.arange(n_rows + 1, dtype=torch.int32, device=device) * (n_pages * self.page_tokens)

    def write_index(self, cell_N: torch.Tensor) -> torch.Tensor:
        return cell_N

    def write(self, layer: int, index_X: torch.Tensor, k_NGK: torch.Tensor, v_NGK: torch.Tensor) -> None:
        for cache, new_NGK in ((self.key, k_NGK), (self.value, v_NGK)):
            cache[layer].flatten(0, 1).index_copy_(0, index_X, new_NGK)

    def decode(self, layer: int, q_BHK: torch.Tensor, plan: FlashDecodePlan) -> torch.Tensor:
        return self._attend(layer, q_BHK, plan.queries)

    def prefill(
        self, layer: int, q_NHK: torch.Tensor, k_NGK: torch.Tensor, v_NGK: torch.Tensor, plan: FlashPrefillPlan
    ) -> torch.Tensor:
        return self._attend(layer, q_NHK, plan.queries)

    def _attend(self, layer: int, q_NHK: torch.Tensor, queries: Queries) -> torch.Tensor:
        """Returns the causal attention (N, H, K) of the queries to one layer of the cache, which holds their keys
        already."""
        from torch.nn.attention.varlen import varlen_attn  # imports the compiler (2 s), which a CPU does not need

        is_fa3 = current_flash_attention_impl() == "FA3"
        o_NHK = varlen_attn(
            q_NHK.contiguous(),
            self.key[layer],
            self.value[layer],
            queries.begin_B,
            None if is_fa3 else queries.key_begin_B,
            queries.longest,
            queries.page_BP.shape[1] * self.page_tokens,
            scale=self.score_scale,
            window_size=self._window_sizes[layer],  # counted from the last query, which sees the last key
            enable_gqa=self._is_grouped,
            seqused_k=queries.length_B,
            block_table=queries.page_BP,
        )
        assert isinstance(o_NHK, torch.Tensor)
        return o_NHK


def _int32(numbers: Sequence) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


@dataclass
class _Graph:
    token_B: torch.Tensor
    plan: FlashDecodePlan
    logits_BV: torch.Tensor
    replay: Callable[[], None]
    n_filled: int = 0  # sequences in the previous step; further rows write to the spare page


class DecodeGraphs:
    """Replays the decode steps of one decoder."""

    def __init__(
        self,
        step: Callable[[torch.Tensor, FlashDecodePlan], torch.Tensor],
        cache: FlashPages,
        n_pages: int,
        capture: Capture | None = None,
    ) -> None:
        """
        Args:
            step: computes fp32 logits (B, V) of one token per sequence, see `Decoder.decode`.
            n_pages: pages of the longest possible sequence.
            capture: records a step; by default as a CUDA graph.
        """
        self._step, self._cache, self._n_pages = step, cache, n_pages
        self._capture = capture or CudaCapture(cache.key.device)
        self._graphs: dict[int, _Graph] = {}

    def __call__(self, token_B: torch.Tensor, plan: FlashDecodePlan) -> torch.Tensor:
        """Returns logits (B, V); the next step overwrites them."""
        n_rows = len(token_B)
        size = graph_size(n_rows)
        if size not in self._graphs:
            self._graphs[size] = self._build(size)
        graph = self._graphs[size]

        # Rows that had a sequence in the previous step must not write to its pages.
        if graph.n_filled > n_rows:
            self._fill_spare(graph.token_B, graph.plan, slice(n_rows, graph.n_filled))
        graph.n_filled = n_rows

        graph.token_B[:n_rows] = token_B
        graph.plan.position_B[:n_rows] = plan.position_B
        graph.plan.cell_B[:n_rows] = plan.cell_B
        graph.plan.queries.length_B[:n_rows] = plan.queries.length_B
        graph.plan.queries.page_BP[:n_rows, : plan.queries.page_BP.shape[1]] = plan.queries.page_BP

        graph.replay()
        return graph.logits_BV[:n_rows]

    def _build(self, size: int) -> _Graph:
        """Returns a new graph for `size` sequences: runs the step a few times and captures it, which takes seconds. All
        rows write to the spare page; `_graphs` does not change."""
        device = self._cache.key.device

        def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        token_B = zeros(torch.int64, size)
        plan = FlashDecodePlan(
            position_B=zeros(torch.int64, size),
            cell_B=zeros(torch.int64, size),
            queries=Queries(
                longest=1,
                begin_B=torch.arange(size + 1, dtype=torch.int32, device=device),
                key_begin_B=self._cache.key_begins(size, self._n_pages, device),
                length_B=zeros(torch.int32, size),
                page_BP=zeros(torch.int32, size, self._n_pages),
            ),
        )
        self._fill_spare(token_B, plan, slice(None))
        # The tensors above are the inputs of the graph: every replay reads them at the same addresses.
        replay, logits_BV = self._capture(lambda: self._step(token_B, plan))
        return _Graph(token_B, plan, logits_BV, replay)

    def _fill_spare(self, token_B: torch.Tensor, plan: FlashDecodePlan, rows: slice) -> None:
        """Sets the rows `rows` of a graph's inputs so that they compute one token in the spare page."""
        token_B[rows] = 0
        plan.position_B[rows] = 0
        plan.cell_B[rows] = self._cache.spare_page * self._cache.page_tokens
        plan.queries.length_B[rows] = 1
        plan.queries.page_BP[rows] = self._cache.spare_page


def graph_size(n_rows: int) -> int:
    """Returns the size of the graph for `n_rows` sequences."""
    if n_rows <= DENSE:
        return 1 << (n_rows - 1).bit_length()
    return -(-n_rows // STRIDE) * STRIDE


class CudaCapture:
    """Records steps as CUDA graphs. They share one memory pool, because they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        """
        Args:
            device: the device that computes the steps; it need not be the current device.
        """
        self._device = device
        self._memory_pool = torch.cuda.graph_pool_handle()
        # The stream must belong to that device: the stream that torch would choose may not record its steps. Graphs
        # share memory only if they are captured on one stream.
        self._stream = torch.cuda.Stream(device)

    def __call__(self, step: Step) -> tuple[Callable[[], None], torch.Tensor]:
        caller = torch.cuda.current_stream(self._device)
        # The step reads tensors that the caller's stream may still be writing.
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP):
                step()

        # Other threads, such as one that pins memory, may call CUDA during the capture.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory_pool, stream=self._stream, capture_error_mode="thread_local"):
            logits_BV = step()
        caller.wait_stream(self._stream)
        return graph.replay, logits_BV
