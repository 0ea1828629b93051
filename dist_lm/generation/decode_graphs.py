"""The decode step on CUDA as graphs: launched as one, where its hundreds of small kernels would wait for Python.

A graph computes with fixed tensors and a fixed number of sequences. One is captured for each of a few sizes when it is
first needed; a step takes the smallest that fits, and fills it up with sequences that write to a page nobody reads.

Dimensions: B sequences, P pages of the longest one, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dist_lm.generation.flash_pages import FlashPages, FlashPlan

DENSE, STRIDE = 8, 8  # sizes: powers of two up to DENSE, then every STRIDE
WARM_UP = 2  # steps before a capture: libraries choose and allocate in them

Step = Callable[[], torch.Tensor]
Capture = Callable[[Step], tuple[Callable[[], None], torch.Tensor]]
"""Records a step: what replays it, and where its result lies then."""


@dataclass
class _Graph:
    token_B: torch.Tensor
    plan: FlashPlan
    logits_BV: torch.Tensor
    replay: Callable[[], None]
    filled: int = 0  # sequences of the step before; the rest write to the spare page


class DecodeGraphs:
    """Decode steps of one decoder, replayed."""

    def __init__(
        self,
        step: Callable[[torch.Tensor, FlashPlan], torch.Tensor],
        cache: FlashPages,
        n_pages: int,
        capture: Capture | None = None,
    ) -> None:
        """
        Args:
            step: fp32 logits (B, V) of one token a sequence, see `Decoder.decode`.
            n_pages: of the longest sequence.
            capture: how a step is recorded; by default as a CUDA graph.
        """
        self._step, self._cache, self._n_pages = step, cache, n_pages
        self._capture = capture or CudaCapture()
        self._graphs: dict[int, _Graph] = {}

    def forget(self) -> None:
        """The weights are others: graphs, which hold the old ones, are captured anew."""
        self._graphs.clear()

    def __call__(self, token_B: torch.Tensor, plan: FlashPlan) -> torch.Tensor:
        """Logits (B, V), to be read before the next step."""
        n_rows = len(token_B)
        size = graph_size(n_rows)
        if size not in self._graphs:
            self._graphs[size] = self._build(size)
        graph = self._graphs[size]
        if graph.filled > n_rows:
            self._spare(graph.token_B, graph.plan, slice(n_rows, graph.filled))
        graph.filled = n_rows
        graph.token_B[:n_rows] = token_B
        graph.plan.position_B[:n_rows] = plan.position_B
        graph.plan.written_B[:n_rows] = plan.written_B
        graph.plan.length_B[:n_rows] = plan.length_B
        graph.plan.page_BP[:n_rows, : plan.page_BP.shape[1]] = plan.page_BP
        graph.replay()
        return graph.logits_BV[:n_rows]

    def _build(self, size: int) -> _Graph:
        device = self._cache.key.device

        def integers(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        token_B = integers(torch.int64, size)
        plan = FlashPlan(
            position_B=integers(torch.int64, size),
            written_B=integers(torch.int64, size),
            length_B=integers(torch.int32, size),
            begin_B=torch.arange(size + 1, dtype=torch.int32, device=device),
            page_BP=integers(torch.int32, size, self._n_pages),
        )
        self._spare(token_B, plan, slice(None))
        replay, logits_BV = self._capture(lambda: self._step(token_B, plan))
        return _Graph(token_B, plan, logits_BV, replay)

    def _spare(self, token_B: torch.Tensor, plan: FlashPlan, rows: slice) -> None:
        """Rows without a sequence."""
        token_B[rows] = 0
        plan.position_B[rows] = 0
        plan.written_B[rows] = self._cache.spare_page * self._cache.page_size
        plan.length_B[rows] = 1
        plan.page_BP[rows] = self._cache.spare_page


def graph_size(n_rows: int) -> int:
    """Sequences of the graph that takes `n_rows`."""
    if n_rows <= DENSE:
        return 1 << (n_rows - 1).bit_length()
    return -(-n_rows // STRIDE) * STRIDE


class CudaCapture:
    """Steps as CUDA graphs that share one pool of memory: they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> tuple[Callable[[], None], torch.Tensor]:
        """See `Capture`."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = step()
        return graph.replay, result
