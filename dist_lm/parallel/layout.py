"""The mesh as numbers: a value that can be computed, printed and compared without any process group."""

from dataclasses import dataclass

from dist_lm.config import Config, ModelConfig, ParallelConfig
from dist_lm.errors import ConfigError


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
    """The layout that `parallel` asks for on `world_size` ranks, with -1 filled in.

    Raises:
        ConfigError: the axes do not multiply to the world; the message lists layouts that do.
    """
    axes = {name: getattr(parallel, name) for name in ("dp_replicate", "dp_shard", "tp")}
    if axes["tp"] != 1:
        raise ConfigError(f"parallel.tp={axes['tp']}: expected 1; tensor parallelism is not part of this version")
    asked = " ".join(f"parallel.{name}={value}" for name, value in axes.items())
    open_axes = [name for name, value in axes.items() if value == -1]
    fixed = 1
    for value in axes.values():
        fixed *= 1 if value == -1 else value
    if len(open_axes) > 1:
        raise ConfigError(f"{asked}: expected -1 for one of them at most")
    if world_size % fixed or (not open_axes and fixed != world_size):
        fitting = ", ".join(f"({r}, {world_size // r}, 1)" for r in divisors(world_size))
        raise ConfigError(
            f"{asked}: does not make a world of {world_size} ranks (cluster.nodes x cluster.ranks_per_node); "
            f"(dp_replicate, dp_shard, tp) that do: {fitting}"
        )
    for name in open_axes:
        axes[name] = world_size // fixed
    return Layout(**axes)


def check_batch(config: Config, layout: Layout) -> None:
    """Refuse a global batch that the data-parallel ranks cannot share evenly.

    Raises:
        ConfigError: names stage.global_batch and the nearest values that work.
    """
    batch, dp = config.stage.global_batch, layout.dp
    if batch % dp:
        lower, upper = batch // dp * dp, (batch // dp + 1) * dp
        near = f"{lower} or {upper}" if lower else f"{upper}"
        raise ConfigError(
            f"stage.global_batch={batch}: expected a multiple of the {dp} data-parallel ranks, such as {near}"
        )


def shard_dim(shape: tuple[int, ...], ranks: int) -> int:
    """The dimension of a parameter that FSDP cuts: d_model of attention weights (n_heads, d_head, d_model), else 0.

    Heads are few and divide by no usual number of ranks; FSDP cuts unevenly on dimension 0 only.
    """
    return 2 if len(shape) == 3 and shape[2] % ranks == 0 else 0


def divisors(number: int) -> list[int]:
    """All divisors of `number`, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]
