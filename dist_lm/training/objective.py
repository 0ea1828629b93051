"""What a stage optimises: a function from a model and a batch to a sum and a count.

The trainer divides by the count over all micro-batches and ranks, so no objective knows how a batch was cut.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from dist_lm.data.batch import Batch


@dataclass(frozen=True)
class Logprobs:
    """What tokens were drawn from, in nats, fp32."""

    logprob_BT: torch.Tensor  # of the targets
    entropy_BT: torch.Tensor  # of the whole distribution


class LossModel(Protocol):
    """A model as an objective sees it. Logits are not part of it: no rank may ever hold all of them."""

    def token_losses(self, batch: Batch, label_smoothing: float = 0.0, z_loss: float = 0.0) -> torch.Tensor:
        """Cross-entropy of every token in nats, fp32, (B, T); of one that does not count it may be 0."""
        ...

    def logprobs(self, batch: Batch, temperature: float, entropy_gradient: bool = False) -> Logprobs:
        """Of every target when it is drawn at `temperature`; 0 where `counted_N` leaves it out."""
        ...

    def scores(self, batch: Batch, read_N: torch.Tensor | None = None, learns_offset: bool = True) -> torch.Tensor:
        """A score of what is read up to each token, fp32, (B, T): of a model with a scalar head.

        Args:
            read_N: the tokens, in the flattened batch, whose scores are wanted; others may have 0. None: all.
            learns_offset: whether the head's bias has a gradient, or one of exactly 0.
        """
        ...


@dataclass(frozen=True)
class LossSum:
    """A loss before its division: `total / count` is the mean, over any split of the batch."""

    total: torch.Tensor  # scalar fp32, with gradient
    count: torch.Tensor  # scalar fp32
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)  # sums over the same count, without gradient


class Objective(Protocol):
    def __call__(self, model: LossModel, batch: Batch) -> LossSum: ...
