"""The mesh as numbers: which layouts fit a model and a number of ranks, computed without any process group."""

from dataclasses import dataclass
from operator import attrgetter

from dist_lm.config.model import ModelConfig
from dist_lm.config.parallel import ParallelConfig
from dist_lm.config.root import Config
from dist_lm.errors import ConfigError

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

    def __str__(self) -> str:
        return f"dp_replicate={self.dp_replicate} dp_shard={self.dp_shard} tp={self.tp}"


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
