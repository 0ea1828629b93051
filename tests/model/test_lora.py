"""Adapters in one process: gradients, initial values, and what a model without them is."""

import math
from dataclasses import replace

import pytest
import torch

from dist_lm.config.model import AdaptedModelConfig
from dist_lm.config.stage import LoraConfig, StageConfig
from dist_lm.model.keyed_random import DropoutKey, adapter_sites, initialise, keep_mask
from dist_lm.model.lora import adapter_of, change, without_adapters
from dist_lm.model.size import ADAPTERS, flops_per_token, is_trained, parameter_count, parameter_shapes, trained_count
from dist_lm.model.transformer import Transformer
from dist_lm.training.optimizer import build_optimizer
from tests.model.small_models import small_config, small_model, small_tokens

SHAPES = [{}, {"ffn": "swiglu", "norm": "rmsnorm", "bias": False, "qk_norm": True, "n_kv_heads": 1}]


def adapted(rank: int = 3, alpha: float = 6.0, targets: list[str] | None = None, **changes) -> AdaptedModelConfig:
    lora = LoraConfig(rank, alpha) if targets is None else LoraConfig(rank, alpha, targets)
    return AdaptedModelConfig.of(small_config(**changes), lora)


def base_and_adapted(config: AdaptedModelConfig) -> tuple[Transformer, Transformer]:
    """Two models with the same weights; the adapters are new."""
    base, model = small_model(config.plain), Transformer(config)
    initialise(model, seed=0)
    model.load_state_dict(base.state_dict(), strict=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, config))
    return base, model


