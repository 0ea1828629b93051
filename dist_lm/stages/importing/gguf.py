"""A GGUF file as a folder that transformers would save: the inverse of `gguf_file`. Needs the extra `gguf`.

Quantised weights become fp32: the numbers that llama.cpp computes with, not those of the model before quantisation.
"""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_lm.errors import ArtefactError, UserError
from dist_lm.interop.architectures import FAMILIES, model_of
from dist_lm.interop.gguf_file import NAMES, names_of_tensors, rows_of_transformers
from dist_lm.interop.gguf_tokenizer import tokenizer_file
from dist_lm.interop.weights import converted
from dist_lm.model.size import parameter_shapes
from dist_lm.storage import durable
from dist_lm.training.checkpoint_tensors import ComputedTensor, write_tensors

READ = ("Llama", "Qwen3")  # families with the same activation in llama.cpp and transformers
SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}  # keys of GGUF, and what config.json calls them
DERIVED = ("vocab_size", "attention.value_length", "rope.dimension_count")  # keys that follow from those in SIZES


def write_snapshot(path: Path, folder: Path) -> None:
    """Writes the model in the GGUF file `path` as config.json, model.safetensors (fp32), tokenizer and chat template.

    The files go into `folder`, which exists; one tensor is in memory at a time.

    Raises:
        ArtefactError: the file is damaged, or holds an option, a tensor or a tokenizer that ours lacks; names it.
        UserError: the package gguf is not installed.
        OSError: a file cannot be written.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"{path} needs the package gguf: pip install 'dist_lm[gguf]'") from error
    try:
        reader = gguf.GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, OSError, OverflowError, UnicodeDecodeError) as error:
        raise ArtefactError(f"{path}: not a whole GGUF file ({error})") from error

    stored = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {name: tuple(map(int, tensor.shape[::-1])) for name, tensor in stored.items()}  # GGUF: fastest axis first
    config = _config(fields, shapes, str(path))
    model, architecture = model_of(config, "imported", str(path))
    conversions = converted(architecture, parameter_shapes(model))
    names = names_of_tensors(architecture, model.n_layers, conversions)

    # A tensor too many is an option that our model lacks, so it is refused like one too few.
    for name in [*(set(stored) - set(names)), *(set(names) - set(stored))]:
        reason = "the model has no place for this tensor" if name in stored else "this tensor is missing"
        raise ArtefactError(f"{path}: {name}: {reason}")

    def read(name: str) -> Any:
        weights = gguf.quants.dequantize(stored[name].data, stored[name].tensor_type)
        tensor = rows_of_transformers(names[name], torch.tensor(weights), model, architecture)
        return tensor.contiguous().view(-1).view(torch.uint8).numpy()

    tensors = {
        conversion.name: ComputedTensor("F32", conversion.shape, 4 * math.prod(conversion.shape), partial(read, name))
        for name, conversion in names.items()
    }
    content, file_name = tokenizer_file(fields, str(path))
    durable.write_json(folder / "config.json", config)
    durable.write_bytes(folder / file_name, content)
    if template := fields.get("tokenizer.chat_template"):
        durable.write_text(folder / "chat_template.jinja", template)
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})


def _config(fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], file: str) -> dict[str, Any]:
    """Returns the file's shape as config.json.

    Args:
        shapes: shapes of its tensors by name, slowest axis first.

    Raises:
        ArtefactError: another architecture, or an option that the model lacks; names it.
    """
    architecture = fields.get("general.architecture")
    families = {NAMES[family]: family for family in READ}
    if architecture not in families:
        raise ArtefactError(f"{file}: general.architecture={architecture}: expected one of {', '.join(families)}")

    prefix = f"{architecture}."
    options = {key.removeprefix(prefix): option for key, option in fields.items() if key.startswith(prefix)}
    for key, option in options.items():
        # An option that is passed over would change what the model computes.
        if key not in SIZES and key not in DERIVED:
            raise ArtefactError(f"{file}: {architecture}.{key}={option}: the model has no such option")

    family = FAMILIES[families[architecture]]
    config = {
        "architectures": [f"{families[architecture]}ForCausalLM"],
        "model_type": family.model_type,
        **family.fixed,
        "vocab_size": shapes.get("token_embd.weight", (0,))[0],
        "tie_word_embeddings": "output.weight" not in shapes,
        # GGUF leaves out a base of 10000.
        "rope_theta": 10000.0,
        **{theirs: _shortest(options[key]) for key, theirs in SIZES.items() if key in options},
    }
    if family.biases:
        config |= {"attention_bias": "blk.0.attn_q.bias" in shapes, "mlp_bias": "blk.0.ffn_up.bias" in shapes}

    # Our heads have one width for queries, keys, values and rotary embedding.
    d_head = config.get("head_dim", config.get("hidden_size", 0) // max(1, config.get("num_attention_heads", 1)))
    for key in ("attention.value_length", "rope.dimension_count"):
        if options.get(key, d_head) != d_head:
            raise ArtefactError(f"{file}: {architecture}.{key}={options[key]}: expected {d_head}, the width of a head")
    return config


def _shortest(number: Any) -> Any:
    """An fp32 number as people write it: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(number))) if isinstance(number, float) else number
