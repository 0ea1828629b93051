"""Cross-entropy of logits whose vocabulary is spread over ranks: two small reductions, no rank sees another's logits.

Dimensions: N tokens, V pieces of this rank.
"""

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.mappings import reduce_from_model_parallel_region

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

    `loss = log Z - (1 - a) * logit[target] - a * mean(logits) + z_loss * log(Z)^2`, where the sum of exponentials Z
    (after the largest logit is taken off), the target's logit and the mean are each a sum over the ranks.

    Args:
        logits_NV: of the pieces that this rank holds, without padding.
    """
    logits_NV = logits_NV.float()
    largest_N = logits_NV.detach().amax(-1)
    dist.all_reduce(largest_N, dist.ReduceOp.MAX, axis.group)
    row_N = targets_N - pieces.start
    held_N = (row_N >= 0) & (row_N < pieces.real)
    target_N = logits_NV.gather(-1, row_N.where(held_N, 0)[:, None]).squeeze(-1) * held_N
    parts = [(logits_NV - largest_N[:, None]).exp().sum(-1), target_N]
    if label_smoothing:
        parts.append(logits_NV.sum(-1) / vocab_size)
    exponentials_N, target_N, *mean_N = reduce_from_model_parallel_region(torch.stack(parts)).unbind()
    log_z_N = exponentials_N.log() + largest_N
    losses_N = log_z_N - (1 - label_smoothing) * target_N
    if label_smoothing:
        losses_N = losses_N - label_smoothing * mean_N[0]
    return losses_N + z_loss * log_z_N.square() if z_loss else losses_N
