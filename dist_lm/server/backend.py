"""The interface between the routes and whoever computes answers: an engine in this process (`EngineThread`), or actors
of a pool (`PoolThread`)."""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from dist_lm.generation.embedding import EmbeddingRequest
from dist_lm.generation.prefix_cache import PrefixCounts
from dist_lm.generation.request import Request
from dist_lm.server.engine_thread import Figures, Sink


class Backend(Protocol):
    """Computes the answers of one model. Each method may be called from any thread and returns at once, if it does not
    say otherwise."""

    figures: Figures

    @property
    def failure(self) -> str:
        """Why it computes no more; empty while it does."""
        ...

    @property
    def version(self) -> int:
        """Version of the weights that the next request gets."""
        ...

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way."""
        ...

    @property
    def n_engines(self) -> int:
        """Engines that compute."""
        ...

    @property
    def free_pages(self) -> int:
        """Pages of all caches that no sequence holds."""
        ...

    @property
    def n_pages(self) -> int:
        """Pages of all caches."""
        ...

    @property
    def prefix_counts(self) -> PrefixCounts:
        """How many tokens of prompts were looked up in prefix caches, and how many they held."""
        ...

    def use_threads(self, n: int) -> None:
        """Sets how many threads of torch an engine of this process has; before `start`."""
        ...

    def start(self) -> None:
        """Begins to compute."""
        ...

    def submit(self, request: Request, sink: Sink, *, streams: bool) -> None:
        """Queues a request, whose id must be new; `sink` gets a `Done` for each answer, or one `Failed`.

        Args:
            streams: whether the sink gets `Grown` before.
        """
        ...

    def embed(self, request: EmbeddingRequest, sink: Sink) -> None:
        """Queues a request for embeddings, whose id must be new; `sink` gets one `Embedded` or `Failed`."""
        ...

    def cancel(self, request: str) -> None:
        """Ends a request, if it is under way: its sink gets nothing more."""
        ...

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int, loaded: Callable[[str], None]) -> None:
        """Replaces the weights: requests that run end on the old ones. It may take the time of a copy.

        Args:
            loaded: called in another thread, with an error or an empty text.
        """
        ...

    def stop(self, seconds: float) -> None:
        """Fails all requests, and waits for the end at most so many seconds."""
        ...

    def close(self) -> None:
        """Ends the other processes of the model, if any; after `stop`."""
        ...
