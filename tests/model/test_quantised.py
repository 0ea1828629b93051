"""Bases in four bits: what a matrix is rounded to, and that a model with them is LoRA on the rounded base."""

import sys
from dataclasses import replace

import pytest
import torch

from dist_lm.config.model import AdaptedModelConfig
from dist_lm.config.stage import LoraConfig
from dist_lm.errors import UserError
from dist_lm.model.keyed_random import initialise
from dist_lm.model.quantised import QuantisedMatrix, quantised_matrices, round_trip
from dist_lm.model.size import ADAPTERS, is_matrix, quantised_bytes
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.sharding import wrap_blocks
from tests.model.small_models import small_config, small_model, small_tokens

functional = pytest.importorskip("bitsandbytes.functional")

LORA = LoraConfig(rank=3, alpha=6.0, load_in_4bit=True)
SHAPES = {
    "gelu, biases": {},
    "swiglu": {"ffn": "swiglu", "norm": "rmsnorm", "bias": False, "qk_norm": True, "n_kv_heads": 1},
    "odd widths": {"d_model": 35, "n_heads": 5, "head_width": 6, "d_ff": 33, "ffn": "swiglu"},
    "norm after": {"norm": "rmsnorm", "bias": False, "norm_place": "after", "ffn": "swiglu"},
}


def random_weight(*shape: int) -> torch.Tensor:
    return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


def quantised(weight: torch.Tensor) -> QuantisedMatrix:
    matrix = QuantisedMatrix(weight.shape)
    matrix.quantise(weight)
    return matrix


@pytest.mark.parametrize("shape", [(9, 64, 576), (5, 12, 60), (3, 7, 5), (33, 35), (1, 1)])
def test_a_matrix_is_what_its_bits_say(shape: tuple[int, ...]):
    """Finds kernels that read rows of another length wrongly, and scales that are those of other entries."""
    weight = random_weight(*shape)
    matrix = quantised(weight)

    n_entries = weight.numel()
    multiples = functional.get_4bit_type("nf4", device="cpu")
    code = torch.stack((matrix.codes >> 4, matrix.codes & 15), dim=1).flatten()[:n_entries].long()
    scales = matrix.scale_values[matrix.scales.long()]
    scales = scales * matrix.outer_scales.repeat_interleave(256)[: len(scales)] + matrix.mean_scale
    expected = (multiples[code] * scales.repeat_interleave(64)[:n_entries]).view(shape)

    assert torch.equal(matrix.dequantised(torch.float32), expected)
    assert torch.equal(matrix.dequantised(torch.bfloat16), expected.bfloat16())
    assert matrix.nbytes == quantised_bytes(n_entries)


def test_bits_are_those_of_bitsandbytes():
    """Finds other codes than peft would load for the same base; scales may differ by a rounding of their mean."""
    weight = random_weight(192, 576)
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    theirs = functional.dequantize_4bit(codes, state)
    matrix = quantised(weight)
    assert torch.equal(matrix.codes, codes.flatten())
    torch.testing.assert_close(matrix.dequantised(torch.float32), theirs, rtol=1e-2, atol=0)
    assert (theirs - weight).norm() / weight.norm() < 0.1


def test_bits_do_not_depend_on_the_number_of_threads():
    """Finds a mean of scales that torch's threads add up in another order: a resumed run would have another base."""
    weight, n_threads = random_weight(34, 64, 1024), torch.get_num_threads()
    matrices = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            matrices.append(quantised(weight))
    finally:
        torch.set_num_threads(n_threads)
    for other in matrices[1:]:
        for name, buffer in matrices[0].named_buffers():
            assert torch.equal(other.get_buffer(name), buffer), name


def test_matrices_of_smollm2_take_at_most_0_27_of_bf16():
    widths = [(9, 64, 576), (3, 64, 576), (3, 64, 576), (9, 64, 576), *[(1536, 576)] * 2, (576, 1536)]
    n_bytes, n_entries = 0, 0
    for shape in widths:
        n_bytes += QuantisedMatrix(shape).nbytes
        n_entries += torch.Size(shape).numel()
    assert n_bytes <= 0.27 * 2 * n_entries


def pair(**changes) -> tuple[Transformer, Transformer]:
    """Returns a model with a base in four bits, and LoRA on the dequantised base, with the same adapters, not 0."""
    shape = small_config(**changes)
    base = small_model(shape)
    with_bits = Transformer(AdaptedModelConfig.of(shape, LORA))
    with_floats = Transformer(AdaptedModelConfig.of(shape, replace(LORA, load_in_4bit=False)))

    generator = torch.Generator().manual_seed(1)
    for model in (with_bits, with_floats):
        initialise(model, seed=0)
    weights = {name: round_trip(name, value) for name, value in base.state_dict().items()}
    for name, parameter in with_floats.named_parameters():
        if name.endswith(".b"):
            weights[name] = 0.1 * torch.randn(parameter.shape, generator=generator)
    with_floats.load_state_dict(weights, strict=False)
    with_bits.load_state_dict(with_floats.state_dict(), strict=False)
    for name, matrix in quantised_matrices(with_bits).items():
        matrix.quantise(base.get_parameter(name).detach())

    for model in (with_bits, with_floats):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(ADAPTERS in name)
    return with_bits, with_floats


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_logits_and_gradients_are_those_of_lora_on_the_dequantised_base(changes):
    """Finds a product that is transposed, a matrix that is skipped, and a gradient that does not pass through."""
    with_bits, with_floats = pair(**changes)
    names_of = [{name for name, _ in model.named_parameters()} for model in (with_bits, with_floats)]
    assert names_of[1] - names_of[0] == quantised_matrices(with_bits).keys() == set(filter(is_matrix, names_of[1]))

    tokens = small_tokens(with_bits.config, 2, 16)
    logits = [model(tokens) for model in (with_bits, with_floats)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5 * float(logits[1].detach().abs().max()))
    for output in logits:
        output.square().mean().backward()
    for name, parameter in with_bits.named_parameters():
        expected = with_floats.get_parameter(name).grad
        assert (parameter.grad is None) == (expected is None) == (ADAPTERS not in name), name
        if expected is not None:
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-7 * float(expected.abs().max()))


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_the_backward_pass_keeps_four_bits(mode: str):
    """Finds a graph that holds dequantised matrices from the forward pass to the backward pass."""
    model, _ = pair(ffn="swiglu")
    wrap_blocks(model, mode, compiled=False, whole_graph=False)
    matrices = {matrix.shape.numel() for matrix in quantised_matrices(model).values()}
    kept: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            kept.append(tensor.untyped_storage().nbytes() // tensor.itemsize)
        return tensor

    tokens = small_tokens(model.config, 1, 3)  # activations are smaller than any matrix
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(tokens).square().mean()
    assert kept
    assert not matrices & set(kept)
    loss.backward()


@pytest.mark.heavy
def test_the_compiler_takes_a_block_whole():
    """Finds what would split the graph on a GPU, where that is an error."""
    model, _ = pair(ffn="swiglu")
    tokens = small_tokens(model.config, 1, 8)
    expected = model(tokens)
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
    found = model(tokens)
    torch.testing.assert_close(found, expected)
    found.square().mean().backward()
    assert model.get_parameter("blocks.0.attention.adapters.query.a").grad is not None


def test_without_bitsandbytes_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"load_in_4bit=true needs .* pip install 'dist_lm\[qlora\]'"):
        QuantisedMatrix((4, 4))
