"""The loss against its written-out definition, whole and in chunks."""

import pytest
import torch

from dist_lm.model.cross_entropy import losses_in_chunks, token_losses


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_token_losses_are_the_written_out_definition(smoothing, z_loss):
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 7), torch.randint(0, 7, (6,))
    target_distribution = torch.full((6, 7), smoothing / 7)
    target_distribution.scatter_add_(1, targets[:, None], torch.full((6, 1), 1 - smoothing))
    expected = -(target_distribution * logits.log_softmax(-1)).sum(-1) + z_loss * logits.exp().sum(-1).log() ** 2
    torch.testing.assert_close(token_losses(logits, targets, smoothing, z_loss), expected)


@pytest.mark.parametrize("chunk", [1, 4, 5, 8, 9])
def test_chunks_change_neither_losses_nor_gradients_and_no_block_is_larger(chunk):
    vocab, largest, results = 11, 0, []

    def losses(logits, targets):
        nonlocal largest
        largest = max(largest, logits.numel() * 4)
        return token_losses(logits, targets, 0.1, 1e-2)

    for chunk_bytes in (0, chunk * vocab * 4 + 3):
        torch.manual_seed(0)
        x, weight = torch.randn(9, 6, requires_grad=True), torch.randn(vocab, 6, requires_grad=True)
        targets, factor, largest = torch.randint(0, vocab, (9,)), torch.randn(9), 0
        found = losses_in_chunks(x, weight, targets, losses, chunk_bytes)
        (found * factor).sum().backward()
        assert largest <= (chunk_bytes or largest)
        results.append((found, x.grad, weight.grad))
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole)


def test_many_chunks_in_bf16_round_the_gradient_of_the_weight_no_more_than_one_does():
    torch.manual_seed(0)
    x, weight, targets = torch.randn(512, 16), torch.randn(64, 16), torch.randint(0, 64, (512,))

    def gradient(dtype: torch.dtype, chunk_tokens: int) -> torch.Tensor:
        own = weight.to(dtype).requires_grad_()
        losses_in_chunks(x.to(dtype), own, targets, token_losses, 64 * 4 * chunk_tokens).sum().backward()
        assert own.grad is not None
        return own.grad.double()

    expected = gradient(torch.float64, 512)
    errors = [float((gradient(torch.bfloat16, n) - expected).norm() / expected.norm()) for n in (512, 4)]
    assert errors[1] < 1.2 * errors[0], errors
