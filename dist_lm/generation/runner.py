"""What an engine asks of a model with its cache, on however many devices it lies."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from dist_lm.generation.paged_cache import Piece, Plan


class Runner(Protocol):
    """A model and its cache. `Decoder` alone, or `ShardedDecoder` with others that do the same at the same time."""

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take over the weights of a model, by the names of its parameters; the old ones go.

        Raises:
            ArtefactError: names the parameter that is missing or has another shape.
        """
        ...

    def prefill(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Compute and cache pieces of sequences; fp32 logits (pieces, V) behind the last token of each."""
        ...

    def plan(self, pages: Sequence[Sequence[int]], positions: Sequence[int]) -> Plan:
        """Of a step that adds a token at `positions` of sequences that hold `pages`."""
        ...

    def decode(self, token_B: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Compute and cache one token a sequence; fp32 logits (B, V) behind it."""
        ...

    def copy_page(self, source: int, target: int) -> None:
        """One page's content to another one, in all layers."""
        ...

    def clear(self, pages: Sequence[int]) -> None:
        """Zeros in place of what may not be a number, and would spread."""
        ...

    def save(self, pages: Sequence[int]) -> Any:
        """The content of some pages in the host's memory, to be put back with `restore` or given up with `forget`."""
        ...

    def restore(self, pages: Sequence[int], content: Any) -> None:
        """Put back what `save` gave, into as many pages."""
        ...

    def forget(self, content: Any) -> None:
        """What `save` gave is not needed any more."""
        ...

    def check(self) -> None:
        """Refuse to go on with what was computed if it may be wrong.

        Raises:
            RankLostError: a process that shares the model has ended.
        """
        ...

    def close(self) -> None:
        """End what it started."""
        ...
