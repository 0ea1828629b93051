"""Chooses a layout by estimates of memory and time, for `parallel=auto` and open dp axes. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from operator import attrgetter
from typing import TypeVar

from dist_lm.config.cluster import ParallelConfig
from dist_lm.config.root import Config
from dist_lm.dry_run.estimate import estimate_memory, estimate_work, gradients_add_up, is_half, offloads
from dist_lm.dry_run.work import step_seconds
from dist_lm.errors import ConfigError
from dist_lm.parallel.layout import PARAMETER_AXES, Layout, check_batch, divisors, layouts_of, resolved
from dist_lm.tracking.readable import gib, span

USABLE = 0.85
"""Usable share of a device's memory; driver, fragmentation and errors of the estimate need the rest."""

NEAR = 1.03
"""Layouts within this ratio count as equally fast, because the estimate has a larger error."""

MOST_ROWS = 6

Value = TypeVar("Value")


@dataclass(frozen=True)
class Candidate:
    """A layout and its settings, with estimates."""

    parallel: ParallelConfig
    layout: Layout
    memory: int  # peak of the fullest rank, bytes
    seconds: float  # time of a step

    def in_nodes(self, devices: int) -> bool:
        """Returns whether each rank gathers parameters only from ranks of its own node."""
        return devices % (self.layout.shards * self.layout.tp) == 0


def fits(memory: int, memory_gib: float) -> bool:
    """Returns whether `memory` bytes are within the usable part of a device's memory."""
    return memory <= USABLE * memory_gib * 2**30


def candidates(config: Config, world_size: int) -> list[Candidate]:
    """Returns every possible layout with all open settings, fastest first; equally fast ones in order of simplicity.

    Sequences are split over ranks (cp) as `config` says. If it leaves cp at 1, larger ones are tried in turn while
    nothing fits the memory, and within a node also while the fastest that fits computes all activations again.

    Raises:
        ConfigError: no layout of this many ranks fits the model and the batch, or parameters are offloaded.
    """
    if offloads(config):
        raise ConfigError(
            "parallel.auto=true: expected parallel.cpu_offload=false, because the time of offloading is not estimated; "
            "or set parallel.dp_replicate, dp_shard and tp yourself"
        )

    # Stage rlhf, which takes no sequences, does not split its rollouts over ranks.
    may_split = config.takes_sequences and config.parallel.cp == 1
    config = _as_step(config)
    possible = _candidates_with(config, world_size, config.parallel.cp)

    # Messages of cp are waited for, so it is tried for memory alone, not for a batch that nothing divides. Inside a
    # node they cost less than a second forward pass, which full checkpointing takes.
    if possible and may_split:
        for cp in divisors(world_size)[1:]:
            fitting = [candidate for candidate in possible if fits(candidate.memory, config.hardware.memory_gib)]
            fastest = min(fitting, key=lambda candidate: candidate.seconds, default=None)
            if fastest and fastest.parallel.activation_checkpointing != "full":
                break
            if fastest and cp > config.hardware.devices_per_node:
                break
            possible += _candidates_with(config, world_size, cp)

    if not possible:
        fixed = {axis: getattr(config.parallel, axis) for axis in PARAMETER_AXES}
        raise _nothing_to_try(config, world_size, {axis: size for axis, size in fixed.items() if size != -1})

    # The sort is stable, so that variants with equal estimates stay in order of simplicity.
    return sorted(possible, key=lambda candidate: float(f"{candidate.seconds:.3g}"))


def _candidates_with(config: Config, world_size: int, cp: int) -> list[Candidate]:
    """Returns every possible layout with this `cp` and all open settings, in order of simplicity.

    Args:
        config: as `_as_step` returns it.
    """
    possible = []
    fixed = {axis: getattr(config.parallel, axis) for axis in PARAMETER_AXES}
    for layout in layouts_of(config.trained_shape, world_size, cp):
        # Tensor parallelism between nodes is slow.
        if layout.tp > config.hardware.devices_per_node:
            continue
        if any(size not in (-1, getattr(layout, axis)) for axis, size in fixed.items()):
            continue

        # A variant may still refuse the batch: its ranks do not divide it.
        for parallel in _variants(config, layout):
            variant = replace(config, parallel=parallel)
            try:
                check_batch(variant, layout)
            except ConfigError:
                continue
            seconds = step_seconds(estimate_work(variant, layout), layout, config.hardware)
            possible.append(Candidate(parallel, layout, _peak(variant, layout), seconds))
    return possible


