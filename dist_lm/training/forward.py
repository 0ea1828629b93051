"""The model as objectives and evaluators see it: bound to what this forward hangs on, asked by batch.

Dimensions: B sequences, T tokens.
"""

from dataclasses import dataclass, replace

import torch

from dist_lm.data.batch import Batch
from dist_lm.model.dropout import DropoutKey
from dist_lm.model.transformer import Transformer
from dist_lm.training.objective import Logprobs


@dataclass(frozen=True)
class BoundModel:
    """A model, its dropout, and how much of its logits may exist at once."""

    model: Transformer
    document_mask: bool  # attention stays inside a document
    chunk_bytes: int  # largest block of fp32 logits; 0: no limit
    dropout: DropoutKey | None = None  # its sequence numbers are those of the batch

    def token_losses(self, batch: Batch, label_smoothing: float = 0.0, z_loss: float = 0.0) -> torch.Tensor:
        """Cross-entropy of every token of a batch in nats, fp32, (B, T); 0 where `counted_N` leaves it out."""
        losses_N = self.model.token_losses(
            batch.tokens_BT,
            batch.targets_BT,
            document_BT=batch.document_BT if self.document_mask else None,
            position_BT=batch.position_BT,
            dropout=replace(self.dropout, sequence_B=batch.sequence_B) if self.dropout else None,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            counted_N=batch.counted_N,
            chunk_bytes=self.chunk_bytes,
        )
        return losses_N.view_as(batch.targets_BT)  # here: what FSDP's root returns must not be a view

    def logprobs(self, batch: Batch, temperature: float, entropy_gradient: bool = False) -> Logprobs:
        """Of every target when it is drawn at `temperature`, fp32, (B, T); without dropout.

        Args:
            entropy_gradient: whether the entropy has one.
        """
        both_N2 = self.model.logprobs_and_entropy(
            batch.tokens_BT,
            batch.targets_BT,
            temperature=temperature,
            entropy_gradient=entropy_gradient,
            document_BT=batch.document_BT if self.document_mask else None,
            position_BT=batch.position_BT,
            counted_N=batch.counted_N,
            chunk_bytes=self.chunk_bytes,
        )
        logprob_BT, entropy_BT = both_N2.view(*batch.targets_BT.shape, 2).unbind(-1)
        return Logprobs(logprob_BT, entropy_BT)

    def scores(self, batch: Batch, read_N: torch.Tensor | None = None, learns_offset: bool = True) -> torch.Tensor:
        """A score of what is read up to each token of a batch, fp32, (B, T): of a model with a scalar head.

        Args:
            read_N: int64; the tokens, in the flattened batch, whose scores are wanted; others have 0. None: all.
            learns_offset: whether the head's bias has a gradient, or one of exactly 0.
        """
        scores_N = self.model.scores(
            batch.tokens_BT,
            document_BT=batch.document_BT if self.document_mask else None,
            position_BT=batch.position_BT,
            branch_BT=batch.branch_BT,
            dropout=replace(self.dropout, sequence_B=batch.sequence_B) if self.dropout else None,
            counted_N=read_N,
            learns_offset=learns_offset,
        )
        return scores_N.view_as(batch.tokens_BT)
