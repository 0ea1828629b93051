"""Writes a model as one GGUF file for llama.cpp: shape, tokenizer, chat template, weights. Needs the extra `gguf`.

Spec: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Names of tensors are those of the package `gguf`.

    weights         F32     F16     Q8_0
    matrices        fp32    fp16    8 bits, one fp16 scale for 32 numbers (fp16 where rows are no multiple of 32)
    norms, biases   fp32    fp32    fp32
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_lm.config.model import ModelConfig
from dist_lm.errors import ConfigError, UserError, require
from dist_lm.interop.architectures import Architecture, architecture_of
from dist_lm.interop.gguf_header import NAMES
from dist_lm.interop.gguf_tokenizer import UNUSED, gguf_vocabulary
from dist_lm.interop.weights import FUSED, Converted
from dist_lm.tokenizer.symbols import END
from dist_lm.tokenizer.tokenizer import Tokenizer

TYPES = ("F16", "Q8_0", "F32")
ACTIVATIONS = ("gelu", "gelu_tanh", "swiglu")  # values of model.ffn; llama.cpp computes GELU by tanh
ATTENTION_BIASES = {
    "Qwen3": False,
    "Olmo2": False,
    "GPTNeoX": True,
    "Starcoder2": True,
}  # families with one kind alone in llama.cpp
NEIGHBOURS = ("Llama", "SmolLM3", "Granite")  # families whose RoPE turns neighbours in llama.cpp
BLOCK = 32  # numbers with one scale in Q8_0
Read = Callable[[str], torch.Tensor]  # returns a parameter of ours by its name


def gguf_architecture(model: ModelConfig, architecture: Architecture) -> Architecture:
    """Returns the architecture whose names of tensors the file has: that of the export, or the first that holds the
    model, such as Llama for a Phi-3. Only architectures of llama.cpp pass `require_gguf`."""
    plain = architecture_of(replace(model, export_as=None))
    return plain if isinstance(plain, Architecture) else architecture


def require_gguf(kind: str, model: ModelConfig, architecture: Architecture) -> None:
    """Refuses a model that `write_gguf` cannot write; returns nothing. `kind` is F16, Q8_0 or F32.

    Whether llama.cpp can hold the tokenizer is not checked here.

    Raises:
        ConfigError: llama.cpp cannot hold the model, or `kind` is unknown; names the option.
        UserError: the package gguf is not installed.
    """
    require(kind in TYPES, "--gguf", kind, " or ".join(TYPES))
    if model.head != "tokens":
        raise ConfigError(f"--gguf {kind}: model.head={model.head}: llama.cpp holds models with model.head=tokens")
    if model.rope_scaling != "none":
        raise ConfigError(f"--gguf {kind}: model.rope_scaling={model.rope_scaling}: scaled positions are not written")
    if model.window is not None:
        raise ConfigError(f"--gguf {kind}: model.window={model.window}: sliding windows are not written")

    every_fourth = [*range(3, model.n_layers, 4)]
    if model.rope_free_layers and model.rope_free_layers != every_fourth:
        named = f"model.rope_free_layers={model.rope_free_layers}"
        raise ConfigError(f"--gguf {kind}: {named}: llama.cpp has {every_fourth}, every fourth layer")

    if architecture.family not in NAMES:
        reason = "this command does not write"
        if model.ffn in ("gelu", "gelu_tanh"):
            reason = "llama.cpp has another activation in"

        # The option that makes the family what it is.
        option = f"model.ffn={model.ffn}"
        if model.norm_place != "before":
            option = f"model.norm_place={model.norm_place}"
        elif model.rotary_fraction != 1:
            option = f"model.rotary_fraction={model.rotary_fraction}"
        raise ConfigError(f"--gguf {kind}: {reason} {architecture.family} ({option})")

    has_bias = ATTENTION_BIASES.get(architecture.family, model.has_output_bias)
    if model.has_output_bias != has_bias:
        named = f"model.attention_bias={model.has_output_bias}"
        raise ConfigError(f"--gguf {kind}: {named}: llama.cpp has {has_bias} in {architecture.family}")
    if model.ffn not in ACTIVATIONS:
        raise ConfigError(f"--gguf {kind}: model.ffn={model.ffn}: expected {', '.join(ACTIVATIONS)}")

    # The package is looked for here, since the export would fail only after it has written everything else.
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError("--gguf needs the package gguf: pip install 'dist_lm[gguf]'") from error


def write_gguf(
    path: Path,
    kind: str,
    model: ModelConfig,
    architecture: Architecture,
    tensors: Sequence[Converted],
    read: Read,
    tokenizer: Tokenizer,
    template: str,
) -> None:
    """Writes the file, over an existing one; one tensor is in memory at a time. A failure may leave a part of the file.

    `require_gguf` must have passed. Tensors are converted to fp32 on the CPU, then to the type of the file.

    Args:
        kind: F16 | Q8_0 | F32.
        tensors: tensors of transformers that hold the model.
        read: returns whole, unpadded parameters.
        tokenizer: its `name` must be the path of its file, which is read again.
        template: the chat template.

    Raises:
        ArtefactError: llama.cpp has no tokenizer with these ids.
        OSError: the file cannot be written, or the tokenizer's cannot be read.
    """
    import gguf

    writer = gguf.GGUFWriter(path, NAMES[architecture.family])
    _add_shape(writer, kind, model, architecture)
    _add_tokenizer(writer, tokenizer, model.vocab_size)
    writer.add_chat_template(template)

    # llama.cpp does not share the embedding of GPT-NeoX with the head, so the file has it twice.
    if architecture.family == "GPTNeoX" and model.tie_embeddings:
        embedding = next(tensor for tensor in tensors if tensor.ours == ("embedding.weight",))
        tensors = [*tensors, replace(embedding, name="embed_out.weight")]

    # The header names all tensors with their sizes, so their data can follow one by one.
    tensors_by_name = names_of_tensors(architecture, model.n_layers, tensors)
    for name, tensor in tensors_by_name.items():
        storage = _storage_type(tensor, kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[storage]
        n_bytes = math.prod(tensor.shape) // block * block_bytes
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), n_bytes, storage)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()

    # The weights of the last tensor are freed before the next ones are read: a model may be larger than the memory.
    for tensor in tensors_by_name.values():
        weights = tensor.to_theirs([read(name).detach().to("cpu", torch.float32) for name in tensor.ours])
        rows = rows_of_llama_cpp(tensor, weights, model, architecture).contiguous().numpy()
        writer.write_tensor_data(gguf.quants.quantize(rows, _storage_type(tensor, kind)))
        del weights, rows
    writer.close()


def names_of_tensors(architecture: Architecture, n_layers: int, tensors: Sequence[Converted]) -> dict[str, Converted]:
    """Returns the tensors by the names of llama.cpp, such as `blk.0.attn_q.weight`, in their order."""
    import gguf

    # The package knows its architectures by numbers of its own.
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[NAMES[architecture.family]], n_layers)
    return {str(names.get_name(tensor.name, (".weight", ".bias"))): tensor for tensor in tensors}


def rows_of_llama_cpp(
    tensor: Converted, weights: torch.Tensor, model: ModelConfig, architecture: Architecture
) -> torch.Tensor:
    """Returns a tensor of transformers with the rows in the order of llama.cpp; its shape and dtype stay.

    Args:
        weights: the tensor of transformers, of shape `tensor.shape`. It may share memory with the result.
    """
    if len(tensor.ours) > 1:  # (H, 3, K, ...): all queries, all keys, all values
        parts = weights.view(model.n_heads, len(FUSED), model.d_head, *weights.shape[1:])
        return parts.transpose(0, 1).reshape(tensor.shape)
    if _rotates_neighbours(tensor, architecture):  # (heads, 2, K/2, ...)
        return weights.view(-1, 2, model.d_head // 2, *weights.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    return weights


def rows_of_transformers(
    tensor: Converted, weights: torch.Tensor, model: ModelConfig, architecture: Architecture
) -> torch.Tensor:
    """Returns a tensor of llama.cpp with the rows in the order of transformers, of shape `tensor.shape`; the inverse of
    `rows_of_llama_cpp` for a tensor that holds one tensor of ours. It may share memory with `weights`."""
    if _rotates_neighbours(tensor, architecture):
        return weights.view(-1, model.d_head // 2, 2, *weights.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    return weights.reshape(tensor.shape)


def _rotates_neighbours(tensor: Converted, architecture: Architecture) -> bool:
    """Returns whether RoPE turns neighbours (2 i, 2 i + 1) in llama.cpp; everywhere else it turns (i, i + K/2)."""
    name = tensor.ours[0].removesuffix("_bias")
    return architecture.family in NEIGHBOURS and name.endswith(("attention.query", "attention.key"))


def _storage_type(tensor: Converted, kind: str) -> Any:
    """Returns the `GGMLQuantizationType` of a tensor in a file of type `kind` (F16 | Q8_0 | F32).

    It is F32 for a vector; with Q8_0, F16 for a matrix whose rows are no multiple of `BLOCK` numbers; else `kind`.
    """
    from gguf import GGMLQuantizationType

    # Norms and biases are small, and their precision matters.
    if len(tensor.shape) == 1:
        return GGMLQuantizationType.F32

    # A block must not reach over the end of a row.
    if kind == "Q8_0" and tensor.shape[-1] % BLOCK:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType[kind]


def _add_shape(writer: Any, kind: str, model: ModelConfig, architecture: Architecture) -> None:
    """Adds the keys of the model's name, type of file and sizes to the header of `writer`; nothing is written yet."""
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    writer.add_type("model")
    writer.add_name(model.name)
    writer.add_file_type(LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)

    writer.add_context_length(model.max_seq_len)
    writer.add_embedding_length(model.d_model)
    writer.add_block_count(model.n_layers)
    writer.add_feed_forward_length(model.d_ff)
    writer.add_head_count(model.n_heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(model.d_head)
    writer.add_value_length(model.d_head)
    writer.add_rope_dimension_count(model.rotary_width)
    writer.add_rope_freq_base(model.rope_base)

    if model.norm == "rmsnorm":
        writer.add_layer_norm_rms_eps(model.norm_eps)
    else:
        writer.add_layer_norm_eps(model.norm_eps)
    if architecture.family == "Granite":
        writer.add_embedding_scale(model.embedding_scale)
        writer.add_residual_scale(model.residual_scale)
        writer.add_attention_scale(model.score_scale)
        writer.add_logit_scale(model.logit_divisor)
    if architecture.family == "GPTNeoX":
        writer.add_parallel_residual(architecture.fields["use_parallel_residual"])


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Adds the keys `tokenizer.ggml.*` to the header of `writer`; reads the file of the tokenizer again.

    Args:
        vocab_size: rows of the embedding; ids without a token get the name `[PADn]` and type unused.

    Raises:
        ArtefactError: llama.cpp has no tokenizer with these ids.
        OSError: the file of the tokenizer cannot be read.
    """
    vocabulary = gguf_vocabulary(tokenizer, Path(tokenizer.name).read_bytes())
    # llama.cpp expects a name for every row of the embedding.
    unused_ids = range(len(vocabulary.tokens), vocab_size)
    writer.add_vocab_size(vocab_size)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list([*vocabulary.tokens, *(f"[PAD{token_id}]" for token_id in unused_ids)])
    writer.add_token_types([*vocabulary.types, *(UNUSED for _ in unused_ids)])
    if vocabulary.scores is not None:
        writer.add_token_scores([*vocabulary.scores, *(-1e4 for _ in unused_ids)])
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)

    special_ids: Mapping[str, int] = tokenizer.special_ids
    writer.add_bos_token_id(tokenizer.first_token.id)
    writer.add_eos_token_id(tokenizer.eot_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    # llama.cpp has a key for the token that ends a text, and another one for the token that ends a turn.
    if END in special_ids:
        writer.add_eot_token_id(special_ids[END])
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
