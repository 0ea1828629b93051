"""The objective of language modelling.

Dimensions: B sequences, T tokens.
"""

from dist_lm.data.batch import Batch
from dist_lm.training.objective import LossModel, LossSum, Objective


def next_token(label_smoothing: float = 0.0, z_loss: float = 0.0) -> Objective:
    """Mean cross-entropy over the tokens whose loss mask is 1."""

    def objective(model: LossModel, batch: Batch) -> LossSum:
        losses_BT = model.token_losses(batch, label_smoothing, z_loss)
        return LossSum(total=(losses_BT * batch.loss_mask_BT).sum(), count=batch.loss_mask_BT.sum())

    return objective
