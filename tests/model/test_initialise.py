"""Initial values depend on the seed and the name alone."""

import math

import torch
from small_models import small_config

from dist_lm.model.keyed_random import initial_value, initialise
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
    config = small_config(d_model=320, n_layers=8, d_ff=640, init_std=0.02, qk_norm=True)
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


def test_a_scalar_head_is_as_wide_as_its_input_asks_for_whatever_the_rest_has() -> None:
    config = small_config(d_model=640, n_heads=5, head="scalar", init_std=0.5)
    weight = initial_value("scalar_head.weight", (1, 640), config, 0)
    assert math.isclose(weight.std().item(), 1 / math.sqrt(641), rel_tol=0.1)
    assert not initial_value("scalar_head.bias", (1,), config, 0).any()
