"""The mesh and the placement of parameters as numbers, computed without any process group or torch.

A layout says how many ranks each axis of the mesh has, and which layouts fit a model and a number of ranks. A placement
says which dimension of a parameter tensor parallelism cuts, which one FSDP cuts, and the padding. The two cut different
dimensions, so no dimension is cut twice. Norms and biases are the same on all tensor-parallel ranks; a module slices a
bias when it needs a part.
"""

import math
from dataclasses import dataclass, replace
from operator import attrgetter

from dist_lm.config.model import ModelConfig
from dist_lm.config.parallel import ParallelConfig
from dist_lm.config.root import Config
from dist_lm.errors import ConfigError
from dist_lm.model.size import ADAPTERS, Shape, is_trained, parameter_shapes

AXES = ("dp_replicate", "dp_shard", "tp")
LISTED_LAYOUTS = 12  # in an error message
HEAD_PADDING = 1.25  # `head_padding` above which replicas are better than shards


@dataclass(frozen=True)
class Layout:
    """Number of ranks on each axis of the mesh, outermost axis first."""

    dp_replicate: int
    dp_shard: int
    tp: int

    @property
    def dp(self) -> int:
        """Number of ranks that see different data."""
        return self.dp_replicate * self.dp_shard

    @property
    def world_size(self) -> int:
        return self.dp * self.tp

    @classmethod
    def recorded(cls, parallel: ParallelConfig) -> "Layout":
        """The layout of a resolved `parallel` group, in which no axis is -1."""
        layout = cls(parallel.dp_replicate, parallel.dp_shard, parallel.tp)
        assert min(layout.dp_replicate, layout.dp_shard, layout.tp) > 0, f"{layout} is not resolved"
        return layout

    def __str__(self) -> str:
        return f"dp_replicate={self.dp_replicate} dp_shard={self.dp_shard} tp={self.tp}"


def started_layout(config: Config) -> Layout | None:
    """The layout for which a run recorded `config` when its ranks were started; None if no ranks were started yet."""
    parallel, cluster = config.parallel, config.cluster
    if parallel.auto or -1 in (parallel.dp_replicate, parallel.dp_shard, parallel.tp, cluster.ranks_per_node):
        return None
    layout = Layout.recorded(parallel)
    return layout if layout.world_size == cluster.nodes * cluster.ranks_per_node else None


def resolve_layout(parallel: ParallelConfig, model: ModelConfig, world_size: int) -> Layout:
    """The layout that `parallel` asks for on `world_size` ranks, with values for -1 that fit.

    If dp_replicate and dp_shard are both -1, dp_shard takes as many ranks as the model allows, and the rest are
    replicas: with tensor parallelism dp_shard must divide d_model, without it `head_padding` must be small.

    Raises:
        ConfigError: the product of the axes is not `world_size`, or the model cannot be cut that way; the message lists
            layouts that fit.
    """
    asked = " ".join(f"parallel.{name}={getattr(parallel, name)}" for name in AXES)
    layout = _filled(parallel, model, world_size)
    if layout is None:
        raise ConfigError(
            f"{asked}: the product is not {world_size} ranks (cluster.nodes x cluster.ranks_per_node); "
            f"(dp_replicate, dp_shard, tp) that fit: {_fitting(model, world_size)}"
        )
    reason = misfit(layout, model)
    if reason:
        fitting = _fitting(model, world_size)
        raise ConfigError(f"{asked}: {reason}; (dp_replicate, dp_shard, tp) that fit {world_size} ranks: {fitting}")
    if parallel.sp and layout.tp == 1:
        raise ConfigError(f"parallel.sp=true: expected parallel.tp > 1 to split sequences over; the layout is {layout}")
    return layout


