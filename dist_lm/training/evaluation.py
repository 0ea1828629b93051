"""Loss on held-out documents, in all and by language."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist

from dist_lm.data.evaluation_batches import EvaluationBatch
from dist_lm.training.objective import LossModel


@torch.no_grad()
def summed_losses(
    model: LossModel,
    batches: Iterable[EvaluationBatch],
    n_languages: int,
    device: torch.device,
    group: dist.ProcessGroup | None,
    alive: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Sums over all ranks: (n_languages, 2) float64 with nats and predicted tokens of each language (collective).

    Args:
        alive: called after every batch.
    """
    sums = torch.zeros(n_languages, 2, dtype=torch.float64, device=device)
    for evaluation in batches:
        batch = evaluation.batch.to(device)
        language = evaluation.language_BT.to(device).flatten()
        losses = model.token_losses(batch).flatten().double()
        counted = language >= 0
        pairs = torch.stack([losses, torch.ones_like(losses)], dim=1)
        sums.index_add_(0, language[counted], pairs[counted])
        alive()
    dist.all_reduce(sums, group=group)
    return sums


def loss_metrics(
    sums: Sequence[tuple[float, float]], languages: Sequence[str], n_bytes: Mapping[str, float]
) -> dict[str, float]:
    """`val/loss` (nats a token) and `val/bits_per_byte`, in all and by language.

    Bits per byte = nats / ln 2 / UTF-8 bytes of the text; predicting where a document ends counts against the model.
    """
    metrics: dict[str, float] = {}
    nats, tokens = (sum(column) for column in zip(*sums, strict=True))
    metrics["val/loss"] = nats / tokens
    metrics["val/bits_per_byte"] = nats / math.log(2) / sum(n_bytes.values())
    for (language_nats, language_tokens), language in zip(sums, languages, strict=True):
        if language_tokens:
            metrics[f"val/loss_{language}"] = language_nats / language_tokens
            metrics[f"val/bits_per_byte_{language}"] = language_nats / math.log(2) / n_bytes[language]
    return metrics


def mixed_metrics(sums: Sequence[tuple[float, float]], corpus: str, n_bytes: Mapping[str, float]) -> dict[str, float]:
    """`val/loss_CORPUS` and `val/bits_per_byte_CORPUS` of a corpus that is mixed into a stage."""
    nats, tokens = (sum(column) for column in zip(*sums, strict=True))
    return {
        f"val/loss_{corpus}": nats / tokens,
        f"val/bits_per_byte_{corpus}": nats / math.log(2) / sum(n_bytes.values()),
    }
