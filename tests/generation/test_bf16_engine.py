"""The engine in bf16 beside the trainer in bf16: logits in fp32 (`model.head_dtype`), scales that round no weight."""

from dataclasses import replace

import pytest
import torch

from dist_lm.config.model import ModelConfig
from dist_lm.data.batch import Batch
from dist_lm.generation import decoder as decoder_module
from dist_lm.generation.decoder import Decoder, scales_of
from dist_lm.generation.likelihood import Tree, likelihoods
from dist_lm.generation.paged_cache import Piece
from dist_lm.model import cross_entropy
from dist_lm.model.cross_entropy import losses_in_chunks, token_losses, wide_product
from dist_lm.model.keyed_random import initialise
from dist_lm.model.transformer import Transformer

CPU = torch.device("cpu")
SEQUENCES, LENGTH = 4, 64
MODEL = ModelConfig(
    name="bf16",
    d_model=128,
    n_layers=2,
    n_heads=4,
    d_ff=256,
    max_seq_len=LENGTH,
    vocab_size=2048,
    # logits of 10 and more, as trained models have
    init_std=0.3,
)


def logprob_error(head_dtype: str, offset: float = 0.0) -> float:
    """Mean difference, in nats, between log-probabilities of trainer and engine, both in bf16, of three models.

    Args:
        offset: added to all logits, which changes no probability.
    """
    config = replace(MODEL, head_dtype=head_dtype)
    errors = []
    for seed in range(3):
        model = Transformer(config)
        initialise(model, seed)
        assert model.lm_head is not None
        with torch.no_grad():
            model.final_norm.bias[0] += 4
            model.lm_head.weight[:, 0] = offset / 4
        model = model.to(torch.bfloat16)
        generator = torch.Generator().manual_seed(seed)
        tokens_BT = torch.randint(0, config.vocab_size, (SEQUENCES, LENGTH + 1), generator=generator)

        with torch.no_grad():
            trainer_BT = model.logprobs(Batch.plain(tokens_BT[:, :-1], tokens_BT[:, 1:]), 1.0).logprob_BT
        decoder = Decoder(config, 1, 64, torch.bfloat16, CPU)
        decoder.load(dict(model.state_dict()))
        trees = [Tree((first,), (tuple(rest),)) for first, *rest in tokens_BT.tolist()]
        engine_BT = torch.tensor([tree[0].logprobs for tree in likelihoods(decoder, trees, CPU)])
        errors.append((trainer_BT - engine_BT).abs().mean().item())
    return sum(errors) / len(errors)


def test_trainer_and_engine_differ_by_less_than_half_of_what_they_did(monkeypatch):
    """Importance weights of RLHF take this difference for a change of the policy. Before, every scale was multiplied
    into the engine's weights, and logits were rounded to bf16."""
    error = logprob_error("fp32")
    monkeypatch.setattr(decoder_module, "scales_of", lambda config, dtype: (config.score_scale, 1.0))
    error_before = logprob_error("compute")
    assert 0 < error < 0.5 * error_before, (error, error_before)


@pytest.mark.heavy
def test_logits_far_from_zero_are_as_exact_as_others():
    """Of trained models, logits lie around 20 and more, where bf16 has steps of 0.125."""
    errors = {dtype: logprob_error(dtype, offset=32.0) for dtype in ("compute", "fp32")}
    assert 0 < errors["fp32"] < 0.75 * errors["compute"], errors
    assert errors["fp32"] < 1.2 * logprob_error("fp32")


@pytest.mark.parametrize(("d_head", "scales"), [(64, (0.125, 1.0)), (128, (1.0, 128**-0.5))])
def test_half_precision_weights_take_in_powers_of_two_alone(d_head, scales):
    """Any other factor rounds every query weight once more, in the engine and not in the trainer."""
    config = replace(MODEL, head_width=d_head, attention_scale=None)
    assert scales_of(config, torch.bfloat16) == scales
    assert scales_of(config, torch.float32) == (config.score_scale, 1.0)
    assert scales_of(replace(config, attention_scale=0.25), torch.bfloat16) == (0.25, 1.0)


@pytest.mark.parametrize("scale", [0.3, 0.5], ids=["left to kernels", "in the weights"])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"n_kv_heads": 2, "window": 8}], ids=str)
def test_the_engine_attends_as_the_trainer_wherever_the_scale_is(scale, options):
    """A path of attention that forgets the factor: pieces of prompts, decoding, trees of continuations."""
    config = replace(MODEL, attention_scale=scale, init_std=0.2, head_dtype="fp32", **options)
    model = Transformer(config)
    initialise(model, 0)
    model = model.to(torch.bfloat16)
    tokens = torch.randint(0, config.vocab_size, (1, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens)[0]

    decoder = Decoder(config, 2, 64, torch.bfloat16, CPU)
    decoder.load(dict(model.state_dict()))
    ids = tokens[0].tolist()
    with torch.inference_mode():
        first = decoder.prefill([Piece(ids[:20], 0, [1])])
        second = decoder.prefill([Piece(ids[20:47], 20, [1])])
        last = decoder.decode(ids[47:], decoder.plan([[1]], [47]))
    for logits, place in ((first, 19), (second, 46), (last, 47)):
        assert (logits[0] - expected[place]).norm() < 0.05 * expected[place].norm()


@pytest.mark.parametrize("slice_bytes", [1 << 20, 1000], ids=["whole", "slices"])
def test_the_product_is_that_of_fp32_and_its_gradients_those_of_bf16(slice_bytes, monkeypatch):
    """A slice in the wrong place, logits rounded on the way, or gradients that depend on the dtype of the logits."""
    monkeypatch.setattr(cross_entropy, "WEIGHT_SLICE_BYTES", slice_bytes)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 40, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(67, 40, generator=generator).bfloat16().requires_grad_()
    grad = torch.randn(2, 5, 67, generator=generator)

    logits = wide_product(x, weight)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, x.float() @ weight.float().t(), rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(torch.nn.functional.linear(x, weight), (x, weight), grad.bfloat16())
    for found, reference in zip(torch.autograd.grad(logits, (x, weight), grad), expected, strict=True):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, reference, rtol=1e-2, atol=1e-2)


def test_chunks_and_wider_dtypes_change_nothing():
    """The chunked loss computes logits again: with another product its gradients would be those of another loss."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 40, generator=generator)
    weight = torch.randn(67, 40, generator=generator)
    target = torch.randint(0, 67, (10,), generator=generator)
    torch.testing.assert_close(wide_product(x, weight), torch.nn.functional.linear(x, weight), rtol=0, atol=0)

    results = []
    for chunk_bytes in (0, 3 * 67 * 4):
        inputs = (x.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_())
        losses = losses_in_chunks(*inputs, target, token_losses, chunk_bytes, wide_product)
        results.append((losses, *torch.autograd.grad(losses.sum(), inputs)))
    for chunked, whole in zip(*reversed(results), strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)
