"""Initial values hang on the seed and the name alone."""

import math

import pytest
import torch
from small_models import small_config

from dist_lm.model.attention import from_heads, to_heads
from dist_lm.model.initialise import initial_value, initialise
from dist_lm.model.transformer import Transformer


def test_values_do_not_depend_on_the_rest_of_the_model() -> None:
    shallow, deep = Transformer(small_config(n_layers=1)), Transformer(small_config(n_layers=3))
    initialise(shallow, seed=5)
    initialise(deep, seed=5)
    assert torch.equal(shallow.blocks[0].attention.query, deep.blocks[0].attention.query)
    assert torch.equal(shallow.lm_head.weight, deep.lm_head.weight)
    assert not torch.equal(deep.blocks[0].attention.query, deep.blocks[1].attention.query)


def test_seed_and_repeat() -> None:
    config = small_config()
    shape = (64, 40)
    first = initial_value("embedding.weight", shape, config, 0)
    assert first.dtype == torch.float32
    assert torch.equal(first, initial_value("embedding.weight", shape, config, 0))
    assert not torch.equal(first, initial_value("embedding.weight", shape, config, 1))
    torch.manual_seed(9)
    assert torch.equal(first, initial_value("embedding.weight", shape, config, 0))


def test_scales() -> None:
    config = small_config(d_model=320, n_layers=8, d_ff=640, init_std=0.02)
    model = Transformer(config)
    initialise(model, seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif name.endswith("norm.weight"):
            assert bool((parameter == 1).all()), name
        else:
            residual = name.endswith(("attention.output", "feed_forward.down.weight"))
            expected = 0.02 / math.sqrt(16) if residual else 0.02
            assert abs(float(parameter.detach().std()) / expected - 1) < 0.05, name
            assert abs(float(parameter.detach().mean())) < 5 * expected / math.sqrt(parameter.numel()), name


def test_values_do_not_drift() -> None:
    """A layout added later must start from the same numbers: the first ones, written down."""
    value = initial_value("blocks.0.attention.query", (2, 2, 4), small_config(init_std=1.0), 0).flatten()
    assert torch.allclose(value[:3], torch.tensor([-1.6729, -1.3664, -0.515]), atol=1e-4)


@pytest.mark.parametrize("kv_heads", [None, 1])
def test_mirrored_attention_passes_on_what_it_looks_at(kv_heads: int | None) -> None:
    def passed_on(init: str) -> float:
        model = Transformer(small_config(d_model=320, init=init, n_kv_heads=kv_heads))
        initialise(model, seed=0)
        x_ND = torch.randn(8, 320, generator=torch.Generator().manual_seed(1))
        attention = model.blocks[1].attention
        v_NGK = to_heads(x_ND[None], attention.value, None)
        v_NHK = v_NGK.repeat_interleave(attention.query.shape[0] // attention.value.shape[0], dim=2)
        out_ND = from_heads(v_NHK, attention.output, None)[0]
        return float(torch.cosine_similarity(out_ND, x_ND, dim=-1).mean().detach())

    assert passed_on("mirrored") > (0.6 if kv_heads is None else 0.3)
    assert abs(passed_on("normal")) < 0.1
