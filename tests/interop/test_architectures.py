"""Every combination of options has an architecture that holds it, or a reason that names an option."""

import random
import re
from dataclasses import fields

import pytest
import torch

from dist_lm.config.model import ModelConfig
from dist_lm.interop.architectures import Architecture, architecture_of, hf_config
from dist_lm.interop.weights import ALIASES, converted
from dist_lm.model.size import parameter_shapes

CHOICES = {
    "norm": ("layernorm", "rmsnorm"),
    "ffn": ("gelu", "gelu_tanh", "swiglu", "geglu_tanh"),
    "bias": (False, True),
    "attention_bias": (None, False, True),
    "ffn_bias": (None, False, True),
    "qkv_bias": (False, True),
    "tie_embeddings": (False, True),
    "qk_norm": (False, True),
    "norm_place": ("before", "after"),
    "n_kv_heads": (None, 2),
    "head_width": (None, 12),
    "parallel_residual": (False, True),
    "rotary_fraction": (1.0, 0.5),
    "window": (None, 8),
    "logit_divisor": (1.0, 2.0),
    "head": ("tokens", "scalar"),
}
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
SIZES = {"d_model": 48, "n_layers": 1, "n_heads": 6, "d_ff": 40, "max_seq_len": 16, "vocab_size": 64}
DICE = random.Random(38)
# The product of all choices has 300,000 combinations; a sample that is the same in every run.
COMBINATIONS = [{key: DICE.choice(values) for key, values in CHOICES.items()} for _ in range(3000)]


def model_of(options: dict) -> ModelConfig:
    return ModelConfig(name="options", **SIZES, **options)


def holds(model: ModelConfig) -> bool:
    return isinstance(architecture_of(model), Architecture)


def followed(combination: dict) -> dict:
    """Options with an architecture, to which the reasons lead, one option after the other, from any combination."""
    options, seen = combination, set[str]()
    while not holds(model_of(options)):
        reason = architecture_of(model_of(options))
        assert isinstance(reason, str)
        named_key = re.fullmatch(r"model\.(\w+)=(\S+): .* has (\S+)", reason)
        assert named_key is not None, reason
        key, current, accepted = named_key.groups()
        assert current == str(options[key])
        assert key not in seen, (combination, reason)
        seen.add(key)
        options = options | {key: next(value for value in CHOICES[key] if str(value) == accepted)}
    return options


def test_the_options_are_those_of_the_configuration():
    free = {"name", "export_as", "norm_eps", "init_std", "residual_init", "base_width", "logit_cap", "value_residual"}
    free |= {"full_layers", "embedding_scale", "residual_scale", "attention_scale", "qk_norm_span", "head_dtype"}
    keys = {field.name for field in fields(ModelConfig)}
    assert {key for key in keys if not key.startswith("rope_")} == CHOICES.keys() | SIZES.keys() | free


@pytest.mark.parametrize("number", range(300))
def test_the_architecture_has_the_parameters_of_the_model(number: int):
    """transformers builds the class from the config that an export writes; names and shapes of its parameters are those
    of the export."""
    transformers = pytest.importorskip("transformers")
    model = model_of(followed(COMBINATIONS[number]))
    found = architecture_of(model)
    assert isinstance(found, Architecture)
    config = getattr(transformers, f"{found.family}Config")(**hf_config(model, found, "float32"), **IDS)
    with torch.device("meta"):
        theirs = getattr(transformers, found.name)(config)
    aliases = ALIASES if found.family == "GPTNeoX" else {}
    shapes = {aliases.get(name, name): tuple(tensor.shape) for name, tensor in theirs.named_parameters()}
    assert shapes == {tensor.name: tensor.shape for tensor in converted(found, parameter_shapes(model))}


@pytest.mark.heavy
def test_a_refusal_names_an_option_and_a_value_that_would_be_held():
    for combination in COMBINATIONS:
        assert holds(model_of(followed(combination)))


@pytest.mark.parametrize("option", [{"logit_cap": 15.0}, {"value_residual": True}])
def test_an_option_that_no_architecture_has_is_named(option: dict):
    ((key, value),) = option.items()
    assert str(architecture_of(model_of({"norm": "rmsnorm", **option}))).startswith(f"model.{key}={value}: ")


def test_the_sizes_of_this_project_have_an_architecture():
    plain = {"norm": "layernorm", "ffn": "gelu", "bias": True}
    found = architecture_of(model_of(plain))
    assert isinstance(found, Architecture)
    assert found.name == "GPTNeoXForCausalLM"
