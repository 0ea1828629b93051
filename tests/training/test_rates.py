"""Rates of groups of parameters: multiples of one dial, scaled so that activations move alike at every width."""

import math

import pytest
import torch

from dist_lm.config.stage import MuonConfig, RatesConfig, StageConfig
from dist_lm.errors import ConfigError
from dist_lm.model.keyed_random import initialise
from dist_lm.model.size import is_matrix, parameter_shapes
from dist_lm.model.transformer import Transformer
from dist_lm.training.optimizer import (
    build_optimizer,
    is_decayed,
    muon_momentum,
    rate_group,
    rate_ratio,
    set_learning_rate,
    set_momentum,
)
from tests.model.small_models import small_config, small_model

RATES = RatesConfig(embedding=4.0, head=0.5, matrices=2.0, vectors=3.0)


def initialised(config):
    model = Transformer(config)
    initialise(model, 0)
    return model


def step(model, optimizer):
    generator = torch.Generator().manual_seed(1)
    for _, parameter in sorted(model.named_parameters()):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_one_rate_is_the_optimizer_of_before():
    groups = build_optimizer(small_model(small_config()), StageConfig(name="t", lr=1e-3)).param_groups
    assert [(group["lr"], group["lr_ratio"], group["weight_decay"]) for group in groups] == [
        (1e-3, 1.0, 0.1),
        (1e-3, 1.0, 0.0),
    ]


def test_a_step_is_that_of_adamw_with_these_rates_and_the_decay_of_the_dial():
    stage = StageConfig(name="t", lr=1e-2, weight_decay=0.3, rates=RATES)
    ours, theirs = small_model(small_config()), small_model(small_config())
    optimizer = build_optimizer(ours, stage)
    set_learning_rate(optimizer, 5e-3)
    groups = []
    for name, parameter in theirs.named_parameters():
        multiple = getattr(RATES, str(rate_group(name)))
        decay = 0.3 / multiple if is_decayed(name) else 0.0
        groups.append({"params": [parameter], "lr": 5e-3 * multiple, "weight_decay": decay})
    reference = torch.optim.AdamW(groups, betas=(stage.beta1, stage.beta2), eps=stage.adam_eps)
    step(ours, optimizer)
    step(theirs, reference)
    for (name, found), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8, msg=name)


def test_every_parameter_has_a_group():
    assert rate_group("embedding.weight") == "embedding"
    assert {rate_group(name) for name in ("lm_head.weight", "scalar_head.weight", "scalar_head.bias")} == {"head"}
    vectors = ["final_norm.weight", "blocks.0.attention.query_bias", "blocks.1.feed_forward.down.bias"]
    assert {rate_group(name) for name in vectors} == {"vectors"}
    assert {rate_group(name) for name in parameter_shapes(small_config()) if is_matrix(name)} == {"matrices"}
    assert rate_group("blocks.0.attention.adapters.query.a") is None


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"stage.rates.head=0: expected a positive number"):
        RatesConfig(head=0)