def _as_step(config: Config) -> Config:
    """Returns a configuration whose group `stage` gives the batch of a step: global_batch, micro_batch and seq_len.

    This is `config` itself, except in stage rlhf. There it is a copy whose step is one update, see `update_of`.
    """
    if config.takes_sequences:
        return config

    # Only stage rlhf has these keys.
    from dist_lm.dry_run.iterations import update_of
    from dist_lm.stages.rlhf.config import rlhf_config

    return update_of(rlhf_config(config))


def _peak(config: Config, layout: Layout) -> int:
    """Returns the peak bytes of the fullest rank: in a step, or in stage rlhf in an update, with all models and, if it
    shares the device, the engine."""
    if config.takes_sequences:
        return estimate_memory(config, layout).peak

    from dist_lm.dry_run.iterations import rlhf_memory
    from dist_lm.stages.rlhf.config import rlhf_config

    return rlhf_memory(rlhf_config(config), layout).training


def _nothing_to_try(config: Config, world_size: int, fixed: dict[str, int]) -> ConfigError:
    """Returns the error that no layout of `world_size` ranks is possible; it names the batch and the axes in
    `fixed`."""
    settings = " ".join(["parallel.auto=true", *(f"parallel.{axis}={size}" for axis, size in fixed.items())])
    suggestions = [f"give a multiple of {world_size}", "or fewer ranks"]
    if fixed:
        suggestions.append("or leave the axes open (-1)")

    # An update of stage rlhf has no keys of sequences: its batch is that of the step which stands for it.
    batch_key, *_ = config.sequence_keys or ("stage.global_batch",)
    return ConfigError(
        f"{settings}: no layout of {world_size} ranks divides {batch_key}={attrgetter(batch_key)(config)}: "
        f"{', '.join(suggestions)}"
    )


