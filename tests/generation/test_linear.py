"""Linear layers that give a row the same bits whatever it comes with."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses

from dist_lm.generation.linear import build_linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("width", "outputs"), [(40, 96), (256, 768), (1024, 256), (2048, 512), (1600, 200)])
@torch.inference_mode()
def test_a_row_gets_the_same_bits_alone_and_in_any_company(width, outputs, bias):
    torch.manual_seed(0)
    weight, x = torch.randn(outputs, width) / width**0.5, torch.randn(70, width)
    bias_N = torch.randn(outputs) if bias else None
    linear = build_linear(weight, bias_N)
    whole = linear(x)
    assert torch.allclose(whole, F.linear(x, weight, bias_N), atol=1e-5)
    added = torch.randn(70, outputs)
    summed = linear(x, added)
    assert torch.allclose(summed, whole + added, atol=1e-5)
    for n_rows in (1, 2, 3, 4, 7, 8, 31, 32, 33, 64):
        for rows in (slice(0, n_rows), slice(70 - n_rows, 70)):
            assert torch.equal(linear(x[rows]), whole[rows])
            assert torch.equal(linear(x[rows], added[rows]), summed[rows])


@pytest.mark.parametrize(("activation", "approximate"), [("gelu", "none"), ("gelu_tanh", "tanh")])
@pytest.mark.parametrize(("width", "outputs"), [(40, 96), (512, 2048), (2048, 512)])
@torch.inference_mode()
def test_the_activation_is_gelu_alone_and_in_any_company(width, outputs, activation, approximate):
    torch.manual_seed(0)
    weight, x, bias = torch.randn(outputs, width) / width**0.5, torch.randn(40, width) * 3, torch.randn(outputs)
    linear = build_linear(weight, bias, activation)
    whole = linear(x)
    # Each kind of CPU sums in an order of its own, so the bound is some times the rounding of torch's product.
    exact = F.gelu(F.linear(x.double(), weight.double(), bias.double()), approximate=approximate)
    rounding = (F.gelu(F.linear(x, weight, bias), approximate=approximate) - exact).abs().max()
    assert (whole - exact).abs().max() <= 4 * rounding
    for n_rows in (1, 2, 3, 8, 33):
        assert torch.equal(linear(x[:n_rows]), whole[:n_rows])
