"""A model in numbers: parameter shapes, FLOPs, groups of parameters, attention kernels.

Plain Python: nothing is allocated and torch is not imported, so the launcher, the dry run and the report use it too.
"""

import math
from collections.abc import Mapping

from dist_lm.config.model import AdaptedModelConfig, ModelConfig

Shape = tuple[int, ...]

WEIGHTS_PER_SCALE, SCALES_PER_SCALE = 64, 256  # blocks of a matrix in four bits, see `dist_lm.model.quantised`
SCALE_VALUES = 256  # values of an 8-bit float, the code of its scales
FLASH_MULTIPLE, FLASH_LARGEST = 8, 256  # values of d_head that the flash kernel accepts: multiples of 8 up to 256
MATRICES = (
    *("attention.query", "attention.key", "attention.value", "attention.output"),
    *("feed_forward.gate.weight", "feed_forward.up.weight", "feed_forward.down.weight"),
)
GROUPS = ("embedding", "attention", "feed_forward", "norm", "head")
VALUE_MIX = "attention.value_mix"
ADAPTERS = ".adapters."  # in the names of the parameters of adapters
TOKEN_WEIGHTS = ("embedding.weight", "lm_head.weight")  # they have a row for each token


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Returns the logical shape of every parameter, by name, in the order of `Transformer(config).named_parameters()`.

    With adapters, their factors are included; `config.plain` leaves them out. A tied head has no entry.
    """
    shapes: dict[str, Shape] = {"embedding.weight": (config.vocab_size, config.d_model)}
    for layer in range(config.n_layers):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in _block_shapes(config, layer).items()}
    shapes |= _norm_shapes(config, "final_norm")

    if config.head == "scalar":
        shapes |= {"scalar_head.weight": (1, config.d_model), "scalar_head.bias": (1,)}
    elif not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.d_model)
    return shapes


def parameter_count(config: ModelConfig) -> int:
    """Returns the number of parameters; a tied embedding counts once."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def is_trained(name: str, config: ModelConfig) -> bool:
    """Returns whether training changes the parameter: with adapters, only these, a scalar head (the base may have
    none) and, with stage.lora.tokens, rows of the embedding and the head change."""
    if config.lora is None or ADAPTERS in name or name.startswith("scalar_head."):
        return True
    return bool(config.lora.tokens) and name in TOKEN_WEIGHTS


def trained_count(config: ModelConfig) -> int:
    """Returns the number of parameters that training changes."""
    return sum(math.prod(shape) for name, shape in parameter_shapes(config).items() if is_trained(name, config))


