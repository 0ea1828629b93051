"""Cross-entropy of logits whose vocabulary is spread over ranks: one small message, no rank sees another's logits.

Dimensions: N tokens, V pieces of this rank.
"""

import torch
from fairscale.nn.model_parallel.mappings import gather_from_model_parallel_region

from dist_lm.parallel.placement import Slice
from dist_lm.parallel.tensor_axis import TensorAxis


def vocab_parallel_losses(
    logits_NV: torch.Tensor,
    targets_N: torch.Tensor,
    pieces: Slice,
    vocab_size: int,
    axis: TensorAxis,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """`model.cross_entropy.token_losses` of the whole logits: (N,) fp32, the same on every rank (collective).

    `loss = log Z - (1 - a) * logit[target] - a * mean(logits) + z_loss * log(Z)^2`, put together from what each
    rank has of the sum of exponentials Z (as its logarithm), of the target's logit and of the mean.

    Args:
        logits_NV: of the pieces that this rank holds, without padding.
    """
    logits_NV = logits_NV.float()
    row_N = targets_N - pieces.start
    held_N = (row_N >= 0) & (row_N < pieces.real)
    target_N = logits_NV.gather(-1, row_N.where(held_N, 0)[:, None]).squeeze(-1) * held_N
    parts = [logits_NV.logsumexp(-1), target_N]
    if label_smoothing:
        parts.append(logits_NV.sum(-1) / vocab_size)
    # (part, N) of each rank, one rank after the other
    gathered = gather_from_model_parallel_region(torch.stack(parts)).unflatten(-1, (axis.size, -1))
    log_z_N = gathered[0].logsumexp(0)
    losses_N = log_z_N - (1 - label_smoothing) * gathered[1].sum(0)
    if label_smoothing:
        losses_N = losses_N - label_smoothing * gathered[2].sum(0)
    return losses_N + z_loss * log_z_N.square() if z_loss else losses_N


def vocab_parallel_logprobs_and_entropy(
    logits_NV: torch.Tensor,
    targets_N: torch.Tensor,
    pieces: Slice,
    axis: TensorAxis,
    temperature: float,
    entropy_gradient: bool,
) -> torch.Tensor:
    """`model.cross_entropy.logprobs_and_entropy` of the whole logits: (N, 2) fp32, the same on every rank (collective).

    `entropy = log Z - sum of p * logit`, of which a rank gives the mean logit under its own pieces' distribution.

    Args:
        logits_NV: of the pieces that this rank holds, without padding.
    """
    x_NV = logits_NV.float() / temperature
    row_N = targets_N - pieces.start
    held_N = (row_N >= 0) & (row_N < pieces.real)
    target_N = x_NV.gather(-1, row_N.where(held_N, 0)[:, None]).squeeze(-1) * held_N
    own_NV = x_NV if entropy_gradient else x_NV.detach()
    mean_N = (own_NV.softmax(-1) * own_NV).sum(-1)
    parts = torch.stack([x_NV.logsumexp(-1), target_N, mean_N])
    gathered = gather_from_model_parallel_region(parts).unflatten(-1, (axis.size, -1))
    log_z_N = gathered[0].logsumexp(0)
    log_z_RN = gathered[0] if entropy_gradient else gathered[0].detach()
    share_RN = log_z_RN.softmax(0)  # of the probability, a rank
    entropy_N = log_z_RN.logsumexp(0) - (share_RN * gathered[2]).sum(0)
    return torch.stack([gathered[1].sum(0) - log_z_N, entropy_N], dim=-1)
