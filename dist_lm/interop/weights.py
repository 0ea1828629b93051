"""Maps our parameters to tensors of transformers' architectures by one table, which both directions read.

A tensor of theirs holds one tensor of ours in another shape, or several: in GPT-NeoX queries, keys and values of each
head, in Phi-3 all queries, then all keys, then all values, and gate and up.

Dimensions: H query heads, G key/value heads, K d_head, D d_model.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dist_lm.interop.architectures import Architecture

Shape = tuple[int, ...]
FUSED = ("query", "key", "value")  # GPT-NeoX and Phi-3 have these in one tensor
INTERLEAVED = ("GPTNeoX",)  # families whose fused tensor is (heads, 3, ...)


def _stack(up: str, down: str) -> dict[str, str]:
    """Returns our names -> theirs for Llama and its kin; N is the number of a layer.

    Names that a model of the family lacks (biases, norms of queries and keys) are among them.

    Args:
        up: their name for the layer `feed_forward.up`.
        down: their name for `feed_forward.down`.
    """
    ours, theirs = "blocks.N.", "model.layers.N."
    table = {"embedding.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
    for part in ("weight", "bias"):
        for our_name, their_name in {"gate": "gate_proj", "up": up, "down": down}.items():
            table[f"{ours}feed_forward.{our_name}.{part}"] = f"{theirs}mlp.{their_name}.{part}"
        table[f"{ours}attention_norm.{part}"] = f"{theirs}input_layernorm.{part}"
        table[f"{ours}feed_forward_norm.{part}"] = f"{theirs}post_attention_layernorm.{part}"
        table[f"final_norm.{part}"] = f"model.norm.{part}"

    for our_name, their_name in {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}.items():
        table[f"{ours}attention.{our_name}"] = f"{theirs}self_attn.{their_name}.weight"
        table[f"{ours}attention.{our_name}_bias"] = f"{theirs}self_attn.{their_name}.bias"
    for our_name, their_name in {"query_norm": "q_norm", "key_norm": "k_norm"}.items():
        table[f"{ours}attention.{our_name}.weight"] = f"{theirs}self_attn.{their_name}.weight"
    return table | {"scalar_head.weight": "score.weight"}


def _gpt_neox() -> dict[str, str]:
    """Returns our names -> theirs for GPT-NeoX; N is the number of a layer. Queries, keys and values have one name."""
    ours, theirs = "blocks.N.", "gpt_neox.layers.N."
    table = {"embedding.weight": "gpt_neox.embed_in.weight", "lm_head.weight": "embed_out.weight"}
    for part, suffix in (("weight", ""), ("bias", "_bias")):
        for our_name in FUSED:
            table[f"{ours}attention.{our_name}{suffix}"] = f"{theirs}attention.query_key_value.{part}"
        table[f"{ours}attention.output{suffix}"] = f"{theirs}attention.dense.{part}"
        table[f"{ours}feed_forward.up.{part}"] = f"{theirs}mlp.dense_h_to_4h.{part}"
        table[f"{ours}feed_forward.down.{part}"] = f"{theirs}mlp.dense_4h_to_h.{part}"
        table[f"{ours}attention_norm.{part}"] = f"{theirs}input_layernorm.{part}"
        table[f"{ours}feed_forward_norm.{part}"] = f"{theirs}post_attention_layernorm.{part}"
        table[f"final_norm.{part}"] = f"gpt_neox.final_layer_norm.{part}"
    return table | {"scalar_head.weight": "score.weight"}


def _phi3() -> dict[str, str]:
    """Returns our names -> theirs for Phi-3: those of Llama, but one for queries, keys and values, and one for gate and
    up."""
    table = _stack("gate_up_proj", "down_proj")
    table["blocks.N.feed_forward.gate.weight"] = table["blocks.N.feed_forward.up.weight"]
    return table | {f"blocks.N.attention.{name}": "model.layers.N.self_attn.qkv_proj.weight" for name in FUSED}


def _olmo2() -> dict[str, str]:
    """Returns our names -> theirs for OLMo 2: those of Llama, but for norms, which stand behind what they normalise."""
    table = _stack("up_proj", "down_proj")
    table["blocks.N.attention_norm.weight"] = "model.layers.N.post_attention_layernorm.weight"
    table["blocks.N.feed_forward_norm.weight"] = "model.layers.N.post_feedforward_layernorm.weight"
    return table


NAMES = {
    "Llama": _stack("up_proj", "down_proj"),
    "Qwen2": _stack("up_proj", "down_proj"),
    "Qwen3": _stack("up_proj", "down_proj"),
    "Arcee": _stack("up_proj", "down_proj"),
    "Starcoder2": _stack("c_fc", "c_proj"),
    "GPTNeoX": _gpt_neox(),
    "Mistral": _stack("up_proj", "down_proj"),
    "Ministral": _stack("up_proj", "down_proj"),
    "SmolLM3": _stack("up_proj", "down_proj"),
    "Granite": _stack("up_proj", "down_proj"),
    "Olmo2": _olmo2(),
    "Phi3": _phi3(),
}
ALIASES = {"lm_head.weight": "embed_out.weight"}  # newer names of transformers -> the names that we write
# Older versions stored these tensors, which are computed from config.json.
BUFFERS = re.compile(r".*\.(rotary_emb\.inv_freq|attention\.(bias|masked_bias))")


@dataclass(frozen=True)
class Converted:
    """A tensor of theirs and the tensors of ours that it holds."""

    name: str  # theirs
    shape: Shape  # theirs
    ours: tuple[str, ...]  # names of our tensors
    shapes: tuple[Shape, ...]  # shapes of our tensors
    interleaved: bool = False  # several: those of a head follow each other; False: each is whole, and then the next

    @property
    def is_transposed(self) -> bool:
        """Whether it is the output of attention: ours is (H, K, D), theirs (D, H * K)."""
        return self.ours[0].endswith("attention.output")

    def rows(self, index: int) -> slice:
        """Returns the rows of their tensor that hold our tensor with this index in `ours`; not if interleaved."""
        counts = [math.prod(shape) // math.prod(self.shape[1:]) for shape in self.shapes[: index + 1]]
        return slice(sum(counts[:-1]), sum(counts))

    def to_theirs(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns their tensor, of shape `shape`, from our whole, unpadded tensors in the order of `ours`.

        Dtype and device stay; the result may share memory with ours.
        """
        if self.interleaved:  # (H, 3, K, ...): for each head its query, key and value
            return torch.stack(tuple(tensors), dim=1).reshape(self.shape)
        if len(tensors) > 1:
            return torch.cat([tensor.reshape(-1, *self.shape[1:]) for tensor in tensors])

        (tensor,) = tensors
        if self.is_transposed:
            return tensor.flatten(0, 1).t().contiguous()
        return tensor.reshape(self.shape)

    def to_ours(self, tensor: torch.Tensor, index: int = 0) -> torch.Tensor:
        """Returns our tensor with this index in `ours`, from their whole tensor.

        Dtype and device stay; the result may share memory with theirs.
        """
        shape = self.shapes[index]
        if self.interleaved:
            return tensor.view(shape[0], len(self.ours), *shape[1:])[:, index].contiguous()
        if len(self.ours) > 1:
            return tensor[self.rows(index)].reshape(shape)
        if self.is_transposed:
            return tensor.t().contiguous().view(shape)
        return tensor.reshape(shape)


