"""Placement of every parameter, without torch: the dimension that tensor parallelism cuts, the one FSDP cuts, padding.

FSDP and tensor parallelism cut different dimensions, so no dimension is cut twice. Norms and biases are the same on all
tensor-parallel ranks; a module slices a bias when it needs a part.
"""

import math
from dataclasses import dataclass, replace

from dist_lm.config.model import ModelConfig
from dist_lm.model.size import Shape, parameter_shapes
from dist_lm.parallel.layout import Layout

UNIT_BYTES = 8 << 20  # starting a smaller message takes longer than moving it
KEPT_BYTES = 64 << 20  # gathered blocks up to this size are kept: gathering them again costs more than it saves
# Replicated parameters that every tp rank applies to the whole residual stream: without sequence parallelism each rank
# has the whole gradient. The norms of queries and keys are not among them: a rank applies those to its own heads.
WHOLE_GRADIENT = (
    *("attention_norm.weight", "feed_forward_norm.weight", "final_norm.weight"),
    *("norm.bias", "output_bias", "down.bias"),
)
ALWAYS_WHOLE_GRADIENT = ("scalar_head.bias",)  # added where every rank has all tokens


@dataclass(frozen=True)
class Placement:
    """One parameter on the mesh."""

    logical: Shape
    padded: Shape  # the tp dimension rounded up to a multiple of tp
    tp_dim: int | None  # cut by tensor parallelism; None: replicated
    fsdp_dim: int  # cut by dp_shard

    def whole(self, layout: Layout) -> int:
        """Elements that one tensor-parallel rank computes with."""
        return math.prod(self.padded) // (1 if self.tp_dim is None else layout.tp)

    def gathered(self, layout: Layout) -> int:
        """Elements that FSDP gathers for it, with the padding of FSDP."""
        return math.prod(self.local(layout)) * layout.dp_shard

    def local(self, layout: Layout) -> Shape:
        """Shape of the largest shard."""
        shape = list(self.padded)
        if self.tp_dim is not None:
            shape[self.tp_dim] //= layout.tp
        shape[self.fsdp_dim] = -(-shape[self.fsdp_dim] // layout.dp_shard)
        return tuple(shape)


@dataclass(frozen=True)
class Slice:
    """The part of a dimension that one tensor-parallel rank works on."""

    start: int
    real: int  # entries of the logical tensor
    held: int  # entries with padding; equal on all ranks

    @property
    def stop(self) -> int:
        return self.start + self.real


def slice_of(size: int, tp: int, rank: int) -> Slice:
    """Rank `rank`'s part of a dimension of `size`, cut over `tp` ranks as `torch.chunk` cuts."""
    held = -(-size // tp)
    start = min(rank * held, size)
    return Slice(start, min(held, size - start), held)


def shards_key_heads(model: ModelConfig, tp: int) -> bool:
    """Whether the query heads of a rank form whole groups, so that key and value heads are cut the same way.

    Otherwise every rank holds all key and value heads (grouped-query attention has few) and computes those it reads.
    """
    return slice_of(model.n_heads, tp, 0).held % (model.n_heads // model.kv_heads) == 0


def keys_of(model: ModelConfig, tp: int, rank: int) -> tuple[Slice, list[int]]:
    """The key/value heads of a rank, and the number of its query heads that read each (empty: equal numbers)."""
    if shards_key_heads(model, tp):
        return slice_of(model.kv_heads, tp, rank), []
    read = keys_read(model, tp, rank)
    first, count = read[0], read[-1] - read[0] + 1
    queries = [read.count(first + index) for index in range(count)]
    return Slice(first, count, count), [] if len(set(queries)) == 1 else queries


def keys_read(model: ModelConfig, tp: int, rank: int) -> list[int]:
    """The key/value head that each query head of a rank reads; padded query heads read any, and their output is cut
    off."""
    heads, group = slice_of(model.n_heads, tp, rank), model.n_heads // model.kv_heads
    return [min(head, model.n_heads - 1) // group for head in range(heads.start, heads.start + heads.held)]


def placements(model: ModelConfig, layout: Layout) -> dict[str, Placement]:
    """Placement of every parameter, by name, in the order of `Transformer.named_parameters()`."""
    return {name: _placement(name, shape, model, layout) for name, shape in parameter_shapes(model).items()}


def one_block(model: ModelConfig, layout: Layout) -> tuple[list[Placement], list[Placement]]:
    """Placements of (the parameters of one block, the parameters outside blocks); all blocks are alike."""
    of_all = placements(replace(model, n_layers=1), layout)
    block = [placement for name, placement in of_all.items() if name.startswith("blocks.")]
    return block, [placement for name, placement in of_all.items() if not name.startswith("blocks.")]


def blocks_per_unit(model: ModelConfig, layout: Layout, element_bytes: int) -> int:
    """Number of consecutive blocks that FSDP gathers in one message, so that messages reach UNIT_BYTES."""
    return min(model.n_layers, -(-UNIT_BYTES // (_gathered_block(model, layout) * element_bytes)))


def reshards(asked: bool | None, model: ModelConfig, layout: Layout, element_bytes: int) -> bool:
    """Whether the parameters of a block are freed after its forward pass and gathered again for its backward pass."""
    if asked is not None:
        return asked
    return _gathered_block(model, layout) * model.n_layers * element_bytes > KEPT_BYTES


def _gathered_block(model: ModelConfig, layout: Layout) -> int:
    """Elements of a block that FSDP has gathered."""
    return sum(placement.gathered(layout) for placement in one_block(model, layout)[0])


def partial_gradients(model: ModelConfig, layout: Layout, sp: bool) -> list[str]:
    """Names of the replicated parameters whose gradients must be summed over tp, as each rank has a part of them."""
    return [
        name
        for name, placement in placements(model, layout).items()
        if layout.tp > 1
        and placement.tp_dim is None
        and (sp or not name.endswith(WHOLE_GRADIENT))
        and not name.endswith(ALWAYS_WHOLE_GRADIENT)
    ]


def _placement(name: str, shape: Shape, model: ModelConfig, layout: Layout) -> Placement:
    if layout.tp == 1:
        return Placement(shape, shape, None, _fsdp_dim(shape, layout.dp_shard))
    if len(shape) == 1 or name.endswith("_bias") or (_reads_keys(name) and not shards_key_heads(model, layout.tp)):
        return Placement(shape, shape, None, 2 if len(shape) == 3 else 0)
    tp_dim = 1 if name.endswith("down.weight") else 0
    padded = list(shape)
    padded[tp_dim] = slice_of(shape[tp_dim], layout.tp, 0).held * layout.tp
    return Placement(shape, tuple(padded), tp_dim, 2 if len(shape) == 3 else 1 - tp_dim)


def _reads_keys(name: str) -> bool:
    return name.endswith(("attention.key", "attention.value"))


def _fsdp_dim(shape: Shape, ranks: int) -> int:
    """The dimension d_model of attention weights (n_heads, d_head, d_model), if `ranks` divides it; else dimension 0.

    FSDP cuts unevenly on dimension 0 only, and usual numbers of ranks do not divide the number of heads.
    """
    return 2 if len(shape) == 3 and shape[2] % ranks == 0 else 0
