"""Names and tensors of transformers' architectures, as one table: both directions read it.

A tensor of theirs holds one tensor of ours in another shape, or, in GPT-NeoX, queries, keys and values in one.

Dimensions: H query heads, G key/value heads, K d_head, D d_model.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dist_lm.interop.architectures import Architecture

Shape = tuple[int, ...]
FUSED = ("query", "key", "value")  # in one tensor of GPT-NeoX


def _stack(up: str, down: str) -> dict[str, str]:
    """Names of ours and theirs for Llama and its kin; N is the number of a layer."""
    ours, theirs = "blocks.N.", "model.layers.N."
    table = {"embedding.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
    for part in ("weight", "bias"):
        for own, other in {"gate": "gate_proj", "up": up, "down": down}.items():
            table[f"{ours}feed_forward.{own}.{part}"] = f"{theirs}mlp.{other}.{part}"
        table[f"{ours}attention_norm.{part}"] = f"{theirs}input_layernorm.{part}"
        table[f"{ours}feed_forward_norm.{part}"] = f"{theirs}post_attention_layernorm.{part}"
        table[f"final_norm.{part}"] = f"model.norm.{part}"
    for own, other in {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}.items():
        table[f"{ours}attention.{own}"] = f"{theirs}self_attn.{other}.weight"
        table[f"{ours}attention.{own}_bias"] = f"{theirs}self_attn.{other}.bias"
    for own, other in {"query_norm": "q_norm", "key_norm": "k_norm"}.items():
        table[f"{ours}attention.{own}.weight"] = f"{theirs}self_attn.{other}.weight"
    return table | {"scalar_head.weight": "score.weight"}


def _gpt_neox() -> dict[str, str]:
    ours, theirs = "blocks.N.", "gpt_neox.layers.N."
    table = {"embedding.weight": "gpt_neox.embed_in.weight", "lm_head.weight": "embed_out.weight"}
    for part in ("weight", "bias"):
        suffix = "_bias" if part == "bias" else ""
        for own in FUSED:
            table[f"{ours}attention.{own}{suffix}"] = f"{theirs}attention.query_key_value.{part}"
        table[f"{ours}attention.output{suffix}"] = f"{theirs}attention.dense.{part}"
        table[f"{ours}feed_forward.up.{part}"] = f"{theirs}mlp.dense_h_to_4h.{part}"
        table[f"{ours}feed_forward.down.{part}"] = f"{theirs}mlp.dense_4h_to_h.{part}"
        table[f"{ours}attention_norm.{part}"] = f"{theirs}input_layernorm.{part}"
        table[f"{ours}feed_forward_norm.{part}"] = f"{theirs}post_attention_layernorm.{part}"
        table[f"final_norm.{part}"] = f"gpt_neox.final_layer_norm.{part}"
    return table | {"scalar_head.weight": "score.weight"}


NAMES = {
    "Llama": _stack("up_proj", "down_proj"),
    "Qwen2": _stack("up_proj", "down_proj"),
    "Qwen3": _stack("up_proj", "down_proj"),
    "Arcee": _stack("up_proj", "down_proj"),
    "Starcoder2": _stack("c_fc", "c_proj"),
    "GPTNeoX": _gpt_neox(),
}
ALIASES = {"lm_head.weight": "embed_out.weight"}  # newer names of transformers by the names that we write
# tensors of older versions that are computed from config.json
BUFFERS = re.compile(r".*\.(rotary_emb\.inv_freq|attention\.(bias|masked_bias))")


@dataclass(frozen=True)
class Converted:
    """A tensor of theirs and the tensors of ours that it holds."""

    name: str
    shape: Shape
    ours: tuple[str, ...]
    shapes: tuple[Shape, ...]  # of ours

    @property
    def is_transposed(self) -> bool:
        """The output of attention: ours is (H, K, D), theirs (D, H * K)."""
        return self.ours[0].endswith("attention.output")

    def to_theirs(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Their tensor from ours."""
        if len(tensors) > 1:  # (H, 3, K, ...): for each head its query, key and value
            return torch.stack(tuple(tensors), dim=1).reshape(self.shape)
        (tensor,) = tensors
        return tensor.flatten(0, 1).t().contiguous() if self.is_transposed else tensor.reshape(self.shape)

    def to_ours(self, tensor: torch.Tensor, place: int = 0) -> torch.Tensor:
        """Tensor `place` of ours, from theirs."""
        shape = self.shapes[place]
        if len(self.ours) > 1:
            return tensor.view(shape[0], len(self.ours), *shape[1:])[:, place].contiguous()
        return tensor.t().contiguous().view(shape) if self.is_transposed else tensor.reshape(shape)


def converted(found: Architecture, shapes: Mapping[str, Shape]) -> list[Converted]:
    """The tensors of theirs that hold a model.

    Args:
        shapes: of our parameters by name, in the order of the model. The bias of a scalar head has no place in theirs.
    """
    groups: dict[str, list[str]] = {}
    for name in shapes:
        layer = re.match(r"blocks\.(\d+)\.", name)
        number = layer[1] if layer else ""
        row = NAMES[found.family].get(re.sub(r"^blocks\.\d+\.", "blocks.N.", name))
        if row is not None:
            groups.setdefault(row.replace(".N.", f".{number}."), []).append(name)
        else:
            assert name == "scalar_head.bias", name
    return [_converted(theirs, tuple(ours), shapes) for theirs, ours in groups.items()]


def _converted(theirs: str, ours: tuple[str, ...], shapes: Mapping[str, Shape]) -> Converted:
    parts = tuple(shapes[name] for name in ours)
    first, shape = ours[0], parts[0]
    if first.endswith("attention.output"):
        shape = (shape[2], shape[0] * shape[1])
    elif ".attention." in first and first.endswith(FUSED + tuple(f"{name}_bias" for name in FUSED)):
        shape = (len(ours) * shape[0] * shape[1], *shape[2:])
    return Converted(theirs, shape, ours, parts)


def to_theirs(
    found: Architecture, shapes: Mapping[str, Shape], state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Whole, unpadded weights of ours as a state dict of theirs."""
    return {one.name: one.to_theirs([state[name] for name in one.ours]) for one in converted(found, shapes)}
