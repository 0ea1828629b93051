"""Next-token cross-entropy, over as many logits at a time as memory allows.

Dimensions: N tokens, D d_model, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses
from torch.utils.checkpoint import checkpoint

FP32_BYTES = 4

Losses = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits (N, V), targets (N,) int64) -> (N,) fp32."""


def token_losses(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> torch.Tensor:
    """Cross-entropy of every token in nats, fp32, (N,).

    Args:
        label_smoothing: as in Szegedy et al. 2016, section 7: the target distribution is `(1 - a) * one_hot + a / V`.
        z_loss: adds `z_loss * log(Z)^2` with Z the sum of the exponentials (Chowdhery et al. 2022, section 5).
    """
    logits_NV = logits_NV.float()
    losses_N = F.cross_entropy(logits_NV, targets_N, reduction="none", label_smoothing=label_smoothing)
    return losses_N + z_loss * logits_NV.logsumexp(-1).square() if z_loss else losses_N


def losses_in_chunks(
    x_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, losses: Losses, chunk_bytes: int
) -> torch.Tensor:
    """`losses(x @ weight^T, targets)` with no more than `chunk_bytes` of fp32 logits at once (0: no limit).

    More than one chunk means that the backward pass computes the logits of each again, one chunk after the other.
    """
    step = max(1, chunk_bytes // (FP32_BYTES * weight_VD.shape[0])) if chunk_bytes else len(x_ND)

    def of_part(part_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        return losses(F.linear(part_ND, weight_VD), targets_N)

    if len(x_ND) <= step:
        return of_part(x_ND, weight_VD, targets_N)
    parts = zip(x_ND.split(step), targets_N.split(step), strict=True)
    return torch.cat(
        [
            checkpoint(of_part, x, weight_VD, targets, use_reentrant=False, preserve_rng_state=False)
            for x, targets in parts
        ]
    )
