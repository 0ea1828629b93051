"""Converts weights to and from Hugging Face's GPT-NeoX (Black et al. 2022).

With sequential residuals (`use_parallel_residual` false), rotation of the whole head (`rotary_pct` 1) and exact GELU,
GPT-NeoX computes the same function as this package's model with default options.

Dimensions: H heads, K d_head, D d_model.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dist_lm.config.model import ModelConfig
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.storage import durable

State = Mapping[str, torch.Tensor]

HEAD = "embed_out.weight"
HEAD_IN_MEMORY = "lm_head.weight"  # the name in a model that newer versions of transformers have loaded


def to_gpt_neox(state: State, config: ModelConfig) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(GPT-NeoX state dict, config.json without token ids) of whole, unpadded weights.

    Raises:
        ConfigError: the model has an option that GPT-NeoX lacks.
    """
    require_expressible(config)
    mapped = {theirs: state[ours].contiguous() for ours, theirs, _ in _renamed(config)}
    for layer in range(config.n_layers):
        ours, theirs = f"blocks.{layer}.attention.", f"gpt_neox.layers.{layer}.attention."
        weight_H3KD = torch.stack([state[ours + name] for name in ("query", "key", "value")], dim=1)
        bias_H3K = torch.stack([state[ours + f"{name}_bias"] for name in ("query", "key", "value")], dim=1)
        mapped[theirs + "query_key_value.weight"] = weight_H3KD.reshape(-1, config.d_model)
        mapped[theirs + "query_key_value.bias"] = bias_H3K.flatten()
        mapped[theirs + "dense.weight"] = state[ours + "output"].flatten(0, 1).t().contiguous()
    return mapped, hf_config(config, str(state["embedding.weight"].dtype).removeprefix("torch."))


def from_gpt_neox(hf_state: State, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The inverse of `to_gpt_neox`, for a model whose config.json equals `hf_config(config)`.

    Raises:
        ConfigError: the model has an option that GPT-NeoX lacks.
        ArtefactError: a weight is missing or has another shape.
    """
    require_expressible(config)
    if HEAD_IN_MEMORY in hf_state and HEAD not in hf_state:
        hf_state = {**hf_state, HEAD: hf_state[HEAD_IN_MEMORY]}
    n_heads, d_head, d_model = config.n_heads, config.d_head, config.d_model
    mapped = {ours: _weight(hf_state, theirs, shape) for ours, theirs, shape in _renamed(config)}
    for layer in range(config.n_layers):
        ours, theirs = f"blocks.{layer}.attention.", f"gpt_neox.layers.{layer}.attention."
        fused = _weight(hf_state, theirs + "query_key_value.weight", (3 * d_model, d_model))
        fused_bias = _weight(hf_state, theirs + "query_key_value.bias", (3 * d_model,))
        weight_H3KD = fused.view(n_heads, 3, d_head, d_model)
        bias_H3K = fused_bias.view(n_heads, 3, d_head)
        for index, name in enumerate(("query", "key", "value")):
            mapped[ours + name] = weight_H3KD[:, index].contiguous()
            mapped[ours + f"{name}_bias"] = bias_H3K[:, index].contiguous()
        dense = _weight(hf_state, theirs + "dense.weight", (d_model, d_model))
        mapped[ours + "output"] = dense.t().reshape(n_heads, d_head, d_model)
    return mapped


def save_gpt_neox(state: State, config: ModelConfig, folder: Path, eot_id: int, pad_id: int) -> None:
    """Write the folder that `transformers.AutoModelForCausalLM.from_pretrained` loads.

    It holds config.json, generation_config.json and model.safetensors.

    Args:
        eot_id: begins and ends a document, so it is both `bos` and `eos`.
        pad_id: must differ from `eot_id`.
    """
    weights, hf = to_gpt_neox(state, config)
    ids = {"bos_token_id": eot_id, "eos_token_id": eot_id, "pad_token_id": pad_id}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".model.safetensors.tmp"
    save_file({name: tensor.cpu() for name, tensor in weights.items()}, temporary, metadata={"format": "pt"})
    durable.fsync_file(temporary)
    temporary.replace(folder / "model.safetensors")
    durable.write_json(folder / "generation_config.json", ids)
    durable.write_json(folder / "config.json", hf | ids)


def hf_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json without token ids (https://huggingface.co/docs/transformers/model_doc/gpt_neox)."""
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": config.max_seq_len,
        "hidden_act": "gelu",
        "layer_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "rotary_pct": 1.0,
        "rotary_emb_base": config.rope_base,
        "use_parallel_residual": False,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
    }


def require_expressible(config: ModelConfig) -> None:
    """Refuse an option that GPT-NeoX lacks; the error names its key."""
    needs = {
        "norm": "layernorm",
        "ffn": "gelu",
        "bias": True,
        "qk_norm": False,
    }
    for key, accepted in needs.items():
        if getattr(config, key) != accepted:
            raise ConfigError(f"model.{key}={getattr(config, key)}: GPT-NeoX has only {accepted}")
    if config.kv_heads != config.n_heads:
        raise ConfigError(
            f"model.n_kv_heads={config.n_kv_heads}: GPT-NeoX has one key/value head a query head, {config.n_heads} here"
        )


def _renamed(config: ModelConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(our name, GPT-NeoX name, shape) of the weights that differ in name only."""
    d_model, d_ff = config.d_model, config.d_ff
    yield "embedding.weight", "gpt_neox.embed_in.weight", (config.vocab_size, d_model)
    for layer in range(config.n_layers):
        ours, theirs = f"blocks.{layer}.", f"gpt_neox.layers.{layer}."
        yield ours + "attention.output_bias", theirs + "attention.dense.bias", (d_model,)
        for part in ("weight", "bias"):
            yield ours + f"attention_norm.{part}", theirs + f"input_layernorm.{part}", (d_model,)
            yield ours + f"feed_forward_norm.{part}", theirs + f"post_attention_layernorm.{part}", (d_model,)
        yield ours + "feed_forward.up.weight", theirs + "mlp.dense_h_to_4h.weight", (d_ff, d_model)
        yield ours + "feed_forward.up.bias", theirs + "mlp.dense_h_to_4h.bias", (d_ff,)
        yield ours + "feed_forward.down.weight", theirs + "mlp.dense_4h_to_h.weight", (d_model, d_ff)
        yield ours + "feed_forward.down.bias", theirs + "mlp.dense_4h_to_h.bias", (d_model,)
    for part in ("weight", "bias"):
        yield f"final_norm.{part}", f"gpt_neox.final_layer_norm.{part}", (d_model,)
    if not config.tie_embeddings:
        yield "lm_head.weight", HEAD, (config.vocab_size, d_model)


def _weight(hf_state: State, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if name not in hf_state:
        raise ArtefactError(f"{name} is missing: these are not the weights of a GPT-NeoX of this shape")
    tensor = hf_state[name]
    if tuple(tensor.shape) != shape:
        raise ArtefactError(
            f"{name} has shape {tuple(tensor.shape)}, expected {shape}: model.* describes another model"
        )
    return tensor
