"""A run with every option of Muon, ended half way, goes on to the same bits."""

import pytest

from tests.training_run import copy_until, linked, numbers, prepare, train

pytestmark = pytest.mark.cluster
OPTIONS = (
    *("stage.muon.lr=null", "stage.muon.scale=adamw", "stage.muon.variance_beta=0.9", "stage.muon.weight_decay=0.2"),
    *("stage.muon.momentum_warmup_steps=8", "stage.muon.momentum_cooldown_steps=8", "stage.rates.embedding=2"),
    *("model.norm=rmsnorm", "model.ffn=swiglu", "model.bias=false", "model.base_width=20", "stage.steps=10"),
    "model.value_residual=true",
)


@pytest.mark.heavy
def test_a_run_goes_on_to_the_same_bits(tiny_work, tmp_path):
    whole = prepare(linked(tiny_work, tmp_path / "whole"), "muon", *OPTIONS)
    train(whole, 1)
    half = linked(tiny_work, tmp_path / "half").run("language", "muon")
    copy_until(whole, half, 5)
    train(half, 1)
    assert max(numbers(half)) == 10
    assert numbers(half) == numbers(whole)
