"""The mesh and the placement of parameters as numbers, computed without any process group or torch.

A layout says how many ranks each axis of the mesh has, and which layouts fit a model and a number of ranks. A placement
says which dimension of a parameter tensor parallelism cuts, which one FSDP cuts, and the padding. The two cut different
dimensions, so no dimension is cut twice. Norms and biases are the same on all tensor-parallel ranks; a module slices a
bias when it needs a part.
"""

import math
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from dist_lm.config.cluster import ParallelConfig
from dist_lm.config.model import ModelConfig
from dist_lm.config.root import Config
from dist_lm.errors import ConfigError
from dist_lm.model.size import ADAPTERS, Shape, is_trained, parameter_shapes

AXES = ("dp_replicate", "dp_shard", "tp", "cp")
PARAMETER_AXES = ("dp_replicate", "dp_shard", "tp")
"""The axes of meshes of parameters: their dp_shard has the ranks of cp, too."""

LISTED_LAYOUTS = 12  # most layouts listed in an error message
MAX_HEAD_PADDING = 1.25  # with more `head_padding`, replicas are better than shards


@dataclass(frozen=True)
class Layout:
    """Number of ranks on each axis of the mesh. From the outermost axis they are dp_replicate, dp_shard, cp and tp.

    Ranks of a cp group share parameters, gradients and optimizer state as those of dp_shard do, but see the same data.
    """

    dp_replicate: int
    dp_shard: int
    tp: int
    cp: int = 1

    @property
    def dp(self) -> int:
        """Number of ranks that see different data."""
        return self.dp_replicate * self.dp_shard

    @property
    def shards(self) -> int:
        """Number of ranks among which FSDP splits a parameter, or its tensor-parallel part."""
        return self.dp_shard * self.cp

    @property
    def reducing(self) -> int:
        """Number of ranks that add up their gradients of a parameter, or of its tensor-parallel part."""
        return self.dp * self.cp

    @property
    def of_parameters(self) -> "Layout":
        """The same ranks as parameters see them: those of a cp group are among those of dp_shard."""
        return Layout(self.dp_replicate, self.shards, self.tp)

    @property
    def world_size(self) -> int:
        return self.dp * self.cp * self.tp

    @classmethod
    def recorded(cls, parallel: ParallelConfig) -> "Layout":
        """Returns the layout of a resolved `parallel` group, in which no axis is -1."""
        layout = cls(parallel.dp_replicate, parallel.dp_shard, parallel.tp, parallel.cp)
        assert min(layout.dp_replicate, layout.dp_shard, layout.tp) > 0, f"{layout} is not resolved"
        return layout

    def __str__(self) -> str:
        axes = f"dp_replicate={self.dp_replicate} dp_shard={self.dp_shard} tp={self.tp}"
        return axes if self.cp == 1 else f"{axes} cp={self.cp}"


def started_layout(config: Config) -> Layout | None:
    """The layout for which a run recorded `config` when its ranks were started; None if no ranks were started yet."""
    parallel, cluster = config.parallel, config.cluster
    if parallel.auto or -1 in (parallel.dp_replicate, parallel.dp_shard, parallel.tp, cluster.ranks_per_node):
        return None
    layout = Layout.recorded(parallel)
    return layout if layout.world_size == cluster.nodes * cluster.ranks_per_node else None


def resolve_layout(parallel: ParallelConfig, model: ModelConfig, world_size: int) -> Layout:
    """Returns the layout that `parallel` asks for on `world_size` ranks, with values for -1 that fit.

    If dp_replicate and dp_shard are both -1, dp_shard takes as many ranks as the model allows, and the rest are
    replicas: with tensor parallelism dp_shard must divide d_model, without it `head_padding` must be small.

    Raises:
        ConfigError: the product of the axes is not `world_size`, the model cannot be cut that way (the message lists
            layouts that fit), tp and another axis are -1, or parallel.sp without tensor parallelism.
    """
    requested_axes = [name for name in AXES if name != "cp" or parallel.cp > 1]
    requested = " ".join(f"parallel.{name}={getattr(parallel, name)}" for name in requested_axes)
    layout = _fill_open_axes(parallel, model, world_size)
    if layout is None:
        raise ConfigError(
            f"{requested}: the product is not {world_size} ranks (cluster.nodes x cluster.ranks_per_node); "
            f"({', '.join(requested_axes)}) that fit: {_list_layouts(model, world_size, parallel.cp)}"
        )

    # The product fits the ranks, but the model may not be split that way.
    reason = misfit(layout, model)
    if reason:
        fitting = _list_layouts(model, world_size, parallel.cp)
        raise ConfigError(
            f"{requested}: {reason}; ({', '.join(requested_axes)}) that fit {world_size} ranks: {fitting}"
        )
    if parallel.sp and layout.tp == 1:
        raise ConfigError(f"parallel.sp=true: expected parallel.tp > 1 to split sequences over; the layout is {layout}")
    return layout


