"""Models of every family, and the same models in transformers."""

from itertools import product
from typing import Any

import pytest
import torch

from dist_lm.config.model import ModelConfig
from dist_lm.interop.architectures import Architecture, architecture_of, hf_config
from dist_lm.interop.weights import to_theirs
from dist_lm.model.keyed_random import initialise
from dist_lm.model.size import parameter_shapes
from dist_lm.model.transformer import Transformer
from dist_lm.prepare.compose import choices, compose_config

LLAMA = {"norm": "rmsnorm", "ffn": "swiglu", "bias": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "GPTNeoX": {},
    "Starcoder2": {"n_kv_heads": 1},
    "Llama": LLAMA,
    "Llama with biases": {"norm": "rmsnorm", "ffn": "swiglu"},
    "Arcee": {"norm": "rmsnorm", "bias": False},
    "Squared": {"norm": "rmsnorm", "bias": False, "ffn": "relu2"},
    "Llama 3.1": {**LLAMA, "n_kv_heads": 1, "rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_len": 32},
    "Linear": {**LLAMA, "rope_scaling": "linear", "rope_factor": 3.0},
    "Qwen2": {**LLAMA, "n_kv_heads": 1, "qkv_bias": True},
    "Pythia": {"parallel_residual": True, "rotary_fraction": 0.25},
    "Qwen3": {**LLAMA, "qk_norm": True},
    "Qwen3 with biases": {**LLAMA, "qk_norm": True, "attention_bias": True},
    "Biases in attention": {**LLAMA, "n_kv_heads": 1, "attention_bias": True},
    "Biases in the feed-forward network": {**LLAMA, "bias": True, "attention_bias": False},
    "GPTNeoX without biases in attention": {"attention_bias": False},
    "Starcoder2 without biases": {"n_kv_heads": 1, "attention_bias": False, "ffn_bias": False},
    "Gated GELU": {**LLAMA, "ffn": "geglu"},
    "Gated GELU by tanh": {**LLAMA, "ffn": "geglu_tanh"},
    "GELU by tanh": {"n_kv_heads": 1, "ffn": "gelu_tanh"},
    "Mistral": {**LLAMA, "n_kv_heads": 1, "export_as": "mistral"},
    "SmolLM3": {**LLAMA, "n_kv_heads": 1, "rope_free_layers": [1]},
    "SmolLM3 of four layers": {**LLAMA, "n_layers": 4, "n_kv_heads": 1, "rope_free_layers": [3]},
    "SmolLM3 with windows": {**LLAMA, "rope_free_layers": [0], "window": 9, "full_layers": [1]},
    "YaRN": {**LLAMA, "rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_len": 16},
    "Granite": {
        **{**LLAMA, "n_kv_heads": 1, "embedding_scale": 3.0, "residual_scale": 0.6, "attention_scale": 0.2},
        "logit_divisor": 2.5,
    },
    "Olmo2": {**LLAMA, "n_kv_heads": 1, "norm_place": "after", "qk_norm": True, "qk_norm_span": "all"},
    "Mistral with a window": {**LLAMA, "n_kv_heads": 1, "window": 9},
    "Ministral": {**LLAMA, "window": 9, "full_layers": [0]},
    "Qwen2 with windows": {**LLAMA, "n_kv_heads": 1, "qkv_bias": True, "window": 9, "full_layers": [1]},
    "Starcoder2 with a window": {"n_kv_heads": 1, "window": 9},
    "Phi3 with a window": {**LLAMA, "n_kv_heads": 1, "window": 9, "export_as": "phi3"},
    "Phi3": {**LLAMA, "n_kv_heads": 1, "export_as": "phi3"},
    "Phi3 with partial rotation": {**LLAMA, "rotary_fraction": 0.25},
}
FURTHER = [*FAMILIES][[*FAMILIES].index("Qwen3") + 1 :]  # of others, not of ours
SCORED = [family for family in FAMILIES if family != "Granite"]  # transformers has a class for a scalar head
# of another family here, by a few options
VARIANTS = (
    *("Squared", "Llama 3.1", "Linear", "Qwen2", "Pythia", "Qwen3 with biases", "Biases in attention", "Mistral"),
    *("Biases in the feed-forward network", "GPTNeoX without biases in attention", "Starcoder2 without biases"),
    *("Gated GELU", "Gated GELU by tanh", "GELU by tanh", "Phi3 with partial rotation"),
    *("Olmo2", "Granite", "SmolLM3", "SmolLM3 of four layers", "SmolLM3 with windows", "YaRN"),
    *("Mistral with a window", "Ministral", "Qwen2 with windows", "Starcoder2 with a window", "Phi3 with a window"),
)


def _marks(family: str, size: str) -> list[pytest.MarkDecorator]:
    """The smallest size shows what a family does, and the next one of one family what a size does; the rest runs at
    length."""
    if size == "nano" or (family, size) == ("GPTNeoX", "tiny"):
        return []
    return [pytest.mark.bars]


SHAPES = [
    pytest.param(family, size, marks=_marks(family, size))
    for family, size in product(FAMILIES, choices("model"))
    # `xl` is `large` with more layers; test_published_shapes.py has the shapes of published models.
    if size != "xl" and not size.startswith(("llama", "qwen"))
]


def sized(size: str, family: str, **changes: Any) -> ModelConfig:
    """A file of conf/model at 2 layers and 512 pieces, as a model of the family."""
    shape = compose_config([f"model={size}", "model.n_layers=2", "model.vocab_size=512"]).model
    values = {**vars(shape), "init_std": 0.05, "rope_base": 5000.0, **FAMILIES[family], **changes}
    return ModelConfig(**values)


def small(family: str, **changes: Any) -> ModelConfig:
    """Odd sizes, five heads."""
    values = {"d_model": 50, "n_layers": 2, "n_heads": 5, "d_ff": 77, "max_seq_len": 64, "vocab_size": 101}
    return ModelConfig(name="small", **{**values, "init_std": 0.05, **FAMILIES[family], **changes})


def our_model(config: ModelConfig) -> Transformer:
    """Norms and biases moved off 1 and 0, so that a forgotten one shows."""
    model = Transformer(config)
    initialise(model, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def architecture(config: ModelConfig) -> Architecture:
    found = architecture_of(config)
    assert isinstance(found, Architecture), found
    return found


def their_model(ours: Transformer) -> Any:
    """The class of transformers with the weights of ours."""
    import transformers

    config, found = ours.config, architecture(ours.config)
    theirs_config = getattr(transformers, f"{found.family}Config")(
        **hf_config(config, found, "float32"), bos_token_id=0, eos_token_id=0, pad_token_id=None
    )
    with torch.device("meta"):
        theirs = getattr(transformers, found.name)(theirs_config)
    theirs = theirs.to_empty(device="cpu")
    state = to_theirs(found, parameter_shapes(config), ours.state_dict())
    if "embed_out.weight" in state and "lm_head.weight" in theirs.state_dict():
        state["lm_head.weight"] = state.pop("embed_out.weight")
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight", "embed_out.weight"} if config.tie_embeddings else set())
    theirs.tie_weights()
    for module in theirs.modules():  # to_empty has emptied the frequencies
        if hasattr(module, "original_inv_freq"):
            module.__init__(module.config)
    return theirs.eval()


def tokens_for(config: ModelConfig, length: int = 40) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (3, length), generator=torch.Generator().manual_seed(1))
