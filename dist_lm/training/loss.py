"""Next-token cross-entropy.

Dimensions: B sequences, T tokens, V vocabulary.
"""

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses

from dist_lm.data.batch import Batch
from dist_lm.training.objective import Forward, LossSum, Objective


def token_losses(logits_BTV: torch.Tensor, targets_BT: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy of every token in nats, fp32, (B, T).

    Label smoothing as in Szegedy et al. 2016, section 7: the target distribution is
    `(1 - a) * one_hot + a / V`.
    """
    flat = F.cross_entropy(
        logits_BTV.flatten(0, 1).float(),
        targets_BT.flatten(),
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return flat.view_as(targets_BT)


def next_token(label_smoothing: float) -> Objective:
    """The objective of language modelling: mean loss over the tokens whose loss mask is 1."""

    def objective(model: Forward, batch: Batch) -> LossSum:
        losses_BT = token_losses(model(batch), batch.targets_BT, label_smoothing)
        return LossSum(total=(losses_BT * batch.loss_mask_BT).sum(), count=batch.loss_mask_BT.sum())

    return objective
