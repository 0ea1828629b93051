"""A model in numbers: parameter shapes, FLOPs, groups of parameters, attention kernels.

Plain Python: nothing is allocated and torch is not imported, so the launcher, the dry run and the report use it too.
"""

import math
from collections.abc import Mapping

from dist_lm.config.model import AdaptedModelConfig, ModelConfig

Shape = tuple[int, ...]

FLASH_MULTIPLE, FLASH_LARGEST = 8, 256  # values of d_head that the flash kernel accepts: multiples of 8 up to 256
MATRICES = (
    *("attention.query", "attention.key", "attention.value", "attention.output"),
    *("feed_forward.gate.weight", "feed_forward.up.weight", "feed_forward.down.weight"),
)
GROUPS = ("embedding", "attention", "feed_forward", "norm", "head")
VALUE_MIX = "attention.value_mix"
ADAPTERS = ".adapters."  # in the names of the parameters of adapters


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Logical shape of every parameter, by name, in the order of `Transformer(config).named_parameters()`."""
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
    """Number of parameters; a tied embedding counts once."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def is_trained(name: str, config: ModelConfig) -> bool:
    """Whether training changes the parameter: of a model with adapters only these and a scalar head, which the base may
    lack."""
    return config.lora is None or ADAPTERS in name or name.startswith("scalar_head.")


def trained_count(config: ModelConfig) -> int:
    """Number of parameters that training changes."""
    return sum(math.prod(shape) for name, shape in parameter_shapes(config).items() if is_trained(name, config))


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Floating-point operations per token of a forward and backward pass over sequences of `seq_len`.

    PaLM (Chowdhery et al. 2022), appendix B: `6 N + 12 L H Q T`, with attention counted in full although half is
    masked. N excludes an embedding that is only looked up (untied, or with a scalar head). Frozen parameters have no
    gradient: 4 N.
    """
    multiplied_embedding = config.tie_embeddings and config.head == "tokens"
    looked_up = 0 if multiplied_embedding else config.vocab_size * config.d_model
    multiplied = parameter_count(config) - looked_up
    frozen = parameter_count(config) - trained_count(config) - (looked_up if config.lora else 0)
    return 6 * multiplied - 2 * frozen + 12 * config.n_layers * config.n_heads * config.d_head * seq_len


def kv_bytes_per_token(config: ModelConfig, kv_heads: int, element_bytes: int) -> int:
    """Bytes of keys and values of one token in all layers, for `kv_heads` key heads."""
    return 2 * config.n_layers * kv_heads * config.d_head * element_bytes


def group_of(name: str) -> str:
    """The entry of `GROUPS` that the gradient norm of a parameter is reported under; a tied head belongs to embedding.

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
    """Whether Muon can step the parameter: whether it is a matrix inside a block."""
    return name.endswith(MATRICES)


def neuron_shape(name: str, shape: Shape) -> Shape:
    """Shape of one number per neuron (output) of a matrix of logical `shape`, with the dimension of its inputs as 1."""
    if name.endswith("attention.output"):  # of shape (heads, inputs, outputs)
        return (shape[0], 1, shape[2])
    return (*shape[:-1], 1)


def packs_documents(device_type: str, half: bool, d_head: int) -> bool:
    """Whether packed documents go to the variable-length flash kernel, whose cost falls with their length, and not to a
    masked kernel.

    Args:
        device_type: cuda | cpu.
        half: queries and keys are bf16 (or fp16).
    """
    return device_type == "cuda" and half and d_head % FLASH_MULTIPLE == 0 and d_head <= FLASH_LARGEST


def documents_apart(device_type: str, half: bool, d_head: int) -> bool:
    """Whether documents are computed separately, by that kernel or in one call each on a CPU, so no mask is stored.

    Arguments are those of `packs_documents`.
    """
    return device_type == "cpu" or packs_documents(device_type, half, d_head)


def _norm_shapes(config: ModelConfig, name: str) -> dict[str, Shape]:
    has_bias = config.norm == "layernorm" and config.bias
    return {f"{name}.{part}": (config.d_model,) for part in (["weight", "bias"] if has_bias else ["weight"])}


def _block_shapes(config: ModelConfig, layer: int) -> dict[str, Shape]:
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
    query: Shape = (config.n_heads, config.d_head, config.d_model)
    key: Shape = (config.kv_heads, config.d_head, config.d_model)
    weights: dict[str, Shape] = {"query": query, "key": key, "value": key, "output": query}
    if config.has_qkv_bias:
        weights |= {f"{name}_bias": weights[name][:2] for name in ("query", "key", "value")}
    if config.bias:
        weights["output_bias"] = (config.d_model,)
    if config.value_residual and layer > 0:
        weights["value_mix"] = (2,)
    if config.qk_norm:
        weights |= {"query_norm.weight": (config.d_head,), "key_norm.weight": (config.d_head,)}
    return weights


def _feed_forward_shapes(config: ModelConfig) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for name in ["gate", "up", "down"] if config.ffn == "swiglu" else ["up", "down"]:
        out, into = (config.d_model, config.d_ff) if name == "down" else (config.d_ff, config.d_model)
        shapes[f"{name}.weight"] = (out, into)
        if config.bias:
            shapes[f"{name}.bias"] = (out,)
    return shapes


def _adapter_shapes(config: ModelConfig, part: str, weights: Mapping[str, Shape]) -> dict[str, Shape]:
    """A (rank, input) and B (rank, output) of every adapter, with the dimensions of the weight."""
    if not isinstance(config, AdaptedModelConfig):
        return {}
    shapes: dict[str, Shape] = {}
    for name in config.adapted(part):
        weight = weights[name] if name in weights else weights[f"{name}.weight"]
        # the output of attention is stored as (input, output), other weights as (output, input)
        of_input = weight[:-1] if name == "output" else weight[-1:]
        of_output = weight[-1:] if name == "output" else weight[:-1]
        shapes[f"{part}{ADAPTERS}{name}.a"] = (config.lora.rank, *of_input)
        shapes[f"{part}{ADAPTERS}{name}.b"] = (config.lora.rank, *of_output)
    return shapes
