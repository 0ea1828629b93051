"""The averaged weights are in the model only while they are measured, on a device that is there."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dist_lm.config.stage import StageConfig
from dist_lm.errors import ConfigError
from dist_lm.stages.averaging import average
from dist_lm.storage.run_directory import RunDirectory
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


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch):
    # It would write the average, and then end in torch's traceback.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(ConfigError, match="--device=cuda: expected auto or cpu"):
        average(RunDirectory(tmp_path), 2, False, "cuda", Console())

    assert not list(tmp_path.iterdir())
