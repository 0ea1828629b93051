"""The optimizer: orthogonal directions of Muon, Muon beside AdamW, decay, the schedule of the learning rate."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from dist_lm.config.stage import MuonConfig, StageConfig
from dist_lm.errors import ConfigError
from dist_lm.model.size import is_matrix, neuron_shape
from dist_lm.training import muon
from dist_lm.training.muon import (
    ITERATIONS,
    NEWTON_SCHULZ,
    Stepped,
    Variance,
    newton_schulz,
    newton_schulz_of_squares,
    orthogonal,
    orthogonal_steps,
)
from dist_lm.training.optimizer import (
    build_optimizer,
    is_decayed,
    learning_rate,
    named_state,
    set_learning_rate,
    stage_rate,
)
from tests.model.small_models import small_config, small_model

STAGE = StageConfig(name="test", lr=1e-3, weight_decay=0.0, muon=MuonConfig(lr=0.02))
PLAN = {"peak": 1e-3, "warmup_steps": 10, "steps": 100, "min_ratio": 0.1}


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 40), (2, 40, 16)], ids=str)
def test_singular_values_come_close_to_one_and_vectors_stay(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonal(matrices)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    inside = u.mT @ found @ vh.mT
    values = inside.diagonal(dim1=-2, dim2=-1)
    strong = s > 0.02 * s.norm(dim=-1, keepdim=True)  # the smallest do not arrive in five steps
    assert ((values[strong] > 0.6) & (values[strong] < 1.3)).all()
    torch.testing.assert_close(inside, torch.diag_embed(values), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 5, 16])
@pytest.mark.parametrize("shape", [(2, 16, 64), (2, 64, 16)], ids=str)
@pytest.mark.parametrize("way", [newton_schulz, newton_schulz_of_squares])
def test_it_is_newton_schulz_by_the_book_also_of_matrices_of_low_rank(shape, rank, way, monkeypatch):
    monkeypatch.setattr(muon, "newton_schulz_of_squares", way)  # on a GPU it is the other one
    generator = torch.Generator().manual_seed(0)
    strength = torch.logspace(0, -3, rank)
    left = torch.randn(shape[0], shape[1], rank, generator=generator) * strength
    matrices = left @ torch.randn(shape[0], rank, shape[2], generator=generator)
    x = matrices.double() / matrices.double().norm(dim=(-2, -1), keepdim=True)
    for _ in range(ITERATIONS):  # Jordan et al. 2024
        square = x @ x.mT if shape[1] < shape[2] else x.mT @ x
        factor = NEWTON_SCHULZ[1] * square + NEWTON_SCHULZ[2] * square @ square
        x = NEWTON_SCHULZ[0] * x + (factor @ x if shape[1] < shape[2] else x @ factor)
    torch.testing.assert_close(orthogonal(matrices).double(), x, rtol=0, atol=1e-3 * float(x.abs().max()))


def test_the_size_of_a_direction_does_not_matter():
    matrix = torch.randn(1, 8, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonal(matrix), orthogonal(1000 * matrix), rtol=1e-4, atol=1e-5)


def test_rows_of_zeros_stay_zeros():
    matrix = torch.randn(1, 8, 12, generator=torch.Generator().manual_seed(0))
    matrix[:, 5:], matrix[:, :, 10:] = 0, 0
    found = orthogonal(matrix)
    assert not found[:, 5:].any()
    assert not found[:, :, 10:].any()
    torch.testing.assert_close(found[:, :5, :10], orthogonal(matrix[:, :5, :10]), rtol=1e-4, atol=1e-5)


def test_every_head_has_a_matrix_of_its_own():
    direction = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(0))
    parameter = nn.Parameter(torch.zeros(3, 4, 12))
    [(_, _, step)] = orthogonal_steps([Stepped(parameter, direction, direction, 0.9, None)])
    for head in range(3):
        torch.testing.assert_close(step[head], orthogonal(direction[head : head + 1])[0])


def test_it_steps_the_matrices_inside_blocks_and_nothing_else():
    model = small_model(small_config())
    optimizer = build_optimizer(model, STAGE, STAGE.muon)
    matrices = {name for name, _ in model.named_parameters() if is_matrix(name)}
    assert len(matrices) == 6 * small_config().n_layers
    moments = {name for name, _ in named_state(model, optimizer)}
    assert {name.removesuffix(".exp_avg_sq") for name in moments if name.endswith(".exp_avg_sq")} == {
        name for name, _ in model.named_parameters() if name not in matrices
    }
    assert {name.removesuffix(".exp_avg") for name in moments if name.endswith(".exp_avg")} == dict(
        model.named_parameters()
    ).keys()


def test_the_gate_of_a_gated_network_is_a_matrix_too():
    model = small_model(small_config(norm="rmsnorm", ffn="swiglu", bias=False))
    assert sum(is_matrix(name) for name, _ in model.named_parameters()) == 7 * model.config.n_layers


@pytest.mark.parametrize("name", ["attention.query", "attention.output", "feed_forward.up.weight"])
def test_the_update_of_each_neuron_is_divided_by_its_mean_square_over_the_steps(name):
    shape, beta, generator = (3, 4, 12), 0.9, torch.Generator().manual_seed(0)
    shape = shape if "attention" in name else shape[1:]
    inputs = -2 if name.endswith("output") else -1
    parameter, mean = nn.Parameter(torch.zeros(shape)), 0.0
    variance = Variance(torch.zeros(neuron_shape(name, shape)), beta)
    for _ in range(3):
        direction = torch.randn(shape, generator=generator)
        [(_, _, found)] = orthogonal_steps([Stepped(parameter, direction, direction, 0.9, variance)])
        plain = orthogonal(direction.view(-1, *shape[-2:])).view(shape)
        mean = beta * mean + (1 - beta) * plain.square().mean(inputs, keepdim=True)
        divided = plain / (mean.sqrt() + 1e-8)  # Li et al. 2025, algorithm 1
        scale = plain.norm(dim=(-2, -1), keepdim=True) / divided.norm(dim=(-2, -1), keepdim=True)
        torch.testing.assert_close(found, divided * scale, rtol=1e-5, atol=1e-6)


def test_its_rate_follows_the_schedule():
    model = small_model(small_config())
    optimizer = build_optimizer(model, STAGE, STAGE.muon)
    set_learning_rate(optimizer, STAGE.lr / 4)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx([STAGE.lr / 4, 0.02 / 4])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        if is_matrix(name):
            norms = torch.linalg.matrix_norm(parameter.detach() - before[name], 2)
            assert ((norms > 0.6 * 0.02 / 4) & (norms < 1.3 * 0.02 / 4)).all()


def test_off_it_is_adamw():
    model = small_model(small_config())
    assert all("momentum" not in group for group in build_optimizer(model, STAGE, MuonConfig()).param_groups)


def test_decay_is_for_matrices_only():
    names = ["blocks.0.attention.query", "blocks.0.feed_forward.up.weight", "lm_head.weight"]
    assert all(is_decayed(name) for name in names)
    spared = ["embedding.weight", "final_norm.weight", "blocks.0.attention_norm.bias"]
    spared += ["blocks.0.attention.query_bias", "blocks.0.attention.query_norm.weight"]
    assert not any(is_decayed(name) for name in spared)


def test_the_warmup_is_linear_and_starts_above_zero():
    rates = [learning_rate(step, **PLAN) for step in range(10)]
    assert rates == pytest.approx([1e-4 * (step + 1) for step in range(10)])


def test_the_peak_follows_the_warmup_and_the_floor_is_the_last_step():
    assert learning_rate(10, **PLAN) == pytest.approx(1e-3)
    assert learning_rate(99, **PLAN) == pytest.approx(1e-4)
    rates = [learning_rate(step, **PLAN) for step in range(10, 100)]
    assert rates == sorted(rates, reverse=True)


def test_without_warmup_and_with_a_single_step_it_is_the_peak():
    assert learning_rate(0, peak=1.0, warmup_steps=0, steps=1, min_ratio=0.1) == 1.0


def wsd(**keys):
    return StageConfig(name="test", lr=1e-3, schedule="wsd", steps=100, warmup_steps=10, min_lr_ratio=0.1, **keys)


def test_wsd_warms_up_stays_constant_and_falls_to_its_final_rate():
    constant = [stage_rate(wsd(), step) for step in range(100)]
    assert constant[:10] == pytest.approx([1e-4 * step for step in range(1, 11)])
    assert set(constant[10:]) == {1e-3}
    for decay in ("linear", "1-sqrt"):
        rates = [stage_rate(wsd(decay_steps=20, decay=decay), step) for step in range(100)]
        assert rates[:80] == constant[:80]
        assert rates[80:] == sorted(set(rates[80:]), reverse=True)
        assert rates[-1] == pytest.approx(1e-4)
    half = 80 + 9  # after half of the steps of the decay
    assert stage_rate(wsd(decay_steps=20, decay="linear"), half) == pytest.approx(1e-3 * (0.1 + 0.9 * 0.5))
    assert stage_rate(wsd(decay_steps=20, decay="1-sqrt"), half) == pytest.approx(1e-3 * (0.1 + 0.9 * (1 - 0.5**0.5)))


def test_linear_is_a_share_of_the_steps_whatever_their_number():
    for steps in (100, 1000):
        stage = replace(wsd(), schedule="linear", steps=steps, decay_share=0.4)
        same = replace(wsd(), decay="linear", steps=steps, decay_steps=steps * 4 // 10)
        assert [stage_rate(stage, step) for step in range(steps)] == [stage_rate(same, step) for step in range(steps)]
    whole = replace(wsd(), schedule="linear", decay_share=1.0)
    assert stage_rate(whole, 9) == 1e-3
    assert stage_rate(whole, 10) == pytest.approx(1e-3 * (1 - 0.9 / 90))  # the first step after the warm-up
    assert stage_rate(replace(whole, steps=5), 4) == pytest.approx(5e-4)  # all of it is warm-up


def test_the_cosine_of_a_stage_is_the_one_of_before():
    stage = StageConfig(name="test", lr=1e-3, steps=100, warmup_steps=10, min_lr_ratio=0.1)
    assert [stage_rate(stage, step) for step in range(100)] == [learning_rate(step, **PLAN) for step in range(100)]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"schedule": "constant"},
            r"stage.schedule=constant: expected cosine, linear, or wsd \(constant with ",
        ),
        ({"schedule": "wsd", "decay": "exp"}, "stage.decay=exp: expected 1-sqrt or linear"),
        ({"schedule": "wsd", "decay_steps": 91}, "stage.decay_steps=91: expected at most 90"),
        ({"schedule": "linear", "decay_share": 0.0}, r"stage.decay_share=0.0: expected in \(0, 1\]"),
        ({"decay_steps": 1}, r"stage.decay_steps=1: expected at most 0, .*\(0 unless stage.schedule=wsd\)"),
    ],
)
def test_schedules_that_cannot_be_are_refused_by_name(keys, said):
    with pytest.raises(ConfigError, match=said):
        StageConfig(name="test", steps=100, warmup_steps=10, **keys)