def quantised_bytes(n_entries: int) -> int:
    """Returns the bytes of a matrix in four bits: codes, scales, scales of scales, their mean and their values."""
    n_scales = -(-n_entries // WEIGHTS_PER_SCALE)
    return -(-n_entries // 2) + n_scales + 4 * (-(-n_scales // SCALES_PER_SCALE) + 1 + SCALE_VALUES)


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Returns the floating-point operations per token of a forward and backward pass over sequences of `seq_len`
    tokens.

    PaLM (Chowdhery et al. 2022), appendix B: `6 N + 12 L H Q T`, with attention counted in full although half is
    masked; a layer with a window has that in place of T. N excludes an embedding that is only looked up (untied, or
    with a scalar head). Frozen parameters have no gradient: 4 N.
    """
    # Looking up a row is no product. A tied embedding is multiplied by the head.
    embedding_count = 0
    if config.head != "tokens" or not config.tie_embeddings:
        embedding_count = config.vocab_size * config.d_model
    multiplied_count = parameter_count(config) - embedding_count

    # A frozen weight still passes gradients on to its input, but gets none itself: 4 operations instead of 6.
    frozen_count = parameter_count(config) - trained_count(config)
    if config.lora:
        frozen_count -= embedding_count
    attention_flops = 12 * config.n_heads * config.d_head * attended_tokens(config, seq_len)
    return 6 * multiplied_count - 2 * frozen_count + attention_flops


def attended_tokens(config: ModelConfig, seq_len: int) -> int:
    """Returns the tokens that a query may see in sequences of `seq_len`, summed over layers, causality left out."""
    return sum(min(seq_len, window or seq_len) for window in config.windows)


def kv_bytes_per_token(config: ModelConfig, kv_heads: int, element_bytes: int) -> int:
    """Returns the bytes of keys and values of one token in all layers, for `kv_heads` key/value heads."""
    return 2 * config.n_layers * kv_heads * config.d_head * element_bytes


def group_of(name: str) -> str:
    """Returns the entry of `GROUPS` under which the gradient norm of a parameter is reported.

    A tied head belongs to embedding.

    Raises:
        ValueError: no model of ours has a parameter of this name.
    """
    for part in name.split("."):
        if part in GROUPS:
            return part
        if part.endswith(("norm", "head")):
            return part.rpartition("_")[2]
    raise ValueError(f"parameter {name}: expected a name in one of the groups {', '.join(GROUPS)}")


def is_matrix(name: str) -> bool:
    """Returns whether the parameter is a matrix inside a block, which Muon can step."""
    return name.endswith(MATRICES)


def neuron_shape(name: str, shape: Shape) -> Shape:
    """Returns the shape of one number per neuron (output) of a matrix of logical `shape`: its input dimension is 1."""
    if name.endswith("attention.output"):  # its shape is (heads, inputs, outputs)
        return (shape[0], 1, shape[2])
    return (*shape[:-1], 1)


def packs_documents(device_type: str, half: bool, d_head: int) -> bool:
    """Returns whether packed documents go to the variable-length flash kernel instead of a masked kernel.

    Its cost falls with the length of the documents; a masked kernel computes every pair of tokens of a row.

    Args:
        device_type: cuda | cpu.
        half: queries and keys are bf16 (or fp16).
    """
    return device_type == "cuda" and half and d_head % FLASH_MULTIPLE == 0 and d_head <= FLASH_LARGEST


def flash_window(window: int | None) -> tuple[int, int]:
    """Returns how many keys before and behind its own a query sees, as the flash kernel takes it: causal, with a window
    or without."""
    if window is None:
        return -1, 0
    return window - 1, 0


def documents_apart(device_type: str, half: bool, d_head: int) -> bool:
    """Returns whether documents are computed separately, by the flash kernel or in one call each on a CPU: no mask is
    stored then.

    Arguments are those of `packs_documents`.
    """
    return device_type == "cpu" or packs_documents(device_type, half, d_head)


def _norm_shapes(config: ModelConfig, name: str) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {f"{name}.weight": (config.d_model,)}
    if config.norm == "layernorm" and config.bias:
        shapes[f"{name}.bias"] = (config.d_model,)
    return shapes


def _block_shapes(config: ModelConfig, layer: int) -> dict[str, Shape]:
    """Returns the shapes of the parameters of block `layer` (from 0) by their names in it, in their order in a model;
    factors of adapters are included."""
    attention = _attention_shapes(config, layer)
    return (
        _norm_shapes(config, "attention_norm")
        | {f"attention.{name}": shape for name, shape in attention.items()}
        | _adapter_shapes(config, "attention", attention)
        | _norm_shapes(config, "feed_forward_norm")
        | {f"feed_forward.{name}": shape for name, shape in _feed_forward_shapes(config).items()}
        | _adapter_shapes(config, "feed_forward", _feed_forward_shapes(config))
    )


def _attention_shapes(config: ModelConfig, layer: int) -> dict[str, Shape]:
    """Returns the shapes of the attention's parameters by name, in their order in a model; adapters are excluded."""
    query: Shape = (config.n_heads, config.d_head, config.d_model)
    key: Shape = (config.kv_heads, config.d_head, config.d_model)
    shapes: dict[str, Shape] = {"query": query, "key": key, "value": key, "output": query}

    if config.has_qkv_bias:
        shapes |= {f"{name}_bias": shapes[name][:2] for name in ("query", "key", "value")}
    if config.has_output_bias:
        shapes["output_bias"] = (config.d_model,)
    if config.value_residual and layer > 0:
        shapes["value_mix"] = (2,)
    if config.qk_norm:
        for name in ("query", "key"):
            shapes[f"{name}_norm.weight"] = shapes[name][:2] if config.qk_norm_span == "all" else shapes[name][1:2]
    return shapes


def _feed_forward_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Returns the shapes of the feed-forward network's parameters by name, in their order; adapters are excluded."""
    weights: dict[str, Shape] = {"up": (config.d_ff, config.d_model), "down": (config.d_model, config.d_ff)}
    if config.is_gated:
        weights = {"gate": (config.d_ff, config.d_model)} | weights

    shapes: dict[str, Shape] = {}
    for name, shape in weights.items():
        shapes[f"{name}.weight"] = shape
        if config.has_ffn_bias:
            shapes[f"{name}.bias"] = shape[:1]
    return shapes


def _adapter_shapes(config: ModelConfig, part: str, weights: Mapping[str, Shape]) -> dict[str, Shape]:
    """Returns the shapes of A (rank, *input) and B (rank, *output) of every adapter of one part of a block, by name;
    empty without adapters.

    Args:
        part: attention | feed_forward; begins the names.
        weights: shapes of the weights of that part, by name.
    """
    if not isinstance(config, AdaptedModelConfig):
        return {}

    shapes: dict[str, Shape] = {}
    for name in config.adapted(part):
        weight = weights.get(name) or weights[f"{name}.weight"]  # those of attention have no suffix
        # The output of attention is stored as (input, output), other weights as (output, input).
        if name == "output":
            input_dims, output_dims = weight[:-1], weight[-1:]
        else:
            input_dims, output_dims = weight[-1:], weight[:-1]
        shapes[f"{part}{ADAPTERS}{name}.a"] = (config.lora.rank, *input_dims)
        shapes[f"{part}{ADAPTERS}{name}.b"] = (config.lora.rank, *output_dims)
    return shapes
