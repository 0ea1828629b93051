"""Options of a model that other families have than our own sizes: one row each, which `test_options.py` walks.

Every key of `ModelConfig` has a row, or is one of `ELSEWHERE`, whose tests are named there.
"""

from dataclasses import dataclass
from typing import Any

LLAMA = {"norm": "rmsnorm", "ffn": "swiglu", "bias": False}
ELSEWHERE = {
    "sizes": ("name", "d_model", "n_layers", "n_heads", "d_ff", "max_seq_len", "vocab_size"),
    "test_transformer": ("norm", "norm_eps", "bias", "tie_embeddings", "head", "parallel_residual", "logit_cap"),
    "test_weights": ("qkv_bias", "qk_norm", "n_kv_heads", "head_width", "rotary_fraction", "rope_base"),
    "test_weights of Llama 3.1": ("rope_low_freq_factor", "rope_high_freq_factor"),
    "test_initialise": ("init_std", "residual_init", "base_width"),
    "test_parity": ("value_residual",),
    "test_export": ("export_as",),
    "test_bf16_engine": ("head_dtype",),
}


@dataclass(frozen=True)
class OptionRow:
    """An option with a value that changes what a small model computes, and who can hold it."""

    keys: tuple[str, ...]
    changes: dict[str, Any]  # of a model of tests with five heads
    family: str  # the class of transformers that an export has
    gguf: str = ""  # words of the refusal; empty: llama.cpp holds it

    def changes_at(self, n_layers: int) -> dict[str, Any]:
        """Returns the changes for a model of fewer layers."""
        return {key: lower(value, n_layers) for key, value in self.changes.items()}


def lower(value: Any, n_layers: int) -> Any:
    return [layer for layer in value if layer < n_layers] if isinstance(value, list) else value


AFTER = "norm after, over all heads"
ROWS = {
    "bias of attention alone": OptionRow(("attention_bias",), {**LLAMA, "attention_bias": True}, "Llama"),
    "no bias of attention": OptionRow(
        ("attention_bias",), {"attention_bias": False}, "GPTNeoX", r"model\.attention_bias=False: llama.cpp has True"
    ),
    "bias of the feed-forward network alone": OptionRow(("ffn_bias",), {**LLAMA, "ffn_bias": True}, "Llama"),
    "GELU by tanh": OptionRow(("ffn",), {"ffn": "gelu_tanh"}, "GPTNeoX"),
    "gated GELU": OptionRow(("ffn",), {**LLAMA, "ffn": "geglu"}, "Llama", r"model\.ffn=geglu"),
    "gated GELU by tanh": OptionRow(("ffn",), {**LLAMA, "ffn": "geglu_tanh"}, "Llama", r"model\.ffn=geglu_tanh"),
    "window": OptionRow(("window",), {**LLAMA, "window": 7}, "Mistral", r"model\.window=7"),
    "window of some layers": OptionRow(
        ("window", "full_layers"),
        {**LLAMA, "qk_norm": True, "window": 7, "full_layers": [1]},
        "Qwen3",
        r"model\.window=7",
    ),
    "window of a layer, without a gate": OptionRow(("window",), {"window": 20}, "Starcoder2", r"model\.window=20"),
    "no rotation": OptionRow(
        ("rope_free_layers",), {**LLAMA, "rope_free_layers": [0, 2]}, "SmolLM3", r"model\.rope_free_layers=\[0, 2\]"
    ),
    "YaRN": OptionRow(
        ("rope_scaling", "rope_factor", "rope_original_len", "rope_beta_fast", "rope_beta_slow", "rope_truncate"),
        {
            **{**LLAMA, "rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_len": 40, "rope_base": 500.0},
            **{"rope_beta_fast": 8.0, "rope_beta_slow": 0.5, "rope_truncate": False},
        },
        "Llama",
        r"model\.rope_scaling=yarn",
    ),
    "YaRN with its own factor": OptionRow(
        ("rope_attention_factor",),
        {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_len": 40, "rope_attention_factor": 1.7},
        "GPTNeoX",
        r"model\.rope_scaling=yarn",
    ),
    "scale of the embedding": OptionRow(("embedding_scale",), {**LLAMA, "embedding_scale": 3.0}, "Granite"),
    "scale of the residual": OptionRow(("residual_scale",), {**LLAMA, "residual_scale": 0.6}, "Granite"),
    "scale of attention": OptionRow(("attention_scale",), {**LLAMA, "attention_scale": 0.8}, "Granite"),
    "divisor of logits": OptionRow(("logit_divisor",), {**LLAMA, "logit_divisor": 2.5}, "Granite"),
    AFTER: OptionRow(
        ("norm_place", "qk_norm_span"),
        {**LLAMA, "norm_place": "after", "qk_norm": True, "qk_norm_span": "all"},
        "Olmo2",
        r"does not write Olmo2 \(model\.norm_place=after\)",
    ),
    "linear scaling": OptionRow(
        ("rope_scaling", "rope_factor", "rope_original_len"),
        {**LLAMA, "rope_scaling": "linear", "rope_factor": 3.0},
        "Llama",
        r"model\.rope_scaling=linear",
    ),
}

# Options whose sums over ranks do not meet, in one model.
TOGETHER = OptionRow(
    (),
    {
        **{**LLAMA, "ffn": "geglu_tanh", "attention_bias": True, "window": 5, "full_layers": [1]},
        **{"rope_free_layers": [0], "rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_len": 12},
        **{"embedding_scale": 3.0, "residual_scale": 0.6, "attention_scale": 0.8, "logit_divisor": 2.5},
    },
    "",
)
