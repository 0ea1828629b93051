"""The transformers architecture that can hold a model, or the option for which there is none.

    model.norm  model.ffn  model.bias  model.qk_norm  architecture
    layernorm   gelu       true        false          GPTNeoX; Starcoder2 with grouped-query attention
    rmsnorm     gelu       any         false          Arcee, with hidden_act=gelu
    rmsnorm     swiglu     any         false          Llama, with attention_bias and mlp_bias
    rmsnorm     swiglu     false       true           Qwen3

No other combination has an architecture. `model.n_kv_heads`, `model.tie_embeddings` and the sizes are free. Qwen2 is
not in the table: it has biases for queries, keys and values alone, and `model.bias` means all linear layers.

`model.head` chooses the class: ForCausalLM, or ForSequenceClassification, whose score has no bias. Such a score differs
from the model's by a constant, so comparisons of scores stay the same.
"""

from dataclasses import dataclass
from typing import Any

from dist_lm.config.model import ModelConfig

HEADS = {"tokens": "ForCausalLM", "scalar": "ForSequenceClassification"}


@dataclass(frozen=True)
class Architecture:
    """A class of transformers and the fields of its config that the options of a model decide."""

    family: str  # such as Llama
    head: str  # a value of HEADS
    fields: dict[str, Any]

    @property
    def name(self) -> str:
        """The class, such as LlamaForCausalLM."""
        return self.family + self.head


def architecture_of(model: ModelConfig) -> Architecture | str:
    """The architecture that holds `model`; if there is none, the reason, which names the option."""
    head = HEADS[model.head]
    if model.norm == "layernorm":
        if model.ffn != "gelu":
            return f"model.ffn={model.ffn}: with model.norm=layernorm, transformers has gelu only"
        if not model.bias:
            return "model.bias=False: with model.norm=layernorm, transformers always has biases"
        if model.qk_norm:
            return "model.qk_norm=True: with model.norm=layernorm, transformers does not normalise queries and keys"
        if model.kv_heads != model.n_heads:
            return Architecture("Starcoder2", head, {"hidden_act": "gelu", "use_bias": True})
        return Architecture(
            "GPTNeoX", head, {"hidden_act": "gelu", "attention_bias": True, "use_parallel_residual": False}
        )
    if model.ffn == "gelu":
        if model.qk_norm:
            return "model.qk_norm=True: with model.ffn=gelu, transformers does not normalise queries and keys"
        biases = {"attention_bias": model.bias, "mlp_bias": model.bias}
        return Architecture("Arcee", head, {"hidden_act": "gelu", **biases})
    if not model.qk_norm:
        return Architecture("Llama", head, {"attention_bias": model.bias, "mlp_bias": model.bias})
    if model.bias:
        return "model.bias=True: with model.qk_norm=true, transformers has no biases in the feed-forward network"
    return Architecture("Qwen3", head, {"attention_bias": False})
