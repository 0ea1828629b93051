"""The loss against its written-out definition, and bits per byte against arithmetic on paper."""

import math

import pytest
import torch

from dist_lm.data.batch import Batch
from dist_lm.data.evaluation_batches import gzip_bits_per_byte
from dist_lm.training.objective import loss_metrics, next_token


def test_masked_tokens_neither_count_nor_learn():
    losses = torch.randn(1, 4, requires_grad=True)
    mask = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    zeros = torch.zeros(1, 4, dtype=torch.int64)
    batch = Batch(zeros, zeros, mask, zeros, zeros, torch.zeros(1, dtype=torch.int64))

    class Given:
        def token_losses(self, batch: Batch, label_smoothing: float = 0.0, z_loss: float = 0.0) -> torch.Tensor:
            return losses

    loss = next_token()(Given(), batch)
    loss.total.backward()
    assert float(loss.count) == 2
    assert losses.grad is not None
    assert losses.grad.tolist() == mask.tolist()
    torch.testing.assert_close(loss.total, losses[0, [0, 2]].sum())


def test_bits_per_byte_by_hand():
    sums = [(2 * math.log(2), 4.0), (6 * math.log(2), 2.0), (0.0, 0.0)]
    metrics = loss_metrics(sums, ["bash", "python", "sql"], {"bash": 4.0, "python": 12.0, "sql": 0.0})
    assert metrics["val/loss"] == pytest.approx(8 * math.log(2) / 6)
    assert metrics["val/bits_per_byte"] == pytest.approx(8 / 16)
    assert metrics["val/bits_per_byte_bash"] == pytest.approx(2 / 4)
    assert metrics["val/bits_per_byte_python"] == pytest.approx(6 / 12)
    assert "val/bits_per_byte_sql" not in metrics


def test_gzip_counts_every_document_alone():
    import gzip

    text = b"the same line\n" * 20
    size = len(gzip.compress(text, 9, mtime=0))
    assert gzip_bits_per_byte([("bash", text), ("bash", text), ("sql", b"x")])["bash"] == 8 * 2 * size / (2 * len(text))
