"""Learners of `dist-lm bench learn`, ours and those of peers; a recipe is a configuration and the learner it trains.

Dimensions: B sequences, T tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dist_lm.config.root import Config
from dist_lm.data.batch import Batch


class Learner(Protocol):
    """A model in training."""

    @property
    def flops_per_token(self) -> float: ...

    @property
    def parameters(self) -> int: ...

    def step(self, number: int, micro_batches: Sequence[Batch]) -> None:
        """Takes the optimizer step of this 0-based number on the micro-batches of a step."""
        ...

    def token_losses(self, batch: Batch) -> torch.Tensor:
        """Returns the cross-entropy of every target, nats, fp32 (B, T)."""
        ...


@dataclass(frozen=True)
class Recipe:
    """One row of the table."""

    name: str
    config: Config
    build: Callable[[Config, int, torch.device], Learner]  # (config, its steps, device)