def converted(architecture: Architecture, shapes: Mapping[str, Shape]) -> list[Converted]:
    """Returns the tensors of theirs that hold a model, in the order of the first of our parameters in each.

    Args:
        shapes: whole, unpadded shapes of our parameters by name, in the order of the model. Their models have no bias
            of a scalar head, so ours is left out; any other name that the table lacks is an AssertionError.
    """
    # Several names of ours map to one of theirs where their tensor is fused.
    our_names: dict[str, list[str]] = {}  # their name -> our names
    for name in shapes:
        # Only the pattern of a layer has an N, which the number of the layer replaces.
        number = name.split(".")[1]
        pattern = NAMES[architecture.family].get(re.sub(r"^blocks\.\d+\.", "blocks.N.", name))
        if pattern is None:
            assert name == "scalar_head.bias", name
            continue
        our_names.setdefault(pattern.replace(".N.", f".{number}."), []).append(name)
    interleaves = architecture.family in INTERLEAVED
    return [_converted(theirs, tuple(ours), shapes, interleaves) for theirs, ours in our_names.items()]


def _converted(theirs: str, ours: tuple[str, ...], shapes: Mapping[str, Shape], interleaves: bool) -> Converted:
    """Returns the tensor called `theirs`, with its shape, that holds our tensors `ours`.

    Args:
        shapes: as in `converted`.
        interleaves: whether several tensors of ours stand in it head by head.
    """
    our_shapes = tuple(shapes[name] for name in ours)
    name, shape = ours[0], our_shapes[0]
    # A linear layer of theirs is (output, input); of ours, only the output of attention is (input, output).
    if name.endswith("attention.output"):
        shape = (shape[2], shape[0] * shape[1])
    elif ".attention." in name and name.endswith(FUSED + tuple(f"{part}_bias" for part in FUSED)):
        shape = (sum(heads * width for heads, width, *_ in our_shapes), *shape[2:])
    elif name.endswith(("query_norm.weight", "key_norm.weight")):
        shape = (math.prod(shape),)
    elif len(ours) > 1:
        shape = (sum(rows for rows, *_ in our_shapes), *shape[1:])
    return Converted(theirs, shape, ours, our_shapes, interleaves and len(ours) > 1)


def to_theirs(
    architecture: Architecture, shapes: Mapping[str, Shape], state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Returns whole, unpadded weights of ours as a state dict of theirs.

    `shapes` is that of `converted`; `state` holds our parameters by name.
    """
    tensors = converted(architecture, shapes)
    return {tensor.name: tensor.to_theirs([state[name] for name in tensor.ours]) for tensor in tensors}
