"""Counts from the configuration alone equal the model's."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from small_models import small_config

from dist_lm.config.model import ModelConfig
from dist_lm.model.size import flops_per_token, parameter_count, parameter_shapes
from dist_lm.model.transformer import Transformer

CONF = Path(__file__).parents[2] / "conf" / "model"


def conf_model(name: str, **changes) -> ModelConfig:
    return ModelConfig(**(yaml.safe_load((CONF / f"{name}.yaml").read_text()) | changes))


def built_shapes(config: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    with torch.device("meta"):
        model = Transformer(config)
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_size(name: str, tied: bool) -> None:
    config = conf_model(name, tie_embeddings=tied)
    assert list(parameter_shapes(config).items()) == built_shapes(config)
    with torch.device("meta"):
        assert parameter_count(config) == sum(p.numel() for p in Transformer(config).parameters())


@pytest.mark.parametrize("ffn", ["gelu", "swiglu"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("n_kv_heads", [None, 1])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_every_option(ffn: str, norm: str, bias: bool, qkv_bias: bool, n_kv_heads: int | None, qk_norm: bool) -> None:
    config = small_config(ffn=ffn, norm=norm, bias=bias, qkv_bias=qkv_bias, n_kv_heads=n_kv_heads, qk_norm=qk_norm)
    assert list(parameter_shapes(config).items()) == built_shapes(config)


@pytest.mark.parametrize("n_layers", [1, 3])
def test_value_residual(n_layers: int) -> None:
    config = small_config(n_layers=n_layers, value_residual=True, qk_norm=True)
    assert list(parameter_shapes(config).items()) == built_shapes(config)
    assert parameter_count(config) - parameter_count(small_config(n_layers=n_layers, qk_norm=True)) == 2 * (
        n_layers - 1
    )


def test_the_counts_people_quote() -> None:
    assert round(parameter_count(conf_model("large")) / 1e9, 2) == 1.09
    assert round(parameter_count(conf_model("large", tie_embeddings=True)) / 1e9, 2) == 1.03
    assert round(parameter_count(conf_model("xl")) / 1e9, 2) == 1.58


def test_flops_by_hand() -> None:
    config = small_config(n_layers=1, norm="rmsnorm", bias=False)
    matrices = 4 * 40 * 40 + 2 * 40 * 72 + 64 * 40
    norms = 3 * 40
    scores = 2 * 2 * 40 * 16  # q k^T and weights v: a multiplication and an addition each
    assert flops_per_token(config, 16) == 6 * (matrices + norms) + 3 * scores


def test_needs_no_torch() -> None:
    code = "import sys, dist_lm.model.size; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