def misfit(layout: Layout, model: ModelConfig) -> str | None:
    """Returns the reason why `model` does not fit `layout`, as a part of a message; None if it fits."""
    # Blocks of 64 entries share a scale, across the dimensions that ranks would cut.
    if model.is_in_4bit and layout.shards * layout.tp > 1:
        axis = next(name for name in ("tp", "dp_shard", "cp") if getattr(layout, name) > 1)
        axis += f"={getattr(layout, axis)}"
        return (
            f"stage.lora.load_in_4bit=true keeps the whole base on every rank, so {axis} must be 1 (use dp_replicate)"
        )

    # A rank without a single head, or without a part of the vocabulary, would have an empty shard.
    if layout.tp > model.n_heads:
        return f"tp={layout.tp} is more than model.n_heads={model.n_heads}"
    if -(-model.vocab_size // layout.tp) * (layout.tp - 1) >= model.vocab_size:
        return f"tp={layout.tp} leaves a rank without a part of model.vocab_size={model.vocab_size}"

    # FSDP splits unevenly on dimension 0 only, and there tensor parallelism has split already.
    if layout.tp > 1 and model.d_model % layout.shards:
        shards = f"dp_shard={layout.dp_shard}" if layout.cp == 1 else f"dp_shard x cp={layout.shards}"
        return (
            f"with tensor parallelism {shards} must divide model.d_model={model.d_model} "
            "(use dp_replicate for the rest)"
        )

    # The ranks of a cp group attend with some of the heads each; tp pads all its ranks to equally many.
    heads = rank_slice(model.n_heads, layout.tp, 0).held
    if layout.cp > heads:
        return f"cp={layout.cp} is more than the {heads} heads of a rank"
    return None


def head_padding(layout: Layout, model: ModelConfig) -> float:
    """Returns the elements of attention weights that FSDP gathers, with padding, per element without padding.

    FSDP cuts attention weights along d_model. If the number of shards does not divide d_model, it cuts along the heads,
    because it cuts unevenly on dimension 0 only: 25 heads over 128 ranks are padded to 128.
    """
    if layout.tp > 1 or model.d_model % layout.shards == 0:
        return 1.0
    heads = (model.n_heads, model.kv_heads)
    return sum(-(-count // layout.shards) * layout.shards for count in heads) / sum(heads)


def layouts_of(model: ModelConfig, world_size: int, cp: int = 1) -> list[Layout]:
    """Lists all layouts of `world_size` ranks with this `cp` that fit the model with little padding, by tp, then by
    dp_replicate."""
    if world_size % cp:
        return []
    n_groups = world_size // cp
    return [
        layout
        for tp in divisors(n_groups)
        for replicate in divisors(n_groups // tp)
        if _splits_well(layout := Layout(replicate, n_groups // tp // replicate, tp, cp), model)
    ]


def check_batch(config: Config, layout: Layout) -> None:
    """Refuses a global batch or, with parallel.sp, a sequence length that the ranks cannot share equally. A stage
    without sequences passes.

    Raises:
        ConfigError: names the key and the nearest values that fit.
    """
    # A stage without sequences has no global batch to share.
    if config.sequence_keys is None:
        return
    batch_key, seq_len_key = config.sequence_keys
    global_batch, seq_len = attrgetter(batch_key, seq_len_key)(config)

    if global_batch % layout.dp:
        near = _nearest_multiples(global_batch, layout.dp)
        raise ConfigError(
            f"{batch_key}={global_batch}: expected a multiple of the {layout.dp} data-parallel ranks, such as {near}"
        )
    # Ranks of a cp group have equal parts of the tokens, and with sp those of a tp group of that part.
    splits = [("cp", "context parallelism", layout.cp)] * (layout.cp > 1)
    splits += [("tp", "parallel.sp=true", layout.tp)] * config.parallel.sp
    factor = math.prod(ranks for *_, ranks in splits)
    if seq_len % factor:
        reasons = " and ".join(reason for _, reason, _ in splits)
        factors = " x ".join(f"{axis}={ranks}" for axis, _, ranks in splits)
        near = _nearest_multiples(seq_len, factor)
        raise ConfigError(f"{seq_len_key}={seq_len}: with {reasons} expected a multiple of {factors}, such as {near}")


def divisors(number: int) -> list[int]:
    """Lists all divisors of `number`, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _splits_well(layout: Layout, model: ModelConfig) -> bool:
    return not misfit(layout, model) and head_padding(layout, model) <= MAX_HEAD_PADDING


def _fill_open_axes(parallel: ParallelConfig, model: ModelConfig, world_size: int) -> Layout | None:
    """Returns the layout with all -1 replaced; None if no whole number fits the ranks, or the product is another
    number. The model need not fit the layout.

    Raises:
        ConfigError: tp and another axis are -1.
    """
    axes = {name: getattr(parallel, name) for name in AXES}
    open_axes = [name for name in AXES if axes[name] == -1]
    # Every split between tp and dp would fit, so there is nothing to derive tp from.
    if "tp" in open_axes and len(open_axes) > 1:
        raise ConfigError(
            f"{' '.join(f'parallel.{name}=-1' for name in open_axes)}: expected -1 for tp alone, or for the dp axes"
        )

    fixed_ranks = math.prod(axes[name] for name in AXES if name not in open_axes)
    if world_size % fixed_ranks or (not open_axes and fixed_ranks != world_size):
        return None
    open_ranks = world_size // fixed_ranks

    if open_axes != ["dp_replicate", "dp_shard"]:
        return Layout(**axes | dict.fromkeys(open_axes, open_ranks))

    # Shards need less memory than replicas, so shard as far as the model allows.
    tp, cp = axes["tp"], axes["cp"]
    fitting = [d for d in divisors(open_ranks) if _splits_well(Layout(open_ranks // d, d, tp, cp), model)]
    dp_shard = max(fitting, default=open_ranks)
    return Layout(open_ranks // dp_shard, dp_shard, tp, cp)


def _list_layouts(model: ModelConfig, world_size: int, cp: int) -> str:
    """Returns the layouts with this `cp` for people: (dp_replicate, dp_shard, tp), and cp if it is not 1. If there are
    none, returns those with another cp."""
    layouts = layouts_of(model, world_size, cp)
    prefix = ""
    if not layouts and cp > 1:
        layouts = [layout for other_cp in divisors(world_size) for layout in layouts_of(model, world_size, other_cp)]
        prefix = f"none with cp={cp}, but "
    if not layouts:
        return "none"

    listed = prefix + ", ".join(
        f"({layout.dp_replicate}, {layout.dp_shard}, {layout.tp}{'' if cp == 1 else f', {layout.cp}'})"
        for layout in layouts[:LISTED_LAYOUTS]
    )
    if len(layouts) > LISTED_LAYOUTS:
        listed += f" and {len(layouts) - LISTED_LAYOUTS} more"
    return listed


def _nearest_multiples(number: int, factor: int) -> str:
    lower = number // factor * factor
    upper = lower + factor
    if lower == 0:
        return f"{upper}"
    return f"{lower} or {upper}"


UNIT_BYTES = 8 << 20  # starting a smaller message takes longer than moving it
FREED_BYTES = 64 << 20  # smaller models stay gathered: gathering their blocks again costs more than it saves

# Replicated parameters that every tp rank applies to all of the residual stream: without sequence parallelism each rank
# has the complete gradient. The norms of queries and keys are not among them: a rank applies those to its own heads.
COMPLETE_GRADIENT = (
    *("attention_norm.weight", "feed_forward_norm.weight", "final_norm.weight"),
    *("norm.bias", "output_bias", "down.bias"),
)
ALWAYS_COMPLETE_GRADIENT = ("scalar_head.bias",)  # added where every rank has all tokens


@dataclass(frozen=True)
class Placement:
    """Says how one parameter is split on the mesh."""

    logical: Shape
    padded: Shape  # the tp dimension rounded up to a multiple of tp
    tp_dim: int | None  # split by tensor parallelism; None: replicated
    fsdp_dim: int  # split by FSDP

    def whole(self, layout: Layout) -> int:
        """Returns the number of elements that one tensor-parallel rank computes with."""
        n_shards = 1 if self.tp_dim is None else layout.tp
        return math.prod(self.padded) // n_shards

    def gathered(self, layout: Layout) -> int:
        """Returns the number of elements that FSDP gathers for the parameter, with the padding of FSDP."""
        return math.prod(self.local(layout)) * layout.shards

    def local(self, layout: Layout) -> Shape:
        """Returns the shape of the largest shard."""
        shape = list(self.padded)
        if self.tp_dim is not None:
            shape[self.tp_dim] //= layout.tp
        shape[self.fsdp_dim] = -(-shape[self.fsdp_dim] // layout.shards)
        return tuple(shape)


@dataclass(frozen=True)
class RankSlice:
    """The part of a dimension that one tensor-parallel rank works on."""

    start: int
    real: int  # entries of the logical tensor
    held: int  # entries with padding; equal on all ranks

    @property
    def stop(self) -> int:
        return self.start + self.real


def rank_slice(size: int, tp: int, rank: int) -> RankSlice:
    """Returns rank `rank`'s part of a dimension of `size`, split over `tp` ranks as `torch.chunk` splits it."""
    padded_size = -(-size // tp)
    start = min(rank * padded_size, size)
    return RankSlice(start, min(padded_size, size - start), padded_size)


def shards_key_heads(model: ModelConfig, tp: int) -> bool:
    """Returns whether key and value heads are split like query heads: the query heads of a rank are complete groups.

    Otherwise every rank holds all key and value heads (grouped-query attention has few) and computes those it reads.
    """
    return rank_slice(model.n_heads, tp, 0).held % (model.n_heads // model.kv_heads) == 0


def keys_of(model: ModelConfig, tp: int, rank: int) -> tuple[RankSlice, list[int]]:
    """Returns the key/value heads that a rank computes with, and how many of its query heads, padding included, read
    each (empty: equally many)."""
    if shards_key_heads(model, tp):
        return rank_slice(model.kv_heads, tp, rank), []

    # The boundary between ranks cuts through a group of query heads, so key heads may be read unequally often.
    read = keys_read(model, tp, rank)
    first = read[0]
    n_keys = read[-1] - first + 1
    n_queries = [read.count(first + index) for index in range(n_keys)]
    if len(set(n_queries)) == 1:
        n_queries = []
    return RankSlice(first, n_keys, n_keys), n_queries


def keys_read(model: ModelConfig, tp: int, rank: int) -> list[int]:
    """Returns the key/value head that each query head of a rank reads.

    A padded query head reads the last one; its output is cut off.
    """
    # Query head h reads key head h // group_size, as in `attention.attend`.
    heads, group_size = rank_slice(model.n_heads, tp, rank), model.n_heads // model.kv_heads
    return [min(head, model.n_heads - 1) // group_size for head in range(heads.start, heads.start + heads.held)]


def placements(model: ModelConfig, layout: Layout) -> dict[str, Placement]:
    """Returns the placement of every parameter, by name, in the order of `Transformer.named_parameters()`."""
    return {name: _placement(name, shape, model, layout) for name, shape in parameter_shapes(model).items()}


def distinct_placements(model: ModelConfig, layout: Layout) -> list[tuple[str, Placement, int]]:
    """Returns (name, placement, number of parameters with this placement) of the parameters outside blocks, those of
    the first block, and those of the second block, which count for all later blocks too.

    This saves time: a layout is chosen among thousands of candidates, and a large model has many blocks.
    """
    n_later = model.n_layers - 1
    return [
        (name, placement, n_later if name.startswith("blocks.1.") else 1)
        for name, placement in placements(model.at_layers(min(2, model.n_layers)), layout).items()
    ]


def one_block(model: ModelConfig, layout: Layout) -> tuple[list[Placement], list[Placement]]:
    """Returns placements of (the parameters of one block, the parameters outside blocks); all blocks are alike."""
    # One layer is enough, and a large model has many.
    by_name = placements(model.at_layers(1), layout)
    block = [placement for name, placement in by_name.items() if name.startswith("blocks.")]
    outside = [placement for name, placement in by_name.items() if not name.startswith("blocks.")]
    return block, outside


def blocks_per_unit(model: ModelConfig, layout: Layout, element_bytes: int) -> int:
    """Returns how many consecutive blocks FSDP gathers in one message, so that messages reach UNIT_BYTES; at most all.
    `element_bytes`: of the dtype that is gathered."""
    return min(model.n_layers, -(-UNIT_BYTES // (_gathered_block(model, layout) * element_bytes)))


def has_units_outside(model: ModelConfig, layout: Layout, element_bytes: int) -> bool:
    """Returns whether FSDP gathers the embedding by itself, and the head with the final norm: if the embedding takes
    UNIT_BYTES or more, is not tied, and the head gives tokens.

    Otherwise all three are gathered in one message before the first block, and their gradients are reduced in one
    message after its backward pass. No computation hides these messages.
    """
    # FSDP holds nothing of a base in four bits.
    if model.is_in_4bit:
        return False
    # A tied embedding is used before the first block and after the last, so it stays gathered with the root.
    if model.tie_embeddings or model.head != "tokens":
        return False
    embedding = placements(model.at_layers(1), layout)["embedding.weight"]
    return embedding.gathered(layout) * element_bytes >= UNIT_BYTES


def reshards(setting: bool | None, model: ModelConfig, layout: Layout, element_bytes: int) -> bool:
    """Returns whether the parameters of a block are freed after its forward pass and gathered again for its backward
    pass.

    Args:
        setting: `parallel.reshard_after_forward`; None: the size of the model decides.
    """
    if setting is not None:
        return setting
    return _gathered_block(model, layout) * model.n_layers * element_bytes > FREED_BYTES


def _gathered_block(model: ModelConfig, layout: Layout) -> int:
    """Returns the number of elements of a block after FSDP has gathered it: of a base in four bits only adapters."""
    return sum(
        placement.gathered(layout)
        for name, placement in placements(model.at_layers(1), layout).items()
        if name.startswith("blocks.") and (is_trained(name, model) or not model.is_in_4bit)
    )


def partial_gradients(model: ModelConfig, layout: Layout, sp: bool) -> list[str]:
    """Returns the names of the replicated trained parameters whose gradients must be summed over tp, because each rank
    has a part of them; empty without tensor parallelism.

    Args:
        sp: whether sequence parallelism is on; it makes the gradients of norms and most biases partial, too.
    """
    return [
        name
        for name, placement in placements(model, layout).items()
        if layout.tp > 1
        and placement.tp_dim is None
        and is_trained(name, model)
        and (sp or not name.endswith(COMPLETE_GRADIENT))
        and not name.endswith(ALWAYS_COMPLETE_GRADIENT)
    ]


def _placement(name: str, shape: Shape, model: ModelConfig, layout: Layout) -> Placement:
    """Returns the placement of the parameter `name` of logical `shape`."""
    if ADAPTERS in name:
        return _factor_placement(name, shape, model, layout)
    is_attention_weight = len(shape) == 3  # (heads, d_head, d_model)
    fsdp_dim = 2 if is_attention_weight else 0
    if layout.tp == 1:
        # FSDP splits unevenly on dimension 0 only, and usual numbers of ranks do not divide the number of heads.
        if is_attention_weight and shape[2] % layout.shards:
            fsdp_dim = 0
        return Placement(shape, shape, None, fsdp_dim)

    # Vectors and biases are replicated: a module slices a bias itself. So are key heads that ranks do not split.
    is_key = name.endswith(("attention.key", "attention.value"))
    if (
        len(shape) == 1
        or name.endswith(("_bias", "norm.weight"))
        or (is_key and not shards_key_heads(model, layout.tp))
    ):
        return Placement(shape, shape, None, fsdp_dim)

    # Dimension 0 has heads, hidden units or the vocabulary; only `down` has its hidden units second.
    tp_dim = 1 if name.endswith("down.weight") else 0
    padded = list(shape)
    padded[tp_dim] = rank_slice(shape[tp_dim], layout.tp, 0).held * layout.tp
    return Placement(shape, tuple(padded), tp_dim, fsdp_dim or 1 - tp_dim)  # FSDP splits a matrix the other way


def _factor_placement(name: str, shape: Shape, model: ModelConfig, layout: Layout) -> Placement:
    """Returns the placement of a factor (rank, ...) of an adapter: tp splits the dimension of heads or hidden units, if
    the factor has it."""
    weight, factor = name.split(ADAPTERS)[1].split(".")
    last = len(shape) - 1
    split_factor = "a" if weight in ("output", "down") else "b"
    is_replicated_key = weight in ("key", "value") and not shards_key_heads(model, layout.tp)

    if layout.tp == 1 or factor != split_factor or is_replicated_key:
        return Placement(shape, shape, None, last if shape[last] % layout.shards == 0 else 0)
    padded = (shape[0], rank_slice(shape[1], layout.tp, 0).held * layout.tp, *shape[2:])
    return Placement(shape, padded, 1, last if last > 1 and shape[last] % layout.shards == 0 else 0)


def resolved(parallel: ParallelConfig, layout: Layout, **changes: Any) -> ParallelConfig:
    """Returns `parallel` with the axes of `layout` and `changes`: no axis is -1, and auto is false."""
    axes = {axis: getattr(layout, axis) for axis in AXES}
    return replace(parallel, auto=False, **axes, **changes)
