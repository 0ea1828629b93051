"""Objectives: functions from a model and a batch to a sum and a count; next-token loss, trained on and evaluated.

The trainer divides the sum by the count over all micro-batches and ranks, so no objective knows how the global batch
was split.

Dimensions: B sequences, T tokens, N = B * T, L languages.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist

from dist_lm.data.batch import Batch
from dist_lm.data.evaluation_batches import EvaluationBatch
from dist_lm.model.transformer import Transformer


@dataclass(frozen=True)
class LossSum:
    """A loss before its division: `total / count` is the mean, however the batch is split."""

    total: torch.Tensor  # scalar fp32, with gradient
    count: torch.Tensor  # scalar fp32
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)  # sums without gradient
    # Divisors of metrics that have their own; the others are divided by `count`.
    metric_counts: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Objective(Protocol):
    def __call__(self, model: Transformer, batch: Batch) -> LossSum: ...


Prepare = Callable[[Transformer, Sequence[Batch]], Sequence[Batch]]
"""(model, micro-batches of this rank) -> the same micro-batches plus whatever their loss needs from the other
micro-batches and ranks (collective)."""


def next_token(label_smoothing: float = 0.0, z_loss: float = 0.0) -> Objective:
    """Returns the objective of language models: cross-entropy, in nats, over the tokens whose loss mask is 1."""

    def objective(model: Transformer, batch: Batch) -> LossSum:
        # Tokens with loss mask 0 may get no logits; the model returns loss 0 for them.
        losses_BT = model.token_losses(batch, label_smoothing, z_loss)
        return LossSum(total=(losses_BT * batch.loss_mask_BT).sum(), count=batch.loss_mask_BT.sum())

    return objective


@torch.no_grad()
def summed_losses(
    model: Transformer,
    batches: Iterable[EvaluationBatch],
    n_languages: int,
    device: torch.device,
    group: dist.ProcessGroup | None,
    alive: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Returns the loss on held-out documents, summed over all ranks of `group` (collective).

    Tokens of language -1 do not count. No gradient is computed, and FSDP may leave parameters gathered.

    Args:
        group: None: all ranks.
        alive: called after every batch.

    Returns:
        (n_languages, 2) float64 on `device`: nats and predicted tokens of each language.
    """
    # Tokens that do not count have language -1; they are added to one more row, which is cut off.
    sums_L2 = torch.zeros(n_languages + 1, 2, dtype=torch.float64, device=device)
    for batch in batches:
        evaluation = batch.to(device)
        losses_N = model.token_losses(evaluation.batch).flatten().double()
        language_N = evaluation.language_BT.flatten()
        language_N = language_N.where(language_N >= 0, n_languages)
        sums_L2.index_add_(0, language_N, torch.stack([losses_N, torch.ones_like(losses_N)], dim=1))
        alive()

    sums_L2 = sums_L2[:-1].contiguous()
    dist.all_reduce(sums_L2, group=group)
    return sums_L2


def loss_metrics(
    sums: Sequence[tuple[float, float]], languages: Sequence[str], n_bytes: Mapping[str, float]
) -> dict[str, float]:
    """Returns `val/loss` (nats per token) and `val/bits_per_byte`, in total and by language.

    Bits per byte = nats / ln 2 / UTF-8 bytes of the text. The nats include the end-of-text tokens. A language without
    predicted tokens has no metrics of its own.

    Args:
        sums: (nats, predicted tokens) of each language, as `summed_losses` returns them.
        n_bytes: UTF-8 bytes of the text by language.
    """
    nats, tokens = (sum(column) for column in zip(*sums, strict=True))
    metrics = {"val/loss": nats / tokens, "val/bits_per_byte": nats / math.log(2) / sum(n_bytes.values())}
    for (language_nats, language_tokens), language in zip(sums, languages, strict=True):
        if language_tokens:
            metrics[f"val/loss_{language}"] = language_nats / language_tokens
            metrics[f"val/bits_per_byte_{language}"] = language_nats / math.log(2) / n_bytes[language]
    return metrics


def mixed_metrics(sums: Sequence[tuple[float, float]], corpus: str, n_bytes: Mapping[str, float]) -> dict[str, float]:
    """Returns `val/loss_CORPUS` (nats per token) and `val/bits_per_byte_CORPUS` of a corpus that is mixed into the data
    of a stage, over all its languages. Arguments are those of `loss_metrics`."""
    nats, tokens = (sum(column) for column in zip(*sums, strict=True))
    return {
        f"val/loss_{corpus}": nats / tokens,
        f"val/bits_per_byte_{corpus}": nats / math.log(2) / sum(n_bytes.values()),
    }