def misfit(layout: Layout, model: ModelConfig) -> str | None:
    """The reason why `model` does not fit `layout`; None if it fits."""
    if layout.tp > model.n_heads:
        return f"tp={layout.tp} is more than model.n_heads={model.n_heads}"
    if -(-model.vocab_size // layout.tp) * (layout.tp - 1) >= model.vocab_size:
        return f"tp={layout.tp} leaves a rank without a part of model.vocab_size={model.vocab_size}"
    if layout.tp > 1 and model.d_model % layout.dp_shard:
        return (
            f"with tensor parallelism dp_shard={layout.dp_shard} must divide model.d_model={model.d_model} "
            "(use dp_replicate for the rest)"
        )
    return None


def head_padding(layout: Layout, model: ModelConfig) -> float:
    """Elements of attention weights that FSDP gathers, with padding, per element without padding.

    FSDP cuts attention weights along d_model. If dp_shard does not divide d_model, it cuts along the heads, because it
    cuts unevenly on dimension 0 only: 25 heads over 128 ranks are padded to 128.
    """
    if layout.tp > 1 or model.d_model % layout.dp_shard == 0:
        return 1.0
    heads = (model.n_heads, model.kv_heads)
    return sum(-(-count // layout.dp_shard) * layout.dp_shard for count in heads) / sum(heads)


def layouts_of(model: ModelConfig, world_size: int) -> list[Layout]:
    """All layouts of `world_size` ranks that fit the model with little padding, by tp, then by dp_replicate."""
    return [
        layout
        for tp in divisors(world_size)
        for replicate in divisors(world_size // tp)
        if _cuts_well(layout := Layout(replicate, world_size // tp // replicate, tp), model)
    ]


def check_batch(config: Config, layout: Layout) -> None:
    """Refuse a global batch or a sequence length that the ranks cannot share equally.

    Raises:
        ConfigError: names the key and the nearest values that fit.
    """
    if config.sequence_keys is None:
        return
    batch_key, seq_len_key = config.sequence_keys
    batch, seq_len = attrgetter(batch_key, seq_len_key)(config)
    if batch % layout.dp:
        near = _nearest(batch, layout.dp)
        raise ConfigError(
            f"{batch_key}={batch}: expected a multiple of the {layout.dp} data-parallel ranks, such as {near}"
        )
    if config.parallel.sp and seq_len % layout.tp:
        near = _nearest(seq_len, layout.tp)
        raise ConfigError(
            f"{seq_len_key}={seq_len}: with parallel.sp=true expected a multiple of tp={layout.tp}, such as {near}"
        )


def divisors(number: int) -> list[int]:
    """All divisors of `number`, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _cuts_well(layout: Layout, model: ModelConfig) -> bool:
    return not misfit(layout, model) and head_padding(layout, model) <= HEAD_PADDING


def _filled(parallel: ParallelConfig, model: ModelConfig, world_size: int) -> Layout | None:
    """The layout with all -1 replaced; None if no whole number fits."""
    axes = {name: getattr(parallel, name) for name in AXES}
    open_axes = [name for name in AXES if axes[name] == -1]
    if "tp" in open_axes and len(open_axes) > 1:
        raise ConfigError(
            f"{' '.join(f'parallel.{name}=-1' for name in open_axes)}: expected -1 for tp alone, or for the dp axes"
        )
    fixed = 1
    for name in AXES:
        fixed *= 1 if name in open_axes else axes[name]
    if world_size % fixed or (not open_axes and fixed != world_size):
        return None
    left = world_size // fixed
    if open_axes == ["dp_replicate", "dp_shard"]:
        fits = [d for d in divisors(left) if _cuts_well(Layout(left // d, d, axes["tp"]), model)]
        axes["dp_shard"] = max(fits, default=left)
        axes["dp_replicate"] = left // axes["dp_shard"]
    else:
        axes |= dict.fromkeys(open_axes, left)
    return Layout(**axes)


def _fitting(model: ModelConfig, world_size: int) -> str:
    found = layouts_of(model, world_size)
    shown = ", ".join(f"({x.dp_replicate}, {x.dp_shard}, {x.tp})" for x in found[:LISTED_LAYOUTS])
    return shown + (f" and {len(found) - LISTED_LAYOUTS} more" if len(found) > LISTED_LAYOUTS else "")


def _nearest(value: int, factor: int) -> str:
    lower, upper = value // factor * factor, (value // factor + 1) * factor
    return f"{lower} or {upper}" if lower else f"{upper}"


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


def has_units_outside(model: ModelConfig, layout: Layout, element_bytes: int) -> bool:
    """Whether FSDP gathers the embedding by itself, and the head with the final norm. Otherwise all three are gathered
    together, before the first block, and their gradients are reduced together, after it: nothing hides that."""
    if model.tie_embeddings or model.head != "tokens":
        return False
    held = placements(replace(model, n_layers=1), layout)["embedding.weight"].gathered(layout)
    return held * element_bytes >= UNIT_BYTES


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
        and is_trained(name, model)
        and (sp or not name.endswith(WHOLE_GRADIENT))
        and not name.endswith(ALWAYS_WHOLE_GRADIENT)
    ]


def _placement(name: str, shape: Shape, model: ModelConfig, layout: Layout) -> Placement:
    if ADAPTERS in name:
        return _factor_placement(name, shape, model, layout)
    if layout.tp == 1:
        return Placement(shape, shape, None, _fsdp_dim(shape, layout.dp_shard))
    if len(shape) == 1 or name.endswith("_bias") or (_reads_keys(name) and not shards_key_heads(model, layout.tp)):
        return Placement(shape, shape, None, 2 if len(shape) == 3 else 0)
    tp_dim = 1 if name.endswith("down.weight") else 0
    padded = list(shape)
    padded[tp_dim] = slice_of(shape[tp_dim], layout.tp, 0).held * layout.tp
    return Placement(shape, tuple(padded), tp_dim, 2 if len(shape) == 3 else 1 - tp_dim)


def _factor_placement(name: str, shape: Shape, model: ModelConfig, layout: Layout) -> Placement:
    """A factor (rank, ...) of an adapter: tp cuts it along the dimension of heads or hidden units, if it has it."""
    weight, factor = name.split(ADAPTERS)[1].split(".")
    last = len(shape) - 1
    everywhere = weight in ("key", "value") and not shards_key_heads(model, layout.tp)
    if layout.tp == 1 or factor != ("a" if weight in ("output", "down") else "b") or everywhere:
        return Placement(shape, shape, None, last if shape[last] % layout.dp_shard == 0 else 0)
    padded = (shape[0], slice_of(shape[1], layout.tp, 0).held * layout.tp, *shape[2:])
    return Placement(shape, padded, 1, last if last > 1 and shape[last] % layout.dp_shard == 0 else 0)


def _reads_keys(name: str) -> bool:
    return name.endswith(("attention.key", "attention.value"))


def _fsdp_dim(shape: Shape, ranks: int) -> int:
    """The dimension d_model of attention weights (n_heads, d_head, d_model), if `ranks` divides it; else dimension 0.

    FSDP cuts unevenly on dimension 0 only, and usual numbers of ranks do not divide the number of heads.
    """
    return 2 if len(shape) == 3 and shape[2] % ranks == 0 else 0
