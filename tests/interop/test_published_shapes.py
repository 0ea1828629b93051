"""Files of conf/model that have the shape of a published model have its names, shapes and config.json."""

from typing import Any

import pytest
import torch

from dist_lm.interop.architectures import Architecture, architecture_of, hf_config
from dist_lm.interop.weights import converted
from dist_lm.model.size import parameter_count, parameter_shapes
from dist_lm.prepare.compose import compose_config

transformers = pytest.importorskip("transformers")

LLAMA = {
    **{"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072, "num_key_value_heads": 8},
    **{"rope_theta": 500000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
}
QWEN3 = {
    **{"model_type": "qwen3", "vocab_size": 151936, "max_position_embeddings": 40960, "num_key_value_heads": 8},
    **{"rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False, "head_dim": 128},
}


def llama(width: int, layers: int, heads: int, hidden: int, tied: bool, factor: float) -> dict[str, Any]:
    """Their config.json: https://huggingface.co/meta-llama/Llama-3.1-8B, and Llama-3.2-1B, Llama-3.2-3B."""
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {
        **LLAMA,
        **{"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "head_dim": width // heads},
        **{"intermediate_size": hidden, "tie_word_embeddings": tied},
        "rope_scaling": {"rope_type": "llama3", "factor": factor, **scaling},
    }


def qwen3(width: int, layers: int, heads: int, hidden: int, tied: bool) -> dict[str, Any]:
    """Their config.json: https://huggingface.co/Qwen/Qwen3-0.6B, and 1.7B, 4B, 8B."""
    return {
        **QWEN3,
        **{"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads},
        **{"intermediate_size": hidden, "tie_word_embeddings": tied},
    }


# model -> (published config.json, published number of parameters)
PUBLISHED = {
    "llama_1b": (llama(2048, 16, 32, 8192, True, 32.0), 1_235_814_400),
    "llama_3b": (llama(3072, 28, 24, 8192, True, 32.0), 3_212_749_824),
    "llama_8b": (llama(4096, 32, 32, 14336, False, 8.0), 8_030_261_248),
    "qwen3_0.6b": (qwen3(1024, 28, 16, 3072, True), 596_049_920),
    "qwen3_1.7b": (qwen3(2048, 28, 16, 6144, True), 1_720_574_976),
    "qwen3_4b": (qwen3(2560, 36, 32, 9728, True), 4_022_468_096),
    "qwen3_8b": (qwen3(4096, 36, 32, 12288, False), 8_190_735_360),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_shape_has_the_names_shapes_and_options_of_transformers(name: str):
    """Finds a size, a width of heads, a tied head or a rotation that differs from the published model."""
    published, n_parameters = PUBLISHED[name]
    model = compose_config([f"model={name}", "stage=language"]).model
    architecture = architecture_of(model)
    assert isinstance(architecture, Architecture)

    exported = hf_config(model, architecture, "bfloat16")
    assert {key: exported.get(key) for key in published} == published
    family = getattr(transformers, f"{architecture.family}Config")
    ignored = {"architectures", "dtype", "transformers_version"}
    ours, theirs = family(**exported).to_dict(), family(**published).to_dict()
    assert {key: ours[key] for key in ours.keys() - ignored} == {key: theirs[key] for key in theirs.keys() - ignored}

    with torch.device("meta"):
        built = getattr(transformers, architecture.name)(family(**published))
    shapes = {parameter_name: tuple(parameter.shape) for parameter_name, parameter in built.named_parameters()}
    assert shapes == {tensor.name: tensor.shape for tensor in converted(architecture, parameter_shapes(model))}
    assert parameter_count(model) == n_parameters
