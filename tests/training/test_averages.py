"""The averaged weights are in the model only while they are measured."""

from collections.abc import Mapping

import pytest
import torch

from dist_lm.config.stage import StageConfig
from dist_lm.training import averages
from dist_lm.training.optimizer import build_optimizer, named_state
from tests.model.small_models import small_config, small_model


def test_the_weights_are_back_after_a_measurement_and_after_one_that_fails():
    model = small_model(small_config())
    optimizer = build_optimizer(model, StageConfig(name="test", ema_decay=0.9))
    averages.follow(optimizer, 0.9, 1)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    state = {name: tensor.clone() for name, tensor in named_state(model, optimizer)}

    def evaluate() -> Mapping[str, float]:
        assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
        return {"val/loss": 1.0, "val/other": 2.0}

    def fail() -> Mapping[str, float]:
        raise OSError("a shard is gone")

    assert averages.measured(optimizer, evaluate) == {"val/ema_loss": 1.0}
    with pytest.raises(OSError, match="a shard is gone"):
        averages.measured(optimizer, fail)

    assert all(torch.equal(parameter, weights[name] + 1) for name, parameter in model.named_parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in named_state(model, optimizer))
