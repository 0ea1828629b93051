"""The mesh as numbers: a value that can be computed, printed and compared without any process group."""

from dataclasses import dataclass
from operator import attrgetter

from dist_lm.config.model import ModelConfig
from dist_lm.config.parallel import ParallelConfig
from dist_lm.config.root import Config
from dist_lm.errors import ConfigError

AXES = ("dp_replicate", "dp_shard", "tp")
LISTED_LAYOUTS = 12  # in an error message
HEAD_PADDING = 1.25  # attention weights gathered for each that is there: beyond this, replicas are better


@dataclass(frozen=True)
class Layout:
    """How many ranks each axis of the mesh has, outermost first."""

    dp_replicate: int
    dp_shard: int
    tp: int

    @property
    def dp(self) -> int:
        """Ranks that see different data."""
        return self.dp_replicate * self.dp_shard

    @property
    def world_size(self) -> int:
        return self.dp * self.tp

    def __str__(self) -> str:
        return f"dp_replicate={self.dp_replicate} dp_shard={self.dp_shard} tp={self.tp}"


def resolve_layout(parallel: ParallelConfig, model: ModelConfig, world_size: int) -> Layout:
    """The layout that `parallel` asks for on `world_size` ranks, with -1 filled in so that it works.

    With dp_replicate and dp_shard both open, dp_shard takes as many ranks as the model allows (with tensor parallelism
    it has to divide d_model, without it is not to pad attention heads by much), and the rest are replicas.

    Raises:
        ConfigError: the axes do not multiply to the world, or the model cannot be cut that way; the message lists
            layouts that fit.
    """
    asked = " ".join(f"parallel.{name}={getattr(parallel, name)}" for name in AXES)
    layout = _filled(parallel, model, world_size)
    if layout is None:
        raise ConfigError(
            f"{asked}: does not make a world of {world_size} ranks (cluster.nodes x cluster.ranks_per_node); "
            f"(dp_replicate, dp_shard, tp) that do: {_fitting(model, world_size)}"
        )
    reason = misfit(layout, model)
    if reason:
        fitting = _fitting(model, world_size)
        raise ConfigError(f"{asked}: {reason}; (dp_replicate, dp_shard, tp) that fit {world_size} ranks: {fitting}")
    if parallel.sp and layout.tp == 1:
        raise ConfigError(f"parallel.sp=true: expected parallel.tp > 1 to split sequences over; the layout is {layout}")
    return layout


def misfit(layout: Layout, model: ModelConfig) -> str | None:
    """Why `model` cannot be cut into `layout`, or None if it can."""
    if layout.tp > model.n_heads:
        return f"tp={layout.tp} is more than model.n_heads={model.n_heads}"
    if -(-model.vocab_size // layout.tp) * (layout.tp - 1) >= model.vocab_size:
        return f"tp={layout.tp} leaves a rank without a piece of model.vocab_size={model.vocab_size}"
    if layout.tp > 1 and model.d_model % layout.dp_shard:
        return (
            f"with tensor parallelism dp_shard={layout.dp_shard} has to divide model.d_model={model.d_model} "
            "(let dp_replicate take the rest)"
        )
    return None


def head_padding(layout: Layout, model: ModelConfig) -> float:
    """Elements of attention weights that FSDP gathers, padding included, for each element there is.

    FSDP cuts them along d_model; where dp_shard does not divide that, along the heads (it cuts unevenly on dimension 0
    only): 25 heads over 128 ranks become 128.
    """
    if layout.tp > 1 or model.d_model % layout.dp_shard == 0:
        return 1.0
    heads = (model.n_heads, model.kv_heads)
    return sum(-(-count // layout.dp_shard) * layout.dp_shard for count in heads) / sum(heads)


def layouts_of(model: ModelConfig, world_size: int) -> list[Layout]:
    """Every layout of `world_size` ranks that cuts the model well, by rising tp, then rising dp_replicate."""
    return [
        layout
        for tp in divisors(world_size)
        for replicate in divisors(world_size // tp)
        if _cuts_well(layout := Layout(replicate, world_size // tp // replicate, tp), model)
    ]


def check_batch(config: Config, layout: Layout) -> None:
    """Refuse a global batch that the data-parallel ranks, or sequences that the tensor-parallel ones, cannot share.

    Raises:
        ConfigError: names the key and the nearest values that work.
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
    """The layout with every -1 replaced, or None where no whole number does."""
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