def inside_nodes(config: Config) -> ParallelConfig | None:
    """Returns `config.parallel` with FSDP over the ranks of a node and replicas between nodes.

    Returns None if a dp axis is configured, if the run is on other devices than `config.hardware`, if tp does not
    divide the ranks of a node or takes all of them, or if the model does not fit that way, in shape or memory.

    Args:
        config: configuration of several nodes, with the ranks of a node as hardware.devices_per_node; parallel.tp is
            a number.
    """
    parallel = config.parallel
    hardware = config.hardware
    ranks = hardware.devices_per_node

    is_open = parallel.dp_replicate == parallel.dp_shard == -1 and parallel.tp > 0
    planned = config.device in ("auto", hardware.device)
    sharing = parallel.tp * parallel.cp  # ranks that see the same data
    if not is_open or not planned or ranks % sharing or ranks == parallel.tp:
        return None

    layout = Layout(config.cluster.nodes, ranks // sharing, parallel.tp, parallel.cp)
    if layout not in layouts_of(config.trained_shape, layout.world_size, layout.cp):
        return None

    # A larger model needs FSDP between nodes, too.
    if not fits(_peak(config, layout), hardware.memory_gib):
        return None
    return replace(parallel, dp_shard=layout.dp_shard)


def gathers_once(config: Config, layout: Layout) -> bool:
    """Returns whether GPUs have the memory to keep all parameters gathered during a step, by an estimate.

    False, too, if `config` decides it (parallel.reshard_after_forward), runs on a CPU, needs neither messages nor
    another dtype for it, or is of a stage without sequences (rlhf).
    """
    parallel = config.parallel
    hardware = config.hardware
    # A single GPU gathers nothing, but would cast every block twice for each micro-batch.
    gathers = layout.shards > 1 or is_half(config)
    is_open = parallel.reshard_after_forward is None and gathers and config.takes_sequences
    if not is_open or config.device not in ("auto", "cuda"):
        return False

    gathered = replace(config, parallel=replace(parallel, reshard_after_forward=False))
    return fits(estimate_memory(gathered, layout).peak, hardware.memory_gib)


def best(config: Config, possible: list[Candidate]) -> Candidate:
    """Returns the fastest candidate that fits the memory; among equally fast ones, one whose shards stay in a node.

    Args:
        possible: what `candidates` returned: at least one, fastest first.

    Raises:
        ConfigError: none fits.
    """
    hardware = config.hardware
    fitting = [candidate for candidate in possible if fits(candidate.memory, hardware.memory_gib)]
    # Candidates are ordered by time.
    if fitting:
        near = (candidate for candidate in fitting if candidate.seconds <= NEAR * fitting[0].seconds)
        return next((candidate for candidate in near if candidate.in_nodes(hardware.devices_per_node)), fitting[0])

    least = min(possible, key=lambda candidate: candidate.memory)

    if not config.takes_sequences:
        lower = "lower rlhf.micro_batch_tokens"
    elif config.stage.micro_batch > 1:
        lower = f"lower stage.micro_batch={config.stage.micro_batch}"
    else:
        lower = "shorten stage.seq_len"
    raise ConfigError(
        f"parallel.auto=true: no layout fits {USABLE:.0%} of hardware.memory_gib={hardware.memory_gib:g}; "
        f"the smallest needs {gib(least.memory)} ({describe(least)}): {lower}, or use more ranks"
    )


def table(config: Config, possible: list[Candidate]) -> list[tuple[str, str, str, str]]:
    """Returns (layout, step, memory, verdict) for people, fastest first: the chosen candidate and the fastest others,
    one for each mesh, at most MOST_ROWS.

    Args:
        possible: as `best`.

    Raises:
        ConfigError: no candidate fits the memory.
    """
    chosen = best(config, possible)
    rows = []
    listed = {chosen.layout}

    for candidate in possible:
        # One mesh gets one row, for its fastest settings; the mesh of the chosen candidate always gets its row.
        if candidate is not chosen and (candidate.layout in listed or len(rows) >= MOST_ROWS - 1):
            continue

        listed.add(candidate.layout)
        if candidate is chosen:
            verdict = "chosen"
        elif fits(candidate.memory, config.hardware.memory_gib):
            verdict = "slower"
        else:
            verdict = "too much memory"
        rows.append((describe(candidate), span(candidate.seconds), gib(candidate.memory), verdict))

    return rows


def describe(candidate: Candidate) -> str:
    """Returns a candidate for people: its layout, then those settings that are on."""
    parallel = candidate.parallel
    extras = []
    if parallel.sp:
        extras.append("sp")
    if parallel.activation_checkpointing != "none":
        extras.append(f"checkpointing {parallel.activation_checkpointing}")
    if not parallel.reshard_after_forward:
        extras.append("no reshard")
    if parallel.reduce_every_micro_batch:
        extras.append("reduce every micro-batch")
    return ", ".join([str(candidate.layout), *extras])


def _variants(config: Config, layout: Layout) -> Iterator[ParallelConfig]:
    """Yields all settings for a layout, simplest first; keys that `config.parallel` sets explicitly stay.

    None if parallel.sp is set and the layout has no tensor parallelism.
    """
    configured = config.parallel
    if configured.sp and layout.tp == 1:
        return

    reduces = layout.reducing > 1 and gradients_add_up(config, layout)
    for checkpointing, sp, reshard, reduce in product(
        _open(configured.activation_checkpointing, "none", ("none", "selective", "full")),
        _open(configured.sp, False, (False, True), matters=layout.tp > 1),
        _open(configured.reshard_after_forward, None, (True, False), matters=layout.shards > 1),
        _open(configured.reduce_every_micro_batch, False, (False, True), matters=reduces),
    ):
        yield resolved(
            configured,
            layout,
            sp=sp,
            activation_checkpointing=checkpointing,
            reshard_after_forward=reshard,
            reduce_every_micro_batch=reduce,
        )


def _open(configured: Value, default: Value, choices: tuple[Value, ...], matters: bool = True) -> tuple[Value, ...]:
    """Returns `choices` for a key at its default, else the configured value.

    Args:
        matters: whether the key changes anything in this layout.
    """
    if configured != default:
        return (configured,)
    if not matters:
        return choices[:1]
    return choices
