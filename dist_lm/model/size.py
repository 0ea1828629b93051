"""How large a model is, in plain Python: nothing is allocated and torch is not imported."""

import math

from dist_lm.config.model import ModelConfig

Shape = tuple[int, ...]


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Logical shape of every parameter by name, in the order of `Transformer(config).named_parameters()`."""
    shapes: dict[str, Shape] = {"embedding.weight": (config.vocab_size, config.d_model)}
    for layer in range(config.n_layers):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in _block_shapes(config).items()}
    shapes |= _norm_shapes(config, "final_norm")
    if config.head == "scalar":
        shapes |= {"scalar_head.weight": (1, config.d_model), "scalar_head.bias": (1,)}
    elif not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.d_model)
    return shapes


def parameter_count(config: ModelConfig) -> int:
    """All parameters; a tied embedding counts once."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Floating-point operations of a forward and backward pass, a token, at sequences of `seq_len`.

    PaLM (Chowdhery et al. 2022), appendix B: `6 N + 12 L H Q T`, attention counted in full although half is
    masked. N leaves out an embedding that is only looked up (an untied one, or one under a scalar head): it multiplies
    nothing.
    """
    multiplied_embedding = config.tie_embeddings and config.head == "tokens"
    looked_up = 0 if multiplied_embedding else config.vocab_size * config.d_model
    multiplied = parameter_count(config) - looked_up
    return 6 * multiplied + 12 * config.n_layers * config.n_heads * config.d_head * seq_len


def _norm_shapes(config: ModelConfig, name: str) -> dict[str, Shape]:
    has_bias = config.norm == "layernorm" and config.bias
    return {f"{name}.{part}": (config.d_model,) for part in (["weight", "bias"] if has_bias else ["weight"])}


def _block_shapes(config: ModelConfig) -> dict[str, Shape]:
    return (
        _norm_shapes(config, "attention_norm")
        | {f"attention.{name}": shape for name, shape in _attention_shapes(config).items()}
        | _norm_shapes(config, "feed_forward_norm")
        | {f"feed_forward.{name}": shape for name, shape in _feed_forward_shapes(config).items()}
    )


def _attention_shapes(config: ModelConfig) -> dict[str, Shape]:
    query: Shape = (config.n_heads, config.d_head, config.d_model)
    key: Shape = (config.kv_heads, config.d_head, config.d_model)
    weights: dict[str, Shape] = {"query": query, "key": key, "value": key, "output": query}
    if config.qk_norm:
        weights["query_gain"] = (config.n_heads,)
    if not config.bias:
        return weights
    biases: dict[str, Shape] = {f"{name}_bias": weights[name][:2] for name in ("query", "key", "value")}
    return weights | biases | {"output_bias": (config.d_model,)}


def _feed_forward_shapes(config: ModelConfig) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for name in ["gate", "up", "down"] if config.ffn == "swiglu" else ["up", "down"]:
        out, into = (config.d_model, config.d_ff) if name == "down" else (config.d_ff, config.d_model)
        shapes[f"{name}.weight"] = (out, into)
        if config.bias:
            shapes[f"{name}.bias"] = (out,)
    return shapes