@torch.no_grad()
def move(model: Transformer) -> None:
    """Give B values that are not 0."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(".b"):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def merge(base: Transformer, model: Transformer) -> None:
    """Add the changes of all adapters to the weights of `base`."""
    factors = dict(model.named_parameters())
    assert isinstance(model.config, AdaptedModelConfig)
    for name, weight in base.named_parameters():
        prefix = adapter_of(name)
        if f"{prefix}a" in factors:
            weight += change(name, factors[f"{prefix}a"], factors[f"{prefix}b"], model.config.scale)


@pytest.mark.parametrize("shape", SHAPES, ids=["gelu", "swiglu"])
def test_new_adapters_change_nothing_and_merged_ones_compute_the_same(shape):
    config = adapted(**shape)
    base, model = base_and_adapted(config)
    tokens = small_tokens(config, 2, 16)
    assert torch.equal(model(tokens), base(tokens))
    move(model)
    changed = model(tokens)
    assert not torch.allclose(changed, base(tokens), rtol=1e-2)
    with without_adapters(model):
        assert torch.equal(model(tokens), base(tokens))
    merge(base, model)
    torch.testing.assert_close(changed, base(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=["gelu", "swiglu"])
def test_with_a_of_one_the_gradient_of_b_is_that_of_the_weight(shape):
    """With A = I, grad B = s G A^T, where G is the gradient of the merged weight."""
    base_shape = small_config(**shape)
    square = base_shape.n_heads * base_shape.d_head == base_shape.d_model
    rank = base_shape.d_model
    targets = ["query", "key", "value", "up", *(["output"] if square else []), *(["gate"] if shape else [])]
    config = adapted(rank, float(rank), targets, **shape)
    base, model = base_and_adapted(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".a"):
                parameter.copy_(torch.eye(rank).view(parameter.shape))
    tokens = small_tokens(config, 2, 16)
    loss = model.double()(tokens).square().mean()
    loss.backward()
    base.double()(tokens).square().mean().backward()
    checked = 0
    for name, weight in base.named_parameters():
        prefix = adapter_of(name)
        if f"{prefix}b" in dict(model.named_parameters()):
            assert weight.grad is not None
            found = model.get_parameter(f"{prefix}b").grad
            assert found is not None
            gradient_OI = weight.grad.flatten(0, -2)  # (output, input)
            if name.endswith("output"):
                gradient_OI = gradient_OI.t()
            a_RI = model.get_parameter(f"{prefix}a").detach().flatten(1)
            expected_OR = config.scale * gradient_OI @ a_RI.t()
            torch.testing.assert_close(found.flatten(1).t(), expected_OR, rtol=1e-6, atol=1e-12)
            checked += 1
    assert checked == config.n_layers * len(targets)


def test_the_base_has_no_gradient_no_state_and_keeps_its_bits():
    config = adapted()
    base, model = base_and_adapted(config)
    optimizer = build_optimizer(model, StageConfig(name="t", lr=1e-2, weight_decay=0.1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(3):
        model(small_tokens(config, 2, 16) + 0 * step).square().mean().backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == {
            name for name in before if ADAPTERS in name
        }
        optimizer.step()
        optimizer.zero_grad()
    assert {id(p) for p in optimizer.state} == {id(p) for n, p in model.named_parameters() if ADAPTERS in n}
    after = model.state_dict()
    for name, value in base.state_dict().items():
        assert torch.equal(after[name], value), name
    assert all(not torch.equal(after[name], before[name]) for name in before if ADAPTERS in name)


def test_initial_values_are_those_of_peft_and_depend_on_seed_and_name_alone():
    config, wider = adapted(rank=40, targets=["attention"]), adapted(rank=40)
    first, second = Transformer(config), Transformer(wider)
    initialise(first, seed=3)
    initialise(second, seed=3)
    for name, value in first.named_parameters():
        assert torch.equal(second.get_parameter(name), value), name
    a = first.get_parameter("blocks.0.attention.adapters.query.a").detach()
    bound = 1 / math.sqrt(config.d_model)  # kaiming uniform with a = sqrt(5)
    assert a.abs().max() <= bound
    assert a.abs().max() > 0.99 * bound
    assert a.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert first.get_parameter("blocks.1.attention.adapters.output.b").count_nonzero() == 0


def test_rslora_divides_by_the_root_of_the_rank():
    """Finds a scale that falls with the rank, which makes adapters of a large rank learn nothing."""
    plain, stable = adapted(rank=16), AdaptedModelConfig.of(small_config(), LoraConfig(16, 6.0, rslora=True))
    assert (plain.scale, stable.scale) == (6 / 16, 6 / 4)


def test_dropout_drops_inputs_of_adapters_alone_and_is_a_function_of_its_key():
    """Finds dropout of the frozen path, masks that adapters share, and masks that change within a step."""
    config = AdaptedModelConfig.of(small_config(), LoraConfig(3, 6.0, dropout=0.5))
    base, model = base_and_adapted(config)
    tokens = small_tokens(config, 2, 16)
    key = DropoutKey(0.0, seed=1, step=2, adapter_rate=0.5, sequence_B=torch.arange(2))
    # B is 0, so that what is dropped in front of it cannot be seen.
    assert torch.equal(model(tokens, dropout=key), base(tokens))
    move(model)
    first, again = model(tokens, dropout=key), model(tokens, dropout=key)
    assert torch.equal(first, again)
    assert not torch.allclose(first, model(tokens))
    assert not torch.allclose(first, model(tokens, dropout=replace(key, step=3)))
    (sites,) = set(map(len, [site for site in adapter_sites(key, 1, 8) if site]))
    assert sites == 7
    site_of = adapter_sites(key, config.n_layers, 200)
    masks = [keep_mask(site, torch.arange(16)) for layer in site_of if layer for site in layer.values()]
    assert all(mask.float().mean() == pytest.approx(0.5, abs=0.03) for mask in masks)
    assert not any(torch.equal(masks[0], mask) for mask in masks[1:])


@pytest.mark.parametrize("targets", [["attention"], ["query", "down"], ["feed_forward"], None])
@pytest.mark.parametrize("shape", SHAPES, ids=["gelu", "swiglu"])
def test_shapes_and_names_are_those_of_the_model(shape, targets):
    config = adapted(3, 6.0, targets, **shape)
    found = {name: tuple(value.shape) for name, value in Transformer(config).named_parameters()}
    assert list(parameter_shapes(config).items()) == list(found.items())
    added = {name.rpartition(".")[0].rpartition(".")[2] for name in found if ADAPTERS in name}
    every = {"query", "key", "value", "output"}, {"up", "down"} | ({"gate"} if shape else set())
    assert (
        added
        == {
            "attention": every[0],
            "feed_forward": every[1],
            "query": {"query", "down"},
            None: every[0] | every[1],
        }[targets[0] if targets else None]
    )


def test_frozen_weights_cost_no_gradient():
    config = adapted()
    full, cheap = flops_per_token(config.plain, 16), flops_per_token(config, 16)
    trained = trained_count(config)
    multiplied = parameter_count(config.plain) - config.vocab_size * config.d_model
    assert trained == parameter_count(config) - parameter_count(config.plain)
    assert full - cheap == 2 * multiplied - 6 * trained
