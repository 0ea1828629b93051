"""Every combination of options has an architecture that holds it, or a reason that names an option."""

import math
import re
from collections import Counter
from dataclasses import fields
from itertools import product

import pytest
import torch

from dist_lm.config.model import ModelConfig
from dist_lm.interop.architectures import Architecture, architecture_of
from dist_lm.model.size import parameter_shapes

CHOICES = {
    "norm": ("layernorm", "rmsnorm"),
    "ffn": ("gelu", "relu2", "swiglu"),
    "bias": (False, True),
    "qkv_bias": (False, True),
    "tie_embeddings": (False, True),
    "qk_norm": (False, True),
    "n_kv_heads": (None, 2),
    "head_width": (None, 12),
    "parallel_residual": (False, True),
    "rotary_fraction": (1.0, 0.5),
    "head": ("tokens", "scalar"),
}
SIZES = {"d_model": 48, "n_layers": 1, "n_heads": 6, "d_ff": 40, "max_seq_len": 16, "vocab_size": 64}
COMBINATIONS = [dict(zip(CHOICES, values, strict=True)) for values in product(*CHOICES.values())]
ONCE = {"tie_embeddings": False, "head": "tokens"}  # no refusal depends on these


def model_of(options: dict) -> ModelConfig:
    return ModelConfig(name="options", **SIZES, **options)


def named(options: dict) -> str:
    return "-".join(f"{key}={value}" for key, value in options.items())


def holds(model: ModelConfig) -> bool:
    return isinstance(architecture_of(model), Architecture)


def test_the_options_are_those_of_the_configuration():
    free = {"name", "norm_eps", "init_std", "residual_init", "base_width", "logit_cap", "value_residual"}
    free |= {
        f"rope_{key}" for key in ("base", "scaling", "factor", "low_freq_factor", "high_freq_factor", "original_len")
    }
    assert {field.name for field in fields(ModelConfig)} == CHOICES.keys() | SIZES.keys() | free


@pytest.mark.parametrize("options", [one for one in COMBINATIONS if holds(model_of(one))], ids=named)
def test_the_architecture_has_the_parameters_of_the_model(options: dict):
    """transformers builds the class; its parameters, without names, are those of the model, fused ones split."""
    transformers = pytest.importorskip("transformers")
    model = model_of(options)
    found = architecture_of(model)
    assert isinstance(found, Architecture)
    values = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "intermediate_size": model.d_ff,
        "tie_word_embeddings": model.tie_embeddings,
        "num_labels": 1,
    }
    if found.family != "GPTNeoX":
        values |= {"num_key_value_heads": model.kv_heads, "head_dim": model.d_head}
    config = getattr(transformers, f"{found.family}Config")(**values, **found.fields)
    with torch.device("meta"):
        theirs = getattr(transformers, found.name)(config)
    shapes = []
    for name, parameter in theirs.named_parameters():
        parts = parameter.chunk(3) if "query_key_value" in name else (parameter,)
        shapes += [math.prod(part.shape) for part in parts]
    ours = {name: math.prod(shape) for name, shape in parameter_shapes(model).items() if name != "scalar_head.bias"}
    assert Counter(shapes) == Counter(ours.values())
    norms = [name for name, _ in theirs.named_parameters() if re.search(r"[qk]_norm", name)]
    assert len(norms) == (2 * model.n_layers if model.qk_norm else 0)
    assert any("gate" in name for name, _ in theirs.named_parameters()) is (model.ffn == "swiglu")


@pytest.mark.parametrize(
    "options", [one for one in COMBINATIONS if one.items() >= ONCE.items() and not holds(model_of(one))], ids=named
)
def test_a_refusal_names_an_option_that_another_value_of_which_would_be_held(options: dict):
    """Following the reasons, one option after the other, leads to an architecture."""
    seen: list[str] = []
    while not holds(model_of(options)):
        reason = architecture_of(model_of(options))
        assert isinstance(reason, str)
        key = re.match(r"model\.(\w+)=(\S+): ", reason)
        assert key is not None
        assert key[2] == str(options[key[1]])
        assert key[1] not in seen
        seen.append(key[1])
        other = next(value for value in CHOICES[key[1]] if value != options[key[1]])
        options = options | {key[1]: other}


@pytest.mark.parametrize("option", [{"logit_cap": 15.0}, {"value_residual": True}])
def test_an_option_that_no_architecture_has_is_named(option: dict):
    ((key, value),) = option.items()
    assert str(architecture_of(model_of({"norm": "rmsnorm", **option}))).startswith(f"model.{key}={value}: ")


def test_the_sizes_of_this_project_have_an_architecture():
    plain = {"norm": "layernorm", "ffn": "gelu", "bias": True}
    found = architecture_of(model_of(plain))
    assert isinstance(found, Architecture)
    assert found.name == "GPTNeoXForCausalLM"