def test_the_scale_of_adamw_moves_entries_as_adamw_does():
    config, muon = small_config(d_model=64, n_heads=4, d_ff=96), MuonConfig(lr=None, scale="adamw")
    model = small_model(config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    stage = StageConfig(name="t", lr=1e-2, weight_decay=0.0, rates=RatesConfig(matrices=1.5))
    step(model, build_optimizer(model, stage, muon))
    for name, parameter in model.named_parameters():
        if is_matrix(name):
            moved = (parameter.detach() - before[name]).square().mean().sqrt().item()
            assert moved == pytest.approx(0.2 * 1.5e-2, rel=0.15), name


def test_muon_decays_at_the_dial_with_its_own_weight():
    model, stage = small_model(small_config()), StageConfig(name="t", lr=1e-2, weight_decay=0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, stage, MuonConfig(lr=0.02, weight_decay=0.7))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        kept = 1 - 1e-2 * (0.7 if is_matrix(name) else 0.1 if is_decayed(name) else 0)
        torch.testing.assert_close(parameter.detach(), kept * before[name], msg=name)


def test_momentum_warms_up_and_cools_down():
    muon = MuonConfig(lr=0.02, momentum=0.95, momentum_low=0.85, momentum_warmup_steps=4, momentum_cooldown_steps=2)
    stage = StageConfig(name="t", steps=10, muon=muon)
    found = [muon_momentum(stage, step) for step in range(10)]
    assert found == pytest.approx([0.85, 0.875, 0.9, 0.925, 0.95, 0.95, 0.95, 0.95, 0.9, 0.85])
    optimizer = build_optimizer(small_model(small_config()), stage, muon)
    set_momentum(optimizer, 0.9)
    assert [group.get("momentum") for group in optimizer.param_groups] == [None, None, 0.9]
    assert {muon_momentum(StageConfig(name="t", steps=3), step) for step in range(3)} == {0.95}


def test_rates_and_initial_values_at_twice_the_base_width():
    config = small_config(d_model=80, n_heads=10, d_ff=160, base_width=40)
    stage = StageConfig(name="t", lr=1e-2)
    names = ("embedding.weight", "final_norm.weight", "lm_head.weight", "blocks.0.attention.key")
    names += ("blocks.0.feed_forward.up.weight",)
    found = [rate_ratio(name, stage, None, config) for name in names]
    assert found == [1, 1, 0.5, 0.5, 0.5]
    unit, as_adamw = MuonConfig(lr=0.02), MuonConfig(lr=None, scale="adamw")
    found = [rate_ratio(name, stage, unit, config) for name in names[3:]]
    assert found == pytest.approx([2 / math.sqrt(2), 2])
    found = [rate_ratio(name, stage, as_adamw, config) for name in names[3:]]
    assert found == pytest.approx([0.2 * math.sqrt(80) / 2, 0.2 * math.sqrt(160) / math.sqrt(2)])
    wide, base = initialised(config), initialised(small_config(d_model=80, n_heads=10, d_ff=160))
    ratios = {"embedding.weight": 1, "lm_head.weight": 0.5}
    for (name, scaled), plain in zip(wide.named_parameters(), base.parameters(), strict=True):
        ratio = ratios.get(name, 2**-0.5 if is_matrix(name) else 1)
        torch.testing.assert_close(scaled, ratio * plain, msg=name)


def test_projections_onto_the_residual_stream_can_start_at_zero():
    model = initialised(small_config(residual_init="zero"))
    zero = {name for name, value in model.named_parameters() if is_matrix(name) and not value.any()}
    outputs = ("attention.output", "feed_forward.down.weight")
    assert zero == {name for name, _ in model.named_parameters() if name.endswith(outputs)}


def test_a_tied_head_has_no_scaling_by_width():
    with pytest.raises(ConfigError, match=r"model.base_width=64: expected null with model.tie_embeddings=true"):
        small_config(base_width=64, tie_embeddings=True)


OPTIMIZERS = {
    "AdamW": ({"lr": 4e-3}, None),
    "Muon": ({"lr": 4e-3}, MuonConfig(lr=0.03)),
    "Muon as AdamW": ({"lr": 4e-3}, MuonConfig(lr=None, scale="adamw")),
}
WIDTHS = (64, 128, 256)


def change_of_logits_and_stream(width: int, base_width: int | None, optimizer: str) -> tuple[float, float]:
    """RMS change of logits and of the residual stream over three steps on one batch."""
    config = small_config(
        d_model=width, n_heads=width // 16, d_ff=4 * width, n_layers=2, vocab_size=64, init_std=0.1,
        base_width=base_width, norm="rmsnorm", bias=False,
    )  # fmt: skip
    keys, muon = OPTIMIZERS[optimizer]
    model = initialised(config)
    stepped = build_optimizer(model, StageConfig(name="t", weight_decay=0.0, **keys), muon)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 64, (4, 33), generator=generator)

    def outputs():
        streams = []
        hook = model.final_norm.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0]))
        logits = model(tokens[:, :-1])
        hook.remove()
        return logits, streams[0]

    with torch.no_grad():
        start = outputs()
    for _ in range(3):
        stepped.zero_grad()
        torch.nn.functional.cross_entropy(outputs()[0].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        stepped.step()
    with torch.no_grad():
        logits, stream = (after - before for after, before in zip(outputs(), start, strict=True))
    return logits.square().mean().sqrt().item(), stream.square().mean().sqrt().item()


def slopes(base_width: int | None, optimizer: str) -> list[float]:
    """Powers of the width by which the changes of logits and stream grow."""
    changes = [change_of_logits_and_stream(width, base_width, optimizer) for width in WIDTHS]
    x = torch.tensor([math.log(width) for width in WIDTHS])
    y = torch.tensor(changes).log()
    x, y = x - x.mean(), y - y.mean(0)
    return ((x[:, None] * y).sum(0) / x.square().sum()).tolist()


@pytest.mark.heavy
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_move_activations_alike_at_every_width(optimizer):
    """The coordinate check of Yang & Hu 2022, appendix D.1."""
    scaled, plain = slopes(128, optimizer), slopes(None, optimizer)
    assert all(abs(power) < 0.35 for power in scaled), (scaled, plain)
    assert all(power > 0.5 for power in plain), (scaled, plain)
